// X = A^-1 of one symmetric positive definite matrix (n, n), float32 or float64, blocked and in place on tiles.
//
// The lower triangle is kept as square tiles, (i, j) with j <= i, contiguous each; tiles on the diagonal are valid in their upper
// half. Steps k eliminate A from the bordered matrix [A I; I 0], whose Schur complement at the end is -A^-1. Row k of the identity
// takes over the storage of row k of A as that is eliminated:
//
//   P = L^-1 [row k of the complement, I in place of column k]     L L^T: the block on the diagonal
//   M <- M - P^T P                                                 row and column k of M counted as zero
//
// Floor: n^3 flops (n^3/3 each for the factor, its inverse and their product), n^2/2 elements read and written; P^T P is symmetric, so
// only tiles j <= i are computed. Fast because everything but the kTile x kTile factor is one register-blocked product of contiguous
// panels; a step takes up to kMaxSteps tiles so that a large M is passed over less often. Stable because P stands on both sides: the
// complement is Cholesky's own, entry by entry. (Gauss-Jordan, with D^-1 on one side, costs the same and loses cond(A) digits.)

constexpr int64_t kMaxSteps = 4;

template <class S>
constexpr int64_t tiles_of(int64_t n) {
  return (n + kTile<S> - 1) / kTile<S>;
}
template <class S>
MFAC_INLINE S* tile_at(S* tiles, int64_t i, int64_t j) {
  return tiles + (i * (i + 1) / 2 + j) * kTileArea<S>;
}
// Elements of the tiles, and of the workspace of spd_eliminate.
template <class S>
constexpr int64_t spd_tiles_size(int64_t n) {
  return tiles_of<S>(n) * (tiles_of<S>(n) + 1) / 2 * kTileArea<S>;
}
template <class S>
constexpr int64_t spd_work_size(int64_t n) {
  return (tiles_of<S>(n) * kMaxSteps + 3) * kTileArea<S>;
}

// inverse = L^-1 (lower) of a diagonal tile A = L L^T, of which the upper half is read. Returns 0, or 1 + the row of the first pivot
// that is not positive.
//
// Gaussian elimination of [A I] without square roots, row after row, each finished from those above it while it stays in registers:
// what counts is the latency from pivot to pivot, and it holds one division. Row j of the first half ends in zeros, row j of the
// second begins with values that no later row reads, so that three of the four vectors of a row are enough.
template <class S>
__attribute__((noinline)) int64_t factor_tile(const S* tile, S* inverse) {
  using V = Vec<S>;
  constexpr int64_t n = kTile<S>, kHalf = kLanesOf<S>;
  alignas(64) S rows[n][2 * n];     // [A I] on entry, [D^-1 U  D^-1 E] on exit, with U = E A
  alignas(64) S factors[n][2 * n];  // U
  for (int64_t j = 0; j < n; ++j) {
    __builtin_memcpy(rows[j], tile + j * n, n * sizeof(S));
    __builtin_memset(rows[j] + n, 0, n * sizeof(S));
    rows[j][n + j] = 1;
  }
  S root[n];
  for (int64_t j = 0; j < n; ++j) {
    const int64_t first = j < kHalf ? 0 : kHalf;
    V x[3];
#pragma GCC unroll 3
    for (int v = 0; v < 3; ++v) x[v] = load<V>(rows[j] + first + v * kHalf);
    for (int64_t i = 0; i < j; ++i) {
      const V factor = splat(factors[i][j]);
#pragma GCC unroll 3
      for (int v = 0; v < 3; ++v) x[v] -= factor * load<V>(rows[i] + first + v * kHalf);
    }
#pragma GCC unroll 3
    for (int v = 0; v < 3; ++v) store(factors[j] + first + v * kHalf, x[v]);
    const S pivot = factors[j][j];
    if (!(pivot > 0)) return j + 1;
    root[j] = pivot;
    const V scale = splat(1 / pivot);
#pragma GCC unroll 3
    for (int v = 0; v < 3; ++v) store(rows[j] + first + v * kHalf, x[v] * scale);
  }
  for (int64_t j = 0; j < n; ++j) {
    if constexpr (sizeof(S) == sizeof(float))
      root[j] = __builtin_sqrtf(root[j]);
    else
      root[j] = __builtin_sqrt(root[j]);
    for (int v = 0; v < 2; ++v) store(inverse + j * n + v * kHalf, load<V>(rows[j] + n + v * kHalf) * splat(root[j]));
  }
  return 0;
}

// Adds the damping, makes the padding an identity. Returns whether all entries are finite.
template <class S>
bool spd_prepare(S* tiles, int64_t n, S damping) {
  const int64_t count = tiles_of<S>(n);
  for (int64_t i = 0; i < count * kTile<S>; ++i) {
    S& diagonal = tile_at(tiles, i / kTile<S>, i / kTile<S>)[i % kTile<S> * (kTile<S> + 1)];
    diagonal = i < n ? diagonal + damping : S(1);
  }
  Vec<S> zero = {};  // x - x is zero for finite x alone
  for (int64_t i = 0; i < count; ++i)
    for (int64_t j = 0; j <= i; ++j)
      for (int64_t r = 0; r < kTile<S>; ++r)
        for (int64_t v = 0; v < 2; ++v) {
          if (i == j && r >= (v + 1) * kLanesOf<S>) continue;
          const Vec<S> x = load<Vec<S>>(tile_at(tiles, i, j) + r * kTile<S> + v * kLanesOf<S>);
          zero += x - x;
        }
  S sum = 0;
  for (int i = 0; i < kLanesOf<S>; ++i) sum += zero[i];
  return sum == 0;
}

// Tiles <- those of -A^-1. Returns 0, or the order of the leading minor that is not positive.
template <class S>
int64_t spd_eliminate(S* tiles, int64_t n, S* work) {
  constexpr int64_t T = kTile<S>, kArea = kTileArea<S>;
  const int64_t count = tiles_of<S>(n);
  const int64_t max_steps = count < 4 ? 1 : count < 16 ? 2 : kMaxSteps;
  S *upper = work, *raw = work + kArea, *row = work + 2 * kArea, *panels = work + 3 * kArea;
  const S* zero = nullptr;
  for (int64_t k = 0, steps; k < count; k += steps) {
    steps = count - k < max_steps ? count - k : max_steps;
    const int64_t end = k + steps;
    const auto panel = [&](int64_t j) { return panels + j * steps * kArea; };
    for (int64_t s = 0; s < steps; ++s) {
      // Row r of the complement: the updates of this step's earlier rows have not reached it yet.
      const int64_t r = k + s;
      multiply_tile(panel(r), panel(r), s * T, S(-1), tile_at(tiles, r, r), row, Part::upper);
      if (const int64_t bad = factor_tile(row, raw)) return r * T + bad;
      transpose_tile(raw, upper);
      for (int64_t j = 0; j < count; ++j) {
        if (j == r) continue;
        const S* base = zero;
        if (j < k) base = tile_at(tiles, r, j);
        if (j > r) {
          transpose_tile(tile_at(tiles, j, r), row);
          base = row;
        }
        if (s > 0) {
          multiply_tile(panel(r), panel(j), s * T, S(-1), base, row, Part::full);
          base = row;
        }
        multiply_triangle(upper, base, panel(j) + s * kArea);
      }
      __builtin_memset(panel(r), 0, s * kArea * sizeof(S));
      __builtin_memcpy(panel(r) + s * kArea, raw, kArea * sizeof(S));
    }
    for (int64_t i = 0; i < count; ++i)
      for (int64_t j = 0; j <= i; ++j) {
        S* tile = tile_at(tiles, i, j);
        const bool eliminated = (i >= k && i < end) || (j >= k && j < end);
        const int64_t zeros = i >= k && i < end ? (i - k) * T : kNoZeros;  // P is triangular there
        multiply_tile(panel(i), panel(j), steps * T, S(-1), eliminated ? zero : tile, tile, i == j ? Part::upper : Part::full, zeros);
      }
  }
  return 0;
}

// Where out holds a tile's transpose: puts back the tile's upper half.
template <class S>
MFAC_INLINE void mirror_upper(const S* tile, S* out) {
  using V = Vec<S>;
  const auto iota = [&]<int... l>(std::integer_sequence<int, l...>) { return V{S(l)...}; }(std::make_integer_sequence<int, kLanesOf<S>>());
  for (int64_t r = 0; r < kTile<S>; ++r)
    for (int64_t c = 0; c < kTile<S>; c += kLanesOf<S>) {
      const int64_t at = r * kTile<S> + c;
      store(out + at, iota >= splat(S(r - c)) ? load<V>(tile + at) : load<V>(out + at));
    }
}

// out (n, n) = -tiles, both triangles, a band of tiles at a time: whole rows of out are written one after the other. work: as
// spd_eliminate's.
template <class S>
void spd_store_negated(const S* tiles, int64_t n, S* out, int64_t stride, S* work) {
  constexpr int64_t T = kTile<S>;
  const int64_t count = tiles_of<S>(n);
  for (int64_t i = 0; i < count; ++i) {
    const S* band = tile_at(const_cast<S*>(tiles), i, 0);
    for (int64_t j = i; j < count; ++j) transpose_tile(tile_at(const_cast<S*>(tiles), j, i), work + j * kTileArea<S>);
    mirror_upper(band + i * kTileArea<S>, work + i * kTileArea<S>);
    for (int64_t r = 0; r < T && i * T + r < n; ++r) {
      S* row = out + (i * T + r) * stride;
      for (int64_t j = 0; j < count; ++j) {
        const S* from = (j < i ? band : work) + j * kTileArea<S> + r * T;
        for (int64_t v = 0; v < T; v += kLanesOf<S>) store_upto(row + j * T + v, -load<Vec<S>>(from + v), n - j * T - v);
      }
    }
  }
}

// Symmetric positive definite matrices (n, n) as tiles, float32 or float64: what the inverse and the factor of one matrix stand on.
//
// The lower triangle is kept as square tiles, (i, j) with j <= i, contiguous each; tiles on the diagonal are valid in their upper half.

template <class S>
constexpr int64_t tiles_of(int64_t n) {
  return (n + kTile<S> - 1) / kTile<S>;
}
// Where they lie: row after row, upwards in memory from `first` or, with step -kTileArea and slope 3, downwards; upwards within a row.
template <class S>
struct Tiles {
  S* first;
  int64_t step = kTileArea<S>, slope = 1;
};
template <class S>
MFAC_INLINE S* tile_at(const Tiles<S>& tiles, int64_t i, int64_t j) {
  return tiles.first + i * (i + tiles.slope) / 2 * tiles.step + j * kTileArea<S>;
}
// Elements of all tiles
template <class S>
constexpr int64_t spd_tiles_size(int64_t n) {
  return tiles_of<S>(n) * (tiles_of<S>(n) + 1) / 2 * kTileArea<S>;
}

// inverse = L^-1 (lower) of a diagonal tile A = L L^T, of which the upper half is read. Returns 0, or 1 + the row of the first pivot
// that is not positive and finite.
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
    if (!(pivot > 0 && pivot < static_cast<S>(__builtin_inf()))) return j + 1;
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
bool spd_prepare(const Tiles<S>& tiles, int64_t n, S damping) {
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

// X = A^-1 of one symmetric positive definite matrix (n, n), float32 or float64, blocked and in place on tiles (spd_tiles_impl.h).
//
// Steps k eliminate A from the bordered matrix [A I; I 0], whose Schur complement at the end is -A^-1. Row k of the identity
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

// What the columns of a step share: of each of its rows s, U = L^T left of the diagonal, L^-1 of the diagonal tile, and its transpose.
template <class S>
struct alignas(64) SpdStep {
  S left[kMaxSteps * (kMaxSteps - 1) / 2 * kTileArea<S>], inverse[kMaxSteps][kTileArea<S>], upper[kMaxSteps][kTileArea<S>];
  S* left_of(int64_t s) { return left + s * (s - 1) / 2 * kTileArea<S>; }
};

// Elements of the workspace of spd_eliminate
template <class S>
constexpr int64_t spd_work_size(int64_t n) {
  return tiles_of<S>(n) * kMaxSteps * kTileArea<S> + static_cast<int64_t>(sizeof(SpdStep<S>) / sizeof(S));
}

// Tile rows [k, k + steps) are eliminated together. P is kept as panels, a column of tiles of it each.
template <class S>
struct Elimination {
  static constexpr int64_t T = kTile<S>, kArea = kTileArea<S>;
  Tiles<S> tiles;
  S* panels;
  SpdStep<S>& step;
  int64_t count, k, steps;

  Elimination(const Tiles<S>& all_tiles, int64_t n, S* work)
      : tiles(all_tiles),
        panels(work),
        step(*reinterpret_cast<SpdStep<S>*>(work + tiles_of<S>(n) * kMaxSteps * kArea)),
        count(tiles_of<S>(n)) {
    begin(0);
  }
  void begin(int64_t first) {
    const int64_t most = count < 4 ? 1 : count < 16 ? 2 : kMaxSteps;
    k = first;
    steps = count - k < most ? count - k : most;
  }
  S* panel(int64_t j) const { return panels + j * steps * kArea; }

  // Rows [from, to) of panel j: P = L^-1 (base - U^T P), where the updates of this step's earlier rows have not reached the base yet.
  void compute_rows(int64_t j, int64_t from, int64_t to) const {
    alignas(64) S row[kArea];
    for (int64_t s = from; s < to; ++s) {
      const S* base = nullptr;
      if (j < k) base = tile_at(tiles, k + s, j);
      if (j > k + s) {
        transpose_tile(tile_at(tiles, j, k + s), row);
        base = row;
      }
      if (s > 0) {
        multiply_tile(step.left_of(s), panel(j), s * T, S(-1), base, row, Part::full);
        base = row;
      }
      multiply_triangle(step.upper[s], base, panel(j) + s * kArea);
    }
  }

  // Returns 0, or the order of the leading minor that is not positive.
  int64_t factor_diagonal() const {
    alignas(64) S diagonal[kArea];
    for (int64_t s = 0; s < steps; ++s) {
      const int64_t r = k + s;
      compute_rows(r, 0, s);
      __builtin_memcpy(step.left_of(s), panel(r), s * kArea * sizeof(S));
      multiply_tile(panel(r), panel(r), s * T, S(-1), tile_at(tiles, r, r), diagonal, Part::upper);
      if (const int64_t bad = factor_tile(diagonal, step.inverse[s])) return r * T + bad;
      transpose_tile(step.inverse[s], step.upper[s]);
    }
    return 0;
  }

  // Where P has rows of L^-1, left of the diagonal and on it, they take the place of those of M. After compute_panel(j)
  void keep(int64_t j) const {
    for (int64_t s = j > k ? j - k : 0; s < steps; ++s) __builtin_memcpy(tile_at(tiles, k + s, j), panel(j) + s * kArea, kArea * sizeof(S));
  }

  // Panel j, any order
  void compute_panel(int64_t j) const {
    const int64_t s = j - k;
    if (s < 0 || s >= steps) return compute_rows(j, 0, steps);
    __builtin_memset(panel(j), 0, s * kArea * sizeof(S));
    __builtin_memcpy(panel(j) + s * kArea, step.inverse[s], kArea * sizeof(S));
    compute_rows(j, s + 1, steps);
  }

  // Tile row i of M <- M - P^T P, any order
  void update(int64_t i) const {
    const bool own = i >= k && i < k + steps;
    for (int64_t j = 0; j <= i; ++j) {
      S* tile = tile_at(tiles, i, j);
      const S* base = own || (j >= k && j < k + steps) ? nullptr : tile;
      const int64_t zeros = own ? (i - k) * T : kNoZeros;  // P is triangular there
      multiply_tile(panel(i), panel(j), steps * T, S(-1), base, tile, i == j ? Part::upper : Part::full, zeros);
    }
  }
};

// Tiles <- those of -A^-1. Returns 0, or the order of the leading minor that is not positive. each(count, body) calls body(0) ...
// body(count - 1) in any order, or at once.
template <class S, class Each>
int64_t spd_eliminate(const Tiles<S>& tiles, int64_t n, S* work, const Each& each) {
  Elimination<S> m(tiles, n, work);
  for (; m.k < m.count; m.begin(m.k + m.steps)) {
    if (const int64_t bad = m.factor_diagonal()) return bad;
    each(m.count, [&](int64_t j) { m.compute_panel(j); });
    each(m.count, [&](int64_t i) { m.update(m.count - 1 - i); });  // the longest row first
  }
  return 0;
}
template <class S>
int64_t spd_eliminate(const Tiles<S>& tiles, int64_t n, S* work) {
  return spd_eliminate(tiles, n, work, [](int64_t count, const auto& body) {
    for (int64_t i = 0; i < count; ++i) body(i);
  });
}

// Tiles <- those of L^-1, A = L L^T: the elimination of A from [A I] alone, 2/3 n^3 flops. What is left of the diagonal in row k of P is
// row k of L^-1, and only rows below it change. Tiles on the diagonal are zero above theirs. Returns as above.
template <class S, class Each>
int64_t spd_invert_factor(const Tiles<S>& tiles, int64_t n, S* work, const Each& each) {
  Elimination<S> m(tiles, n, work);
  for (; m.k < m.count; m.begin(m.k + m.steps)) {
    if (const int64_t bad = m.factor_diagonal()) return bad;
    each(m.count, [&](int64_t j) {
      m.compute_panel(j);
      if (j < m.k + m.steps) m.keep(j);
    });
    each(m.count - m.k - m.steps, [&](int64_t i) { m.update(m.count - 1 - i); });
  }
  return 0;
}

// Rows [i T, (i + 1) T) of out (n, n) = -tiles, both triangles, written in long runs.
template <class S>
void spd_store_negated_band(const Tiles<S>& tiles, int64_t n, int64_t i, S* out, int64_t stride) {
  constexpr int64_t T = kTile<S>, kRun = 4;
  alignas(64) S above[kRun * kTileArea<S>];  // tiles of the upper triangle
  const int64_t height = n - i * T < T ? n - i * T : T;
  for (int64_t first = 0; first < tiles_of<S>(n); first += kRun) {
    const int64_t end = first + kRun < tiles_of<S>(n) ? first + kRun : tiles_of<S>(n);
    for (int64_t j = first < i ? i : first; j < end; ++j) {
      transpose_tile(tile_at(tiles, j, i), above + (j - first) * kTileArea<S>);
      if (i == j) mirror_upper(tile_at(tiles, i, i), above + (j - first) * kTileArea<S>);
    }
    for (int64_t r = 0; r < height; ++r)
      for (int64_t j = first; j < end; ++j) {
        const S* from = (j < i ? tile_at(tiles, i, j) : above + (j - first) * kTileArea<S>)+r * T;
        for (int64_t v = 0; v < T; v += kLanesOf<S>)
          store_upto(out + (i * T + r) * stride + j * T + v, -load<Vec<S>>(from + v), n - j * T - v);
      }
  }
}
template <class S>
void spd_store_negated(const Tiles<S>& tiles, int64_t n, S* out, int64_t stride) {
  for (int64_t i = 0; i < tiles_of<S>(n); ++i) spd_store_negated_band(tiles, n, i, out, stride);
}

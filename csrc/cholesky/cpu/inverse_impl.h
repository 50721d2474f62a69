// X = (block + damping I)^-1 of one block of any strides (n, n), both triangles.
//
// Up to a few thousand rows in three passes over tiles (single_impl.h has the first), with A = L L^T, U = L^T, Y = L^-1:
//
//   U_ki = Y_kk (A_ik^T - sum_{j<k} U_jk^T U_ji)       Y_ij = -Y_ii sum_{j<=k<i} U_ki^T Y_kj       X_ij = sum_{k>=i} Y_ki^T Y_kj
//
// Floor: n^3 flops, n^2/2 elements read and n^2 written. Fast because each tile of each pass is one product of two contiguous panels, its
// sum in registers over its whole length, and tiles of A and X pass between memory and registers by way of L1 alone. U and Y take n^2
// elements; where these are many, elimination in place (spd_inverse_impl.h) takes half of that and is as fast.

constexpr int64_t kMostInPasses = 2047;

template <class S>
struct InversePasses {
  static constexpr int64_t T = kTile<S>, kArea = kTileArea<S>;
  const Job& job;
  int64_t n, count;
  S *panels, *rest, *uppers;  // of U; of Y: of column j the rows from j on; of each tile on the diagonal the transpose of Y_kk

  InversePasses(const Job& of, int64_t size, void* work)
      : job(of),
        n(size),
        count(tiles_of<S>(size)),
        panels(static_cast<S*>(work)),
        rest(panels + spd_tiles_size<S>(size)),
        uppers(rest + spd_tiles_size<S>(size)) {}
  static int64_t work_size(int64_t n) { return 2 * spd_tiles_size<S>(n) + tiles_of<S>(n) * kArea; }

  S* u(int64_t k, int64_t i) const { return column_panel(panels, i) + k * kArea; }
  S* y(int64_t i, int64_t j) const { return rest + (j * count - j * (j - 1) / 2 + i - j) * kArea; }
  S* upper(int64_t k) const { return uppers + k * kArea; }

  int32_t factor(Team team) const {
    return factor_columns(job, n, panels, [this](int64_t k) { return y(k, k); }, [this](int64_t k) { return upper(k); }, team);
  }
  // Column j of Y, in any order
  void invert(int64_t j) const {
    alignas(64) S tile[kArea];
    for (int64_t i = j + 1; i < count; ++i) {
      multiply_tile(u(j, i), y(j, j), (i - j) * T, S(-1), static_cast<const S*>(nullptr), tile, Part::full);
      multiply_triangle(upper(i), tile, y(i, j));
    }
  }
  // Row i of X, in any order, and column i
  void multiply(int64_t i) const {
    alignas(64) S tile[kArea];
    for (int64_t j = 0; j <= i; ++j) {
      prefetch_tile<S, true>(job.out, i * T, j * T);
      prefetch_tile<S, true>(job.out, j * T, i * T);
      multiply_tile(y(i, i), y(i, j), (count - i) * T, S(1), static_cast<const S*>(nullptr), tile, i == j ? Part::upper : Part::full);
      store_symmetric_tile(tile, job.out, n, i, j);
    }
  }
};

// The same by elimination
template <class S>
void inverse_by_elimination(const Job& job, int64_t n, void* work, Team team) {
  const Tiles<S> tiles{static_cast<S*>(work)};
  S* rest = tiles.first + spd_tiles_size<S>(n);
  const Matrix& out = job.out;
  const auto each = [&](int64_t count, const auto& body) { for_each(team, count, body); };
  const int64_t info = load_spd_tiles(job, n, tiles, team) ? spd_eliminate(tiles, n, rest, each) : -1;
  *job.info = static_cast<int32_t>(info);
  if (info != 0) return fill_nan<S>(out, n);
  // The result is symmetric: columns next to each other serve as rows.
  const Matrix rows = out.column_stride == 1 ? out : transposed(out);
  for_each(team, tiles_of<S>(n), [&](int64_t i) {
    if (rows.column_stride == 1) return spd_store_negated_band(tiles, n, i, static_cast<S*>(rows.data), rows.row_stride);
    for (int64_t j = 0; j <= i; ++j) {
      S* tile = tile_at(tiles, i, j);
      for (int64_t v = 0; v < kTileArea<S>; v += kLanesOf<S>) store(tile + v, -load<Vec<S>>(tile + v));
      store_symmetric_tile(tile, out, n, i, j);
    }
  });
}

template <class S>
int64_t inverse_work(const Job&, int64_t n) {
  const int64_t size = n <= kMostInPasses ? InversePasses<S>::work_size(n) : spd_tiles_size<S>(n) + spd_work_size<S>(n);
  return size * static_cast<int64_t>(sizeof(S));
}

template <class S>
void inverse(const Job& job, int64_t n, void* work, Team team) {
  if (n > kMostInPasses) return inverse_by_elimination<S>(job, n, work, team);
  const InversePasses<S> passes(job, n, work);
  *job.info = passes.factor(team);
  if (*job.info) return fill_nan<S>(job.out, n);
  for_each(team, passes.count, [&](int64_t j) { passes.invert(j); });
  for_each(team, passes.count, [&](int64_t i) { passes.multiply(i); });
}

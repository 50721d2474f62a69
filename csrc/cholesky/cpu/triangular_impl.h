// Inverses of triangular matrices L (n, n), one at a time, on square tiles (spd_tiles_impl.h): a few tile rows X_k of X = L^-1 at a time,
//
//   X_k = L_kk^-1 (I_k - sum_{j<k} L_kj X_j)
//
// Floor: n^3 / 3 flops, n^2/2 elements read, n^2 written. Left-looking: every sum stays in registers over its whole length, columns of X
// are independent of each other, and of L no more than these rows is in memory beside X, as L^T, column by column.

constexpr int64_t kTriangularSteps = 4;  // tile rows

template <class S>
int64_t triangular_inverse_work(const Job&, int64_t n) {
  return (spd_tiles_size<S>(n) + kTriangularSteps * (tiles_of<S>(n) + 1) * kTileArea<S>)*static_cast<int64_t>(sizeof(S));
}

// out = l^-1, zero above the diagonal, for the lower triangle l of a tile. Returns 0, or 1 + the row of the first zero on the diagonal.
template <class S>
__attribute__((noinline)) int64_t invert_triangle(const S* l, S* out) {
  using V = Vec<S>;
  constexpr int64_t T = kTile<S>;
  for (int64_t r = 0; r < T; ++r) {
    if (l[r * (T + 1)] == 0) return r + 1;
    S row[T] = {};
    row[r] = 1;
    V x[2] = {load<V>(row), load<V>(row + kLanesOf<S>)};
    for (int64_t q = 0; q < r; ++q)
      for (int v = 0; v < 2; ++v) x[v] -= splat(l[r * T + q]) * load<V>(out + q * T + v * kLanesOf<S>);
    for (int v = 0; v < 2; ++v) store(out + r * T + v * kLanesOf<S>, x[v] * splat(1 / l[r * (T + 1)]));
  }
  return 0;
}

template <class S>
void triangular_inverse(const Job& job, int64_t n, void* work, Team team) {
  constexpr int64_t T = kTile<S>, kArea = kTileArea<S>;
  const int64_t count = tiles_of<S>(n);
  S *inverse = static_cast<S*>(work), *rows = inverse + spd_tiles_size<S>(n), *diagonals = rows + kTriangularSteps * count * kArea;
  const auto column = [&](int64_t j) { return inverse + (j * count - j * (j - 1) / 2) * kArea; };  // of X: rows [j T, count T)
  const auto row = [&](int64_t s) { return rows + s * count * kArea; };                            // of L, as a column of L^T
  const auto failed = [&](int64_t order) {
    *job.info = failure<S>(job, n, order);
    fill_nan<S>(job.out, n);
  };
  bool finite = true;
  for (int64_t k = 0; k < count; k += kTriangularSteps) {
    const int64_t steps = count - k < kTriangularSteps ? count - k : kTriangularSteps;
    for_each(team, k + steps, [&](int64_t j) {
      alignas(64) S tile[kArea];
      for (int64_t s = j > k ? j - k : 0; s < steps; ++s) {
        load_tile(job.block, n, n, (k + s) * T, j * T, tile);
        S zero = 0;  // x - x is zero for finite x alone
        for (int64_t r = 0; r < T; ++r)
          for (int64_t c = 0; c < (j == k + s ? r + 1 : T); ++c) zero += tile[r * T + c] - tile[r * T + c];
        if (zero != 0) __atomic_store_n(&finite, false, __ATOMIC_RELAXED);
        transpose_tile(tile, row(s) + j * kArea);
      }
    });
    if (!finite) return failed(0);
    for (int64_t s = 0; s < steps; ++s) {
      alignas(64) S tile[kArea];
      transpose_tile(row(s) + (k + s) * kArea, tile);
      for (int64_t r = 0; r < T; ++r)
        if ((k + s) * T + r >= n) tile[r * (T + 1)] = 1;
      if (const int64_t bad = invert_triangle(tile, column(k + s))) return failed((k + s) * T + bad);
      transpose_tile(column(k + s), diagonals + s * kArea);
    }
    for_each(team, k + steps, [&](int64_t j) {
      alignas(64) S sum[kArea];
      for (int64_t s = j >= k ? j - k + 1 : 0; s < steps; ++s) {
        multiply_tile(row(s) + j * kArea, column(j), (k + s - j) * T, S(-1), static_cast<const S*>(nullptr), sum, Part::full);
        multiply_triangle(diagonals + s * kArea, sum, column(j) + (k + s - j) * kArea);
      }
    });
  }
  *job.info = 0;
  store_lower<S>([&](int64_t i, int64_t j) -> const S* { return column(j) + (i - j) * kArea; }, 0, count, n, job.out, team);
}

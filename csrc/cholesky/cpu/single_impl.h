// One block of any strides at a time: its factor L and products with (L L^T)^-1, on square tiles (spd_tiles_impl.h).
//
//   U_ki = L_kk^-1 (A_ik^T - sum_{j<k} U_jk^T U_ji)        U = L^T
//
// Floor of the factor: n^3 / 3 flops; of a solution: 2 n^2 for each right-hand side. Both are left-looking: tile row k of L^T is the
// product of two contiguous panels of the rows above it, so every sum stays in registers over its whole length. Each tile of A is loaded
// when its sum is due, and is never anywhere else.

// ---- between matrices and tiles -------------------------------------------------------------------------------------------------

// Whether the elements of a column lie closer together than those of a row
MFAC_INLINE bool by_columns(const Matrix& x) { return __builtin_llabs(x.row_stride) < __builtin_llabs(x.column_stride); }
MFAC_INLINE Matrix transposed(const Matrix& x) { return {x.data, x.dtype, x.column_stride, x.row_stride}; }

// tile = x[row :, column :] of a matrix (rows, columns), zero past its end
template <class S>
__attribute__((noinline)) void load_tile(const Matrix& x, int64_t rows, int64_t columns, int64_t row, int64_t column, S* tile) {
  if (by_columns(x)) {
    alignas(64) S other[kTileArea<S>];
    load_tile(transposed(x), columns, rows, column, row, other);
    return transpose_tile(other, tile);
  }
  const int64_t height = rows - row < kTile<S> ? rows - row : kTile<S>, width = columns - column < kTile<S> ? columns - column : kTile<S>;
  with_type<S>(x, [&](const auto* data) {
    data += row * x.row_stride + column * x.column_stride;
    for (int64_t r = 0; r < height; ++r) load_row(data + r * x.row_stride, x.column_stride, width, kTile<S>, tile + r * kTile<S>);
  });
  __builtin_memset(tile + height * kTile<S>, 0, (kTile<S> - height) * kTile<S> * sizeof(S));
}

template <class S>
__attribute__((noinline)) void store_tile(const S* tile, const Matrix& x, int64_t rows, int64_t columns, int64_t row, int64_t column) {
  if (by_columns(x)) {
    alignas(64) S other[kTileArea<S>];
    transpose_tile(tile, other);
    return store_tile(other, transposed(x), columns, rows, column, row);
  }
  const int64_t height = rows - row < kTile<S> ? rows - row : kTile<S>, width = columns - column < kTile<S> ? columns - column : kTile<S>;
  S* to = static_cast<S*>(x.data) + row * x.row_stride + column * x.column_stride;
  for (int64_t r = 0; r < height; ++r) store_row(tile + r * kTile<S>, width, x.column_stride, to + r * x.row_stride);
}

// What load_tile or, if `written`, store_tile will want
template <class S, bool written = false>
MFAC_INLINE void prefetch_tile(const Matrix& x, int64_t row, int64_t column) {
  const Matrix lines = by_columns(x) ? transposed(x) : x;
  if (by_columns(x)) std::swap(row, column);
  const int64_t size = element_size(x.dtype);
  const char* first = static_cast<const char*>(x.data) + (row * lines.row_stride + column * lines.column_stride) * size;
  for (int64_t r = 0; r < kTile<S>; ++r) __builtin_prefetch(first + r * lines.row_stride * size, written, 2);
}

// Tiles (i, j) and (j, i) of a symmetric x (n, n); of a tile on the diagonal the upper half is right.
template <class S>
MFAC_INLINE void store_symmetric_tile(const S* tile, const Matrix& x, int64_t n, int64_t i, int64_t j) {
  constexpr int64_t T = kTile<S>;
  alignas(64) S mirrored[kTileArea<S>];
  transpose_tile(tile, mirrored);
  if (i == j)
    mirror_upper(tile, mirrored);
  else
    store_tile(tile, x, n, n, i * T, j * T);
  store_tile(mirrored, x, n, n, j * T, i * T);
}

// body(0) ... body(count - 1) by a team of threads, or by this one
template <class Body>
void for_each(Team team, int64_t count, const Body& body) {
  if (team)
    team(count, [](int64_t i, const void* f) { (*static_cast<const Body*>(f))(i); }, &body);
  else
    for (int64_t i = 0; i < count; ++i) body(i);
}

// Tile row i of a symmetric matrix (n, n), from its lower triangle
template <class S>
void load_tile_row(const Matrix& x, int64_t n, int64_t i, const Tiles<S>& tiles) {
  constexpr int64_t T = kTile<S>;
  if (by_columns(x)) {
    for (int64_t j = 0; j <= i; ++j) load_tile(x, n, n, i * T, j * T, tile_at(tiles, i, j));
  } else {
    const int64_t height = n - i * T < T ? n - i * T : T;
    with_type<S>(x, [&](const auto* data) {
      for (int64_t r = 0; r < height; ++r)
        for (int64_t j = 0; j <= i; ++j)
          load_row(data + (i * T + r) * x.row_stride + j * T * x.column_stride, x.column_stride, j < i ? T : height, T,
                   tile_at(tiles, i, j) + r * T);
    });
    for (int64_t j = 0; j <= i; ++j) __builtin_memset(tile_at(tiles, i, j) + height * T, 0, (T - height) * T * sizeof(S));
  }
  alignas(64) S mirrored[kTileArea<S>];
  transpose_tile(tile_at(tiles, i, i), mirrored);
  mirror_upper(mirrored, tile_at(tiles, i, i));
}

// The tiles of block + damping I (spd_tiles_impl.h), from its lower triangle. Returns whether all is finite.
template <class S>
bool load_spd_tiles(const Job& job, int64_t n, const Tiles<S>& tiles, Team team) {
  for_each(team, tiles_of<S>(n), [&](int64_t i) { load_tile_row(job.block, n, i, tiles); });
  return spd_prepare(tiles, n, static_cast<S>(job.damping));
}

// Tile rows [begin, end) of out (n, n): tile(i, j) for j <= i, zeros elsewhere.
template <class S, class TileOf>
void store_lower(const TileOf& tile, int64_t begin, int64_t end, int64_t n, const Matrix& out, Team team) {
  for_each(team, end - begin, [&](int64_t row) {
    alignas(64) const S zeros[kTileArea<S>] = {};
    const int64_t i = begin + row;
    for (int64_t j = 0; j < tiles_of<S>(n); ++j) store_tile(j <= i ? tile(i, j) : zeros, out, n, n, i * kTile<S>, j * kTile<S>);
  });
}

// ---- the factor -----------------------------------------------------------------------------------------------------------------

// Column panel j of U = L^T: rows [0, (j + 1) T) of columns [j T, (j + 1) T), contiguous.
template <class S>
MFAC_INLINE S* column_panel(S* panels, int64_t j) {
  return panels + j * (j + 1) / 2 * kTileArea<S>;
}

// (A_ik)^T of A = block + damping I, from its lower triangle; of a tile on the diagonal only the upper half is right. The padding is an
// identity.
template <class S>
MFAC_INLINE void load_damped_tile(const Job& job, int64_t n, int64_t i, int64_t k, S* tile) {
  constexpr int64_t T = kTile<S>;
  load_tile(transposed(job.block), n, n, k * T, i * T, tile);
  if (i == k)
    for (int64_t r = 0; r < T; ++r) tile[r * (T + 1)] = k * T + r < n ? tile[r * (T + 1)] + static_cast<S>(job.damping) : S(1);
}

// The column panels of U, with zeros below its diagonal. inverse_of(k) and upper_of(k) are where L_kk^-1 and its transpose go. Returns 0,
// or what the job is to report.
template <class S, class InverseOf, class UpperOf>
int32_t factor_columns(const Job& job, int64_t n, S* panels, const InverseOf& inverse_of, const UpperOf& upper_of, Team team) {
  constexpr int64_t T = kTile<S>, kArea = kTileArea<S>;
  for (int64_t k = 0; k < tiles_of<S>(n); ++k) {
    alignas(64) S diagonal[kArea], mirrored[kArea];
    S *above = column_panel(panels, k), *own = above + k * kArea;
    load_damped_tile(job, n, k, k, diagonal);
    multiply_tile(above, above, k * T, S(-1), diagonal, diagonal, Part::upper);
    if (const int64_t bad = factor_tile(diagonal, inverse_of(k))) return failure<S>(job, n, k * T + bad);
    transpose_tile(inverse_of(k), upper_of(k));
    // Of what is left of A_kk the upper half is all there is, and all of U_kk that is not zero.
    transpose_tile(diagonal, mirrored);
    mirror_upper(diagonal, mirrored);
    multiply_triangle(upper_of(k), mirrored, own);
    for (int64_t r = 1; r < T; ++r) __builtin_memset(own + r * T, 0, r * sizeof(S));
    for_each(team, tiles_of<S>(n) - k - 1, [&](int64_t right) {
      alignas(64) S tile[kArea];
      S* panel = column_panel(panels, k + 1 + right);
      load_damped_tile(job, n, k + 1 + right, k, tile);
      prefetch_tile<S>(job.block, (k + 1 + right) * T, (k + 1) * T);
      multiply_tile(above, panel, k * T, S(-1), tile, tile, Part::full);
      multiply_triangle(upper_of(k), tile, panel + k * kArea);
    });
  }
  return 0;
}

template <class S>
int64_t factor_work(const Job&, int64_t n) {
  return (spd_tiles_size<S>(n) + 2 * kTileArea<S>)*static_cast<int64_t>(sizeof(S));
}

template <class S>
void factor(const Job& job, int64_t n, void* work, Team team) {
  constexpr int64_t T = kTile<S>, kArea = kTileArea<S>;
  S *panels = static_cast<S*>(work), *inverse = panels + spd_tiles_size<S>(n), *upper = inverse + kArea;
  const Matrix& out = job.out;
  *job.info = factor_columns(job, n, panels, [=](int64_t) { return inverse; }, [=](int64_t) { return upper; }, team);
  if (*job.info) return fill_nan<S>(out, n);
  for_each(team, tiles_of<S>(n), [&](int64_t i) {
    alignas(64) S tile[kArea];
    for (int64_t j = 0; j < tiles_of<S>(n); ++j) {
      if (j <= i)
        transpose_tile(column_panel(panels, i) + j * kArea, tile);
      else if (j == i + 1)
        __builtin_memset(tile, 0, sizeof(tile));
      store_tile(tile, out, n, n, i * T, j * T);
    }
  });
}

// ---- solutions ------------------------------------------------------------------------------------------------------------------

template <class S>
int64_t solve_work(int64_t n) {
  return (2 * spd_tiles_size<S>(n) + tiles_of<S>(n) * kTileArea<S>)*static_cast<int64_t>(sizeof(S));
}

// x <- L^-1 x, tiles, given L^T; or L^-T x, given L. On the diagonal of either stand the reciprocals of L's.
template <bool transposed, class S>
__attribute__((noinline)) void substitute(const S* triangle, S* x) {
  constexpr int64_t T = kTile<S>, R = kTileRows;
  for (int64_t step = 0; step < T; step += R) {
    const int64_t first = transposed ? T - R - step : step, solved = transposed ? first + R : 0;
    Vec<S> sum[R][2] = {}, row[R][2];
    multiply_rows(triangle + solved * T + first, T, x + solved * T, step, sum);
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      const int r = transposed ? R - 1 - i : i;
      const S* factors = triangle + (first + r) * T + first;
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) {
        S* at = x + (first + r) * T + v * kLanesOf<S>;
        row[r][v] = (load<Vec<S>>(at) - sum[r][v]) * splat(factors[r]);
        store(at, row[r][v]);
      }
#pragma GCC unroll 8
      for (int q = transposed ? 0 : r + 1; q < (transposed ? r : R); ++q)
#pragma GCC unroll 2
        for (int v = 0; v < 2; ++v) sum[q][v] += splat(factors[q]) * row[r][v];
    }
  }
}

template <class S>
void solve(const Matrix& factor, int64_t n, const Matrix& x, int64_t columns, void* work) {
  constexpr int64_t T = kTile<S>, kArea = kTileArea<S>;
  const int64_t count = tiles_of<S>(n);
  S *panels = static_cast<S*>(work), *lower = panels + spd_tiles_size<S>(n), *solution = lower + spd_tiles_size<S>(n);
  // Column panel j of L: rows [j T, count T), contiguous.
  const auto lower_panel = [&](int64_t j) { return lower + (j * count - j * (j - 1) / 2) * kArea; };
  for (int64_t i = 0; i < count; ++i)
    for (int64_t j = 0; j <= i; ++j) {
      S* tile = lower_panel(j) + (i - j) * kArea;
      load_tile(factor, n, n, i * T, j * T, tile);
      if (i == j)
        for (int64_t r = 0; r < T; ++r) tile[r * (T + 1)] = i * T + r < n ? 1 / tile[r * (T + 1)] : 1;
      transpose_tile(tile, column_panel(panels, i) + j * kArea);
    }
  for (int64_t first = 0; first < columns; first += T) {
    for (int64_t i = 0; i < count; ++i) {
      S *tile = solution + i * kArea, *u = column_panel(panels, i);
      load_tile(x, n, columns, i * T, first, tile);
      multiply_tile(u, solution, i * T, S(-1), tile, tile, Part::full);
      substitute<false>(u + i * kArea, tile);
    }
    for (int64_t i = count - 1; i >= 0; --i) {
      S *tile = solution + i * kArea, *l = lower_panel(i);
      multiply_tile(l + kArea, tile + kArea, (count - 1 - i) * T, S(-1), tile, tile, Part::full);
      substitute<true>(l, tile);
      store_tile(tile, x, n, columns, i * T, first);
    }
  }
}

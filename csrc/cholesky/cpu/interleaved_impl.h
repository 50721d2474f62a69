// Inverses, factors and inverses of factors of as many small blocks at once as a vector has lanes, one block to a lane.
//
// The lower triangle of all of them is kept as tiles (i, j), j <= i, of kLaneTile x kLaneTile vectors; what a tile on the diagonal holds
// above it is not read. Three left-looking passes, in place:
//
//   L_ij = (A_ij - sum_{k<j} L_ik L_jk^T) L_jj^-T       Y_ij = -Y_ii sum_{j<=k<i} L_ik Y_kj, Y = L^-1       X_ij = sum_{k>=i} Y_ki^T Y_kj
//
// Floor: n^3 flops for each block, n^2/2 elements read and n^2 written. Fast because no lane waits for another: the factorisation of one
// small block is a chain of divisions, this is n^3/2 multiply-adds of whole vectors, every sum in a register over its whole length. What
// it costs is the way in and out: n^2 vectors transposed in registers.

constexpr int64_t kLaneTile = 4;
constexpr int kLaneColumns = MFAC_ISA_LEVEL == 2 ? 4 : 2;  // of a tile, computed at a time: as many sums as there are registers for

template <class S>
constexpr int64_t kLaneArea = kLaneTile * kLaneTile * kLanesOf<S>;
constexpr int64_t lane_tiles(int64_t n) { return (n + kLaneTile - 1) / kLaneTile; }
template <class S>
MFAC_INLINE S* lane_tile(S* tiles, int64_t i, int64_t j) {
  return tiles + (i * (i + 1) / 2 + j) * kLaneArea<S>;
}
template <class S>
MFAC_INLINE S* entry(S* tile, int64_t r, int64_t c) {
  return tile + (r * kLaneTile + c) * kLanesOf<S>;
}

// ---- products of tiles ----------------------------------------------------------------------------------------------------------

enum class Form { a_bt, a_b, at_b };    // A B^T, A B, A^T B
enum class Lower { none, a, b, both };  // operands that are lower triangular

// sum += the product's columns [first, first + kLaneColumns)
template <Form form, Lower lower = Lower::none, class S>
MFAC_INLINE void multiply_lanes(const S* a, const S* b, int first, Vec<S> (&sum)[kLaneTile][kLaneColumns]) {
#pragma GCC unroll 4
  for (int k = 0; k < kLaneTile; ++k) {
    Vec<S> y[kLaneColumns];
#pragma GCC unroll 4
    for (int c = 0; c < kLaneColumns; ++c)
      y[c] = in_register(load<Vec<S>>(form == Form::a_bt ? entry(b, first + c, k) : entry(b, k, first + c)));
#pragma GCC unroll 4
    for (int r = 0; r < kLaneTile; ++r) {
      if ((lower == Lower::a || lower == Lower::both) && (form == Form::at_b ? r > k : k > r)) continue;
      const Vec<S> x = in_register(load<Vec<S>>(form == Form::at_b ? entry(a, k, r) : entry(a, r, k)));
#pragma GCC unroll 4
      for (int c = 0; c < kLaneColumns; ++c) {
        if ((lower == Lower::b || lower == Lower::both) && (form == Form::a_bt ? k > first + c : first + c > k)) continue;
        sum[r][c] += x * y[c];
      }
    }
  }
}

// out = base + sign * the sums that accumulate(first column, sums) makes; base may be null (zero).
template <class S, class Accumulate>
MFAC_INLINE void sum_lanes(const S* base, S sign, S* out, const Accumulate& accumulate) {
#pragma GCC unroll 2
  for (int first = 0; first < kLaneTile; first += kLaneColumns) {
    Vec<S> sum[kLaneTile][kLaneColumns] = {};
    accumulate(first, sum);
#pragma GCC unroll 4
    for (int r = 0; r < kLaneTile; ++r)
#pragma GCC unroll 4
      for (int c = 0; c < kLaneColumns; ++c) {
        const Vec<S> from = base ? load<Vec<S>>(entry(base, r, first + c)) : Vec<S>{};
        store(entry(out, r, first + c), sign > 0 ? from + sum[r][c] : from - sum[r][c]);
      }
  }
}

// ---- the passes -----------------------------------------------------------------------------------------------------------------

// A diagonal tile A = L L^T: its lower half becomes L with 1 / L_cc in place of L_cc. Lanes of `info` that are 0 get 1 + the row of a
// pivot that is not positive and finite, which counts as 1 from there on. No square root stands between one pivot and the next.
template <class S, class I>
MFAC_INLINE void factor_lane_tile(S* tile, int64_t row, I& info) {
  using V = Vec<S>;
  V x[kLaneTile][kLaneTile], pivot[kLaneTile], reciprocal[kLaneTile];
#pragma GCC unroll 4
  for (int r = 0; r < kLaneTile; ++r)
#pragma GCC unroll 4
    for (int c = 0; c <= r; ++c) x[r][c] = load<V>(entry(tile, r, c));
#pragma GCC unroll 4
  for (int c = 0; c < kLaneTile; ++c) {
    const auto good = (x[c][c] > V{}) & (x[c][c] < splat(static_cast<S>(__builtin_inf())));
    info |= ~good & (info == I{}) & (I{} + static_cast<decltype(info[0] + 0)>(row + c + 1));
    pivot[c] = good ? x[c][c] : splat(S(1));
    reciprocal[c] = splat(S(1)) / pivot[c];
#pragma GCC unroll 4
    for (int r = c + 1; r < kLaneTile; ++r) {
      const V scaled = x[r][c] * reciprocal[c];
#pragma GCC unroll 4
      for (int d = c + 1; d <= r; ++d) x[r][d] -= scaled * x[d][c];
    }
  }
#pragma GCC unroll 4
  for (int c = 0; c < kLaneTile; ++c) {
    const V scale = vector_sqrt(pivot[c]) * reciprocal[c];
    store(entry(tile, c, c), scale);
#pragma GCC unroll 4
    for (int r = c + 1; r < kLaneTile; ++r) store(entry(tile, r, c), x[r][c] * scale);
  }
}

// tile <- tile L^-T, the diagonal tile as factor_lane_tile leaves it
template <class S>
MFAC_INLINE void solve_lane_tile(const S* diagonal, S* tile) {
  using V = Vec<S>;
#pragma GCC unroll 4
  for (int r = 0; r < kLaneTile; ++r) {
    V x[kLaneTile];
#pragma GCC unroll 4
    for (int c = 0; c < kLaneTile; ++c) {
      x[c] = load<V>(entry(tile, r, c));
#pragma GCC unroll 4
      for (int k = 0; k < c; ++k) x[c] -= x[k] * load<V>(entry(diagonal, c, k));
      x[c] *= load<V>(entry(diagonal, c, c));
      store(entry(tile, r, c), x[c]);
    }
  }
}

template <class S, class I>
void factor_lanes(S* tiles, int64_t count, I& info) {
  for (int64_t j = 0; j < count; ++j)
    for (int64_t i = j; i < count; ++i) {
      S* tile = lane_tile(tiles, i, j);
      const S *a = lane_tile(tiles, i, 0), *b = lane_tile(tiles, j, 0);
      sum_lanes(tile, S(-1), tile, [&](int first, auto& sum) {
        for (int64_t k = 0; k < j; ++k) multiply_lanes<Form::a_bt>(a + k * kLaneArea<S>, b + k * kLaneArea<S>, first, sum);
      });
      if (i == j)
        factor_lane_tile(tile, i * kLaneTile, info);
      else
        solve_lane_tile(lane_tile(tiles, j, j), tile);
    }
}

// A diagonal tile of L (1 / L_cc on the diagonal) becomes its inverse.
template <class S>
MFAC_INLINE void invert_lane_tile(S* tile) {
  using V = Vec<S>;
  V y[kLaneTile][kLaneTile];
#pragma GCC unroll 4
  for (int c = 0; c < kLaneTile; ++c) {
    y[c][c] = load<V>(entry(tile, c, c));
#pragma GCC unroll 4
    for (int r = c + 1; r < kLaneTile; ++r) {
      V sum = {};
#pragma GCC unroll 4
      for (int k = c; k < r; ++k) sum -= load<V>(entry(tile, r, k)) * y[k][c];
      y[r][c] = sum * load<V>(entry(tile, r, r));
    }
  }
#pragma GCC unroll 4
  for (int r = 1; r < kLaneTile; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < r; ++c) store(entry(tile, r, c), y[r][c]);
}

template <class S>
void invert_lanes(S* tiles, int64_t count) {
  S sums[kLaneArea<S>];
  for (int64_t i = 0; i < count; ++i) {
    S *row = lane_tile(tiles, i, 0), *diagonal = lane_tile(tiles, i, i);
    invert_lane_tile(diagonal);
    for (int64_t j = 0; j < i; ++j) {
      sum_lanes<S>(nullptr, S(1), sums, [&](int first, auto& sum) {
        multiply_lanes<Form::a_b, Lower::b>(row + j * kLaneArea<S>, lane_tile(tiles, j, j), first, sum);
        for (int64_t k = j + 1; k < i; ++k) multiply_lanes<Form::a_b>(row + k * kLaneArea<S>, lane_tile(tiles, k, j), first, sum);
      });
      sum_lanes<S>(nullptr, S(-1), row + j * kLaneArea<S>,
                   [&](int first, auto& sum) { multiply_lanes<Form::a_b, Lower::a>(diagonal, sums, first, sum); });
    }
  }
}

template <class S>
void multiply_transposed_lanes(S* tiles, int64_t count) {
  S sums[kLaneArea<S>];
  for (int64_t i = 0; i < count; ++i)
    for (int64_t j = 0; j <= i; ++j) {
      S* tile = lane_tile(tiles, i, j);
      sum_lanes<S>(nullptr, S(1), i == j ? sums : tile, [&](int first, auto& sum) {
        if (i == j)
          multiply_lanes<Form::at_b, Lower::both>(tile, tile, first, sum);
        else
          multiply_lanes<Form::at_b, Lower::a>(lane_tile(tiles, i, i), tile, first, sum);
        for (int64_t k = i + 1; k < count; ++k) multiply_lanes<Form::at_b>(lane_tile(tiles, k, i), lane_tile(tiles, k, j), first, sum);
      });
      if (i == j)
        for (int64_t v = 0; v < kLaneArea<S>; v += kLanesOf<S>) store(tile + v, load<Vec<S>>(sums + v));
    }
}

// ---- the way in and out ---------------------------------------------------------------------------------------------------------

// Where the rows of a job's matrix lie; `stride` apart.
template <class S>
struct Lane {
  S* rows;
  int64_t stride;
};

// The jobs' blocks as rows of S's: where they are, or copied to `staged` (a square of n^2 for each lane).
template <class S>
void stage_lanes(const Job* jobs, int64_t n, S* staged, Lane<S>* lanes) {
  for (int l = 0; l < kLanesOf<S>; ++l, staged += n * n) {
    const Matrix& block = jobs[l].block;
    if (block.column_stride == 1 && block.dtype == kDTypeOf<S>) {
      lanes[l] = {static_cast<S*>(block.data), block.row_stride};
    } else {
      lanes[l] = {staged, n};
      with_type<S>(block, [&](const auto* data) {
        for (int64_t r = 0; r < n; ++r)
          for (int64_t c = 0; c <= r; c += kLanesOf<S>) {
            const int64_t width = r + 1 - c < kLanesOf<S> ? r + 1 - c : kLanesOf<S>;
            S row[kLanesOf<S>];
            load_row(data + r * block.row_stride + c * block.column_stride, block.column_stride, width, kLanesOf<S>, row);
            store_row(row, width, 1, staged + r * n + c);
          }
      });
    }
  }
}

// Lower triangles into tiles, damping added, the padding an identity
template <class S>
void gather_lanes(const Job* jobs, const Lane<S>* lanes, int64_t n, S* tiles) {
  using V = Vec<S>;
  constexpr int W = kLanesOf<S>;
  V damping;
  for (int l = 0; l < W; ++l) damping[l] = static_cast<S>(jobs[l].damping);
  for (int64_t i = 0; i < n; ++i) {
    S* row = entry(lane_tile(tiles, i / kLaneTile, 0), i % kLaneTile, 0);
    for (int64_t column = 0; column <= i; column += W) {
      V x[W];
#pragma GCC unroll 16
      for (int l = 0; l < W; ++l) x[l] = load_upto(lanes[l].rows + i * lanes[l].stride + column, n - column);
      transpose_vectors<V, W>(x);
      S* to = row + column / kLaneTile * kLaneArea<S>;
#pragma GCC unroll 4
      for (int q = 0; q < W / kLaneTile; ++q, to += kLaneArea<S>)
        if (column + q * kLaneTile <= i) {
#pragma GCC unroll 4
          for (int c = 0; c < kLaneTile; ++c) store(to + c * W, x[q * kLaneTile + c]);
        }
    }
    S* diagonal = entry(lane_tile(tiles, i / kLaneTile, i / kLaneTile), i % kLaneTile, i % kLaneTile);
    store(diagonal, load<V>(diagonal) + damping);
  }
  for (int64_t i = n; i % kLaneTile != 0; ++i)
    for (int64_t j = 0; j <= i; ++j)
      store(entry(lane_tile(tiles, i / kLaneTile, j / kLaneTile), i % kLaneTile, j % kLaneTile), splat(S(i == j)));
}

// Rows of the results: of symmetric tiles, whose diagonal ones are valid in both halves; or, with zeros above the diagonal tiles.
template <bool symmetric, class S>
void scatter_lanes(S* tiles, const Lane<S>* lanes, int64_t n) {
  using V = Vec<S>;
  constexpr int W = kLanesOf<S>;
  const int64_t count = lane_tiles(n);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t column = 0; column < n; column += W) {
      const int64_t I = i / kLaneTile;
      V x[W];
#pragma GCC unroll 4
      for (int q = 0; q < W / kLaneTile; ++q) {
        const int64_t J = column / kLaneTile + q;
        const S* from = J <= I ? entry(lane_tile(tiles, I, J), i % kLaneTile, 0) : entry(lane_tile(tiles, J, I), 0, i % kLaneTile);
        const int64_t step = J <= I ? W : kLaneTile * W;
        const bool zero = symmetric ? J >= count : J > I;
#pragma GCC unroll 4
        for (int c = 0; c < kLaneTile; ++c) x[q * kLaneTile + c] = zero ? V{} : load<V>(from + c * step);
      }
      transpose_vectors<V, W>(x);
#pragma GCC unroll 16
      for (int l = 0; l < W; ++l) store_upto(lanes[l].rows + i * lanes[l].stride + column, x[l], n - column);
    }
}

// The results into the jobs' matrices, by way of `staged` where those are not rows of S's; NaN for failed jobs
template <bool symmetric, class S>
void write_lanes(S* tiles, const Job* jobs, int64_t n, S* staged) {
  constexpr int W = kLanesOf<S>;
  Lane<S> lanes[W];
  for (int l = 0; l < W; ++l) {
    const Matrix& out = jobs[l].out;
    lanes[l] = out.column_stride == 1 ? Lane<S>{static_cast<S*>(out.data), out.row_stride} : Lane<S>{staged + l * n * n, n};
  }
  scatter_lanes<symmetric>(tiles, lanes, n);
  for (int l = 0; l < W; ++l) {
    const Matrix& out = jobs[l].out;
    if (*jobs[l].info)
      fill_nan<S>(out, n);
    else if (out.column_stride != 1)
      for (int64_t r = 0; r < n; ++r)
        store_row(lanes[l].rows + r * n, n, out.column_stride, static_cast<S*>(out.data) + r * out.row_stride);
  }
}

// ---- the kernels ----------------------------------------------------------------------------------------------------------------

template <class S>
int64_t lanes_work(int64_t n) {
  const int64_t count = lane_tiles(n);
  return (count * (count + 1) / 2 * kLaneArea<S> + kLanesOf<S> * n * n) * static_cast<int64_t>(sizeof(S));
}

// The lower triangles of the factors, 1 / L_cc on the diagonal. Returns memory for write_lanes. Codes are set while the blocks are there.
template <class S>
S* load_and_factor_lanes(const Job* jobs, int64_t n, S* tiles) {
  const int64_t count = lane_tiles(n);
  S* staged = tiles + count * (count + 1) / 2 * kLaneArea<S>;
  Lane<S> lanes[kLanesOf<S>];
  stage_lanes(jobs, n, staged, lanes);
  gather_lanes(jobs, lanes, n, tiles);
  decltype(Vec<S>{} > Vec<S>{}) info = {};
  factor_lanes(tiles, count, info);
  for (int l = 0; l < kLanesOf<S>; ++l) *jobs[l].info = info[l] ? failure<S>(jobs[l], n, info[l]) : 0;
  return staged;
}

template <class S>
void inverse_of_lanes(const Job* jobs, int64_t n, void* work) {
  S *tiles = static_cast<S*>(work), *staged = load_and_factor_lanes(jobs, n, tiles);
  invert_lanes(tiles, lane_tiles(n));
  multiply_transposed_lanes(tiles, lane_tiles(n));
  write_lanes<true>(tiles, jobs, n, staged);
}

// Above the diagonal zeros
template <class S>
void clear_above_lanes(S* tiles, int64_t n) {
  for (int64_t i = 0; i < lane_tiles(n); ++i)
    for (int64_t r = 0; r < kLaneTile; ++r)
      __builtin_memset(entry(lane_tile(tiles, i, i), r, r) + kLanesOf<S>, 0, (kLaneTile - 1 - r) * kLanesOf<S> * sizeof(S));
}

// Every element of the diagonal becomes its reciprocal.
template <class S>
void invert_diagonal_of_lanes(S* tiles, int64_t n) {
  for (int64_t i = 0; i < lane_tiles(n) * kLaneTile; ++i) {
    S* diagonal = entry(lane_tile(tiles, i / kLaneTile, i / kLaneTile), i % kLaneTile, i % kLaneTile);
    store(diagonal, splat(S(1)) / load<Vec<S>>(diagonal));
  }
}

template <class S>
void factor_of_lanes(const Job* jobs, int64_t n, void* work) {
  S *tiles = static_cast<S*>(work), *staged = load_and_factor_lanes(jobs, n, tiles);
  invert_diagonal_of_lanes(tiles, n);
  clear_above_lanes(tiles, n);
  write_lanes<false>(tiles, jobs, n, staged);
}

template <class S>
void inverse_factor_of_lanes(const Job* jobs, int64_t n, void* work) {
  S *tiles = static_cast<S*>(work), *staged = load_and_factor_lanes(jobs, n, tiles);
  invert_lanes(tiles, lane_tiles(n));
  clear_above_lanes(tiles, n);
  write_lanes<false>(tiles, jobs, n, staged);
}

template <class S>
void triangular_inverse_of_lanes(const Job* jobs, int64_t n, void* work) {
  using V = Vec<S>;
  const int64_t count = lane_tiles(n);
  S *tiles = static_cast<S*>(work), *staged = tiles + count * (count + 1) / 2 * kLaneArea<S>;
  Lane<S> lanes[kLanesOf<S>];
  stage_lanes(jobs, n, staged, lanes);
  gather_lanes(jobs, lanes, n, tiles);
  V zero = {};  // x - x is zero for finite x alone
  int32_t first_zero[kLanesOf<S>] = {};
  for (int64_t i = 0; i < n; ++i) {
    const S* row = entry(lane_tile(tiles, i / kLaneTile, 0), i % kLaneTile, 0);
    V x = {};
    for (int64_t j = 0; j <= i; ++j) {
      x = load<V>(row + j / kLaneTile * kLaneArea<S> + j % kLaneTile * kLanesOf<S>);
      zero += x - x;
    }
    for (int l = 0; l < kLanesOf<S>; ++l)
      if (x[l] == 0 && first_zero[l] == 0) first_zero[l] = static_cast<int32_t>(i + 1);
  }
  for (int l = 0; l < kLanesOf<S>; ++l) *jobs[l].info = zero[l] == 0 ? first_zero[l] : -1;
  invert_diagonal_of_lanes(tiles, n);
  invert_lanes(tiles, count);
  clear_above_lanes(tiles, n);
  write_lanes<false>(tiles, jobs, n, staged);
}

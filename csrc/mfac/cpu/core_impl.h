// The m x m core of a sliding window: a float64 Cholesky factor L L^T = K = shift I + G G^T, kept in the order of age in O(m^2).
//
// Storage: factor[q * m + p] = L[p, q] in *slot* coordinates: p and q are slots of the ring, and "lower" means p newer than q. A slot
// never moves, so nothing is ever shifted; a column is contiguous but for one wrap at the end of the ring.
//
//   drop the oldest (column v below its diagonal)   L' L'^T = L L^T + v v^T     a rank-1 *update*: Givens rotations, always stable
//   append the newest (Gram row s)                  l = L'^-1 s,  L_nn = sqrt(s_n + shift - |l|^2)
//   K^-1 e_newest                                   L^-T e_newest / L_nn        one back substitution
//
// Floor: the factor's triangle read and written once, m^2/2 doubles each way, and read once more for the back substitution: it lives
// in L2 or L3. Fast because the update and the forward substitution share one sweep, four columns at a time, the new row stored on the
// way. On one thread: dealt to two cores the sweep was slower by half, every line it writes moving between their caches.
// K - shift I is positive semidefinite, so no Schur complement is below shift: pivots are held to that bound, and to the rounding of
// the sum they come from, and can never fail however nearly dependent the gradients are.

constexpr int kColumns = 4;

// The rows of the ring that are newer than slot position `first`, as at most two contiguous runs.
// Positions count from `oldest`; slot = position wrapped.
template <class Body>
MFAC_INLINE void for_each_run(int64_t oldest, int64_t first, int64_t count, int64_t m, Body body) {
  const int64_t begin = oldest + first, end = oldest + count;
  if (begin < m) body(begin, end < m ? end : m);
  if (end > m) body(begin > m ? begin - m : 0, end - m);
}

MFAC_INLINE int64_t wrap(int64_t slot, int64_t m) { return slot < m ? slot : slot - m; }

// One column of the factor meets one row: Givens rotation against v (if kUpdate), then the forward substitution of b.
template <bool kUpdate, class V, class Scalar>
MFAC_INLINE void rotate(V& l, V& v, V& b, Scalar cosine, Scalar sine, Scalar y) {
  if constexpr (kUpdate) {
    const V rotated = cosine * l + sine * v;
    v = cosine * v - sine * l;
    l = rotated;
  }
  b -= y * l;
}

// Columns at positions [j, j + n) of the `count` positions from `oldest`: update by v v^T (if kUpdate), and b <- L^-1 b, stored as row
// `slot` of L (if slot >= 0) while the columns are at hand.
template <bool kUpdate, int n>
MFAC_INLINE void sweep_columns(double* factor, int64_t m, int64_t oldest, int64_t j, int64_t count, double* v, double* b, int64_t slot) {
  double* column[n];
  double cosine[n], sine[n], y[n];
  for (int c = 0; c < n; ++c) {
    const int64_t p = wrap(oldest + j + c, m);
    column[c] = factor + p * m;
    double vp = kUpdate ? v[p] : 0, bp = b[p];
    for (int e = 0; e < c; ++e) rotate<kUpdate>(column[e][p], vp, bp, cosine[e], sine[e], y[e]);
    double& pivot = column[c][p];
    if constexpr (kUpdate) {
      const double norm = __builtin_sqrt(pivot * pivot + vp * vp);
      cosine[c] = pivot / norm;
      sine[c] = vp / norm;
      pivot = norm;
    }
    b[p] = y[c] = bp / pivot;
    if (slot >= 0) column[c][slot] = y[c];
  }
  for_each_run(oldest, j + n, count, m, [&](int64_t p, int64_t end) {
    for (; p + kLanes <= end; p += kLanes) {
      f64v vp = kUpdate ? load<f64v>(v + p) : f64v{}, bp = load<f64v>(b + p);
#pragma GCC unroll 4
      for (int c = 0; c < n; ++c) {
        prefetch(column[c] + n * m + p);  // the next columns
        f64v l = load<f64v>(column[c] + p);
        rotate<kUpdate>(l, vp, bp, cosine[c], sine[c], y[c]);
        if (kUpdate) store(column[c] + p, l);
      }
      if (kUpdate) store(v + p, vp);
      store(b + p, bp);
    }
    for (; p < end; ++p) {
      double vp = kUpdate ? v[p] : 0;
      for (int c = 0; c < n; ++c) rotate<kUpdate>(column[c][p], vp, b[p], cosine[c], sine[c], y[c]);
      if (kUpdate) v[p] = vp;
    }
  });
}

template <bool kUpdate>
void sweep(double* factor, int64_t m, int64_t oldest, int64_t count, double* v, double* b, int64_t slot) {
  int64_t j = 0;
  for (; j + kColumns <= count; j += kColumns) sweep_columns<kUpdate, kColumns>(factor, m, oldest, j, count, v, b, slot);
  for (; j < count; ++j) sweep_columns<kUpdate, 1>(factor, m, oldest, j, count, v, b, slot);
}

// x <- L^-T x: columns at positions [j, j + n), newest columns first.
template <int n>
MFAC_INLINE void back_columns(const double* factor, int64_t m, int64_t oldest, int64_t j, int64_t count, double* x) {
  const double* column[n];
  double sum[n] = {};
  for (int c = 0; c < n; ++c) column[c] = factor + wrap(oldest + j + c, m) * m;
  f64v sums[n] = {};
  for_each_run(oldest, j + n, count, m, [&](int64_t p, int64_t end) {
    for (; p + kLanes <= end; p += kLanes) {
      const f64v xp = load<f64v>(x + p);
#pragma GCC unroll 4
      for (int c = 0; c < n; ++c) sums[c] += load<f64v>(column[c] + p) * xp;
    }
    for (; p < end; ++p)
      for (int c = 0; c < n; ++c) sum[c] += column[c][p] * x[p];
  });
  for (int c = n - 1; c >= 0; --c) {
    const int64_t p = wrap(oldest + j + c, m);
    double rest = sum[c] + horizontal_sum(sums[c]);
    for (int e = c + 1; e < n; ++e) {
      const int64_t q = wrap(oldest + j + e, m);
      rest += column[c][q] * x[q];
    }
    x[p] = (x[p] - rest) / column[c][p];
  }
}

void back_substitute(const double* factor, int64_t m, int64_t oldest, int64_t count, double* x) {
  int64_t j = count;
  for (; j >= kColumns; j -= kColumns) back_columns<kColumns>(factor, m, oldest, j - kColumns, count, x);
  for (; j > 0; --j) back_columns<1>(factor, m, oldest, j - 1, count, x);
}

void replace(double* factor, int64_t m, int64_t slot, int64_t older, bool drop_oldest, const double* dots, double shift, double* work) {
  double *v = work, *b = work + m;
  const int64_t oldest = wrap(slot + m - older, m);
  __builtin_memcpy(b, dots, m * sizeof(double));
  if (drop_oldest) {
    __builtin_memcpy(v, factor + slot * m, m * sizeof(double));
    sweep<true>(factor, m, oldest, older, v, b, slot);
  } else {
    sweep<false>(factor, m, oldest, older, v, b, slot);
  }
  double pivot = dots[slot] + shift;
  const double rounding = m * 0x1p-52 * pivot, least = shift > rounding ? shift : rounding;
  for_each_run(oldest, 0, older, m, [&](int64_t q, int64_t end) {
    for (; q < end; ++q) pivot -= b[q] * b[q];
  });
  factor[slot * m + slot] = __builtin_sqrt(pivot > least ? pivot : least);
}

void solve(const double* factor, int64_t m, int64_t oldest, int64_t count, double shift, double* x) {
  sweep<false>(const_cast<double*>(factor), m, oldest, count, nullptr, x, -1);  // without an update the factor is only read
  back_substitute(factor, m, oldest, count, x);
  for_each_run(oldest, count, m, m, [&](int64_t p, int64_t end) {
    for (; p < end; ++p) x[p] /= shift;
  });
}

void solve_newest(const double* factor, int64_t m, int64_t oldest, int64_t count, double* x) {
  const int64_t newest = wrap(oldest + count - 1, m);
  for (int64_t p = 0; p < m; ++p) x[p] = 0;
  x[newest] = 1 / factor[newest * m + newest];
  back_substitute(factor, m, oldest, count, x);
}

constexpr CoreKernels kCoreKernels = {replace, solve, solve_newest};

// The two passes over a window of gradients G (m, d), a chunk of columns at a time.
//
//   dots     D[v, i] = sum_j G[i, j] X[v, j]      (k, m)    pass 1
//   combine  Y[v, j] = sum_i C[v, i] G[i, j]      (k, d)    pass 2
//
// Floor: both are bound by reading G once, m d sizeof(T) bytes; 2 k m d flops hide behind it up to about k = 8.
// What makes them fast: several rows in flight and the next rows prefetched, so that memory never waits for the end of a row; the
// chunk of X or Y stays in L2; elements are widened to float64 in registers. At DRAM speed the float64 arithmetic costs nothing, and
// it is what lets F^-1 x = (x - G^T K^-1 G x) / damping keep its digits through the subtraction.

static_assert(kLanes <= kWindowPad);

// Vectors of columns taken at a time: of one x a whole line of the cache in float32, for which one prefetch is then enough; of four as many
// as leave their sums in registers.
template <int kVectors>
constexpr int kStepVectors = kVectors == 1 ? 16 / kLanes : 3;

// The lines of kCount vectors of kRows rows
template <int kRows, int kCount, class T>
MFAC_INLINE void prefetch_rows(const T* p, int64_t stride) {
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int i = 0; i < kCount * kLanes; i += 64 / sizeof(T)) prefetch(p + r * stride + i);
}

// Of each of the vectors, chunks apart in memory, the columns from p on
template <int kVectors, int kTogether>
MFAC_INLINE void load_columns(const double* p, f64v (&v)[kVectors][kTogether]) {
#pragma GCC unroll 4
  for (int i = 0; i < kVectors; ++i)
#pragma GCC unroll 4
    for (int q = 0; q < kTogether; ++q) v[i][q] = load<f64v>(p + i * kWindowChunk + q * kLanes);
}

// kRows x kVectors dot products over n columns. `ahead` rows further down are prefetched.
template <class T, int kRows, int kVectors>
MFAC_INLINE void dots_tile(const T* g, int64_t stride, int64_t n, const double* x, double* dots, int64_t rows, int64_t ahead) {
  constexpr int kCount = kStepVectors<kVectors>;
  f64v sum[kRows][kVectors] = {};
  int64_t j = 0;
  const auto step = [&]<int kTogether>() {
    f64v xv[kVectors][kTogether];
    load_columns(x + j, xv);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      f64v gv[kTogether];
      widen_vectors(g + r * stride + j, gv);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v)
#pragma GCC unroll 4
        for (int q = 0; q < kTogether; ++q) sum[r][v] += gv[q] * xv[v][q];
    }
    j += kTogether * kLanes;
  };
  while (j + kCount * kLanes <= n) {
    prefetch_rows<kRows, kCount>(g + j + ahead, stride);
    if constexpr (kVectors == 1) {
      step.template operator()<kCount>();
    } else {
#pragma GCC unroll 4
      for (int q = 0; q < kCount; ++q) step.template operator()<1>();
    }
  }
  while (j + kLanes <= n) step.template operator()<1>();
  if (j < n) {  // X is zero past n
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const f64v gv = widen_first(g + r * stride + j, n - j);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[r][v] += gv * load<f64v>(x + v * kWindowChunk + j);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) dots[v * rows + r] += horizontal_sum(sum[r][v]);
}

// body<rows, vectors>(row, vector, ahead): kRows rows at a time, with four vectors at a time; ahead: elements to the rows that come next.
template <int kRows, class Body>
MFAC_INLINE void for_each_tile(int64_t rows, int64_t stride, int64_t k, const Body& body) {
  const auto with_vectors = [&]<int kTogether>(int64_t i, int64_t ahead) {
    int64_t v = 0;
    for (; v + 4 <= k; v += 4) body.template operator()<kTogether, 4>(i, v, ahead);
    for (; v < k; ++v) body.template operator()<kTogether, 1>(i, v, ahead);
  };
  int64_t i = 0;
  for (; i + kRows <= rows; i += kRows) with_vectors.template operator()<kRows>(i, i + 2 * kRows <= rows ? kRows * stride : 0);
  for (; i < rows; ++i) with_vectors.template operator()<1>(i, 0);
}

template <class T>
void dots(const void* window, int64_t stride, int64_t rows, int64_t n, const double* x, int64_t k, double* dots) {
  const T* g = static_cast<const T*>(window);
  for_each_tile<4>(rows, stride, k, [&]<int kRows, int kVectors>(int64_t i, int64_t v, int64_t ahead) {
    dots_tile<T, kRows, kVectors>(g + i * stride, stride, n, x + v * kWindowChunk, dots + v * rows + i, rows, ahead);
  });
}

template <class T, int kRows, int kVectors>
MFAC_INLINE void combine_tile(const T* g, int64_t stride, int64_t n, const double* c, int64_t rows, double* y, int64_t ahead) {
  constexpr int kCount = kStepVectors<kVectors>;
  int64_t j = 0;
  const auto step = [&]<int kTogether>() {
    f64v sum[kVectors][kTogether];
    load_columns(y + j, sum);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      f64v gv[kTogether];
      widen_vectors(g + r * stride + j, gv);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v)
#pragma GCC unroll 4
        for (int q = 0; q < kTogether; ++q) sum[v][q] += c[v * rows + r] * gv[q];
    }
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v)
#pragma GCC unroll 4
      for (int q = 0; q < kTogether; ++q) store(y + v * kWindowChunk + j + q * kLanes, sum[v][q]);
    j += kTogether * kLanes;
  };
  while (j + kCount * kLanes <= n) {
    prefetch_rows<kRows, kCount>(g + j + ahead, stride);
    step.template operator()<kCount>();
  }
  while (j + kLanes <= n) step.template operator()<1>();
  if (j < n) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      f64v sum = load<f64v>(y + v * kWindowChunk + j);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) sum += c[v * rows + r] * widen_first(g + r * stride + j, n - j);
      store(y + v * kWindowChunk + j, sum);
    }
  }
}

template <class T>
void combine(const void* window, int64_t stride, int64_t rows, int64_t n, const double* c, int64_t k, double* y) {
  const T* g = static_cast<const T*>(window);
  for_each_tile<8>(rows, stride, k, [&]<int kRows, int kVectors>(int64_t i, int64_t v, int64_t ahead) {
    combine_tile<T, kRows, kVectors>(g + i * stride, stride, n, c + v * rows + i, rows, y + v * kWindowChunk, ahead);
  });
}

template <class T>
void widen_all(const void* src, int64_t n, double* out) {
  const T* p = static_cast<const T*>(src);
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) store(out + j, widen(p + j));
  if (j < n) narrow_first(out + j, widen_first(p + j, n - j), n - j);
}

template <class T>
void narrow_all(const double* src, int64_t n, void* out) {
  T* p = static_cast<T*>(out);
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) narrow(p + j, load<f64v>(src + j));
  if (j < n) narrow_first(p + j, widen_first(src + j, n - j), n - j);
}

template <class T>
constexpr WindowKernels window_kernels_of() {
  return {widen_all<T>, narrow_all<T>, dots<T>, combine<T>};
}
constexpr WindowKernels kWindowKernels[kDTypes] = {window_kernels_of<float>(), window_kernels_of<double>(), window_kernels_of<bf16>(),
                                                   window_kernels_of<fp16>()};

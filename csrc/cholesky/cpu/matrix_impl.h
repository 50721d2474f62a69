// Rows of matrices of any strides and types, to and from contiguous memory.

template <class S>
constexpr DType kDTypeOf = sizeof(S) == sizeof(float) ? DType::f32 : DType::f64;

// body(typed pointer to x's first element); float64 matrices are computed in float64 alone.
template <class S, class Body>
MFAC_INLINE void with_type(const Matrix& x, const Body& body) {
  switch (x.dtype) {
    case DType::f32: return body(static_cast<const float*>(x.data));
    case DType::f64:
      if constexpr (sizeof(S) == sizeof(double)) body(static_cast<const double*>(x.data));
      return;
    case DType::bf16: return body(static_cast<const bf16*>(x.data));
    case DType::fp16: return body(static_cast<const fp16*>(x.data));
  }
}

// out[0, width) = row[0, width) as S, and zero up to `padded`, a multiple of the lanes of at most 2 of its vectors
template <class S, class T>
MFAC_INLINE void load_row(const T* row, int64_t stride, int64_t width, int64_t padded, S* out) {
  if constexpr (sizeof(S) == sizeof(T))
    if (stride == 1 && width == 2 * kLanesOf<S>) {
      __builtin_memcpy(out, row, 2 * sizeof(Vec<S>));
      return;
    }
  T gathered[2 * kLanesOf<S>];
  if (stride == -1) {
    for (int64_t c = 0; c < width; ++c) gathered[c] = row[-c];
  } else if (stride != 1) {
    for (int64_t c = 0; c < width; ++c) gathered[c] = row[c * stride];
  }
  if (stride != 1) row = gathered;
  if constexpr (sizeof(S) == sizeof(Compute<T>)) {
    widen_row(row, width, out, padded);
  } else {
    for (int64_t c = 0; c < padded; c += kLanes) {
      const int64_t left = width - c;
      store(out + c, left >= kLanes ? widen(row + c) : left > 0 ? widen_first(row + c, left) : f64v{});
    }
  }
}

template <class S>
MFAC_INLINE void store_row(const S* row, int64_t width, int64_t stride, S* out) {
  if (stride == 1 && width == 2 * kLanesOf<S>)
    __builtin_memcpy(out, row, 2 * sizeof(Vec<S>));
  else if (stride == 1)
    __builtin_memcpy(out, row, width * sizeof(S));
  else if (stride == -1)
    for (int64_t c = 0; c < width; ++c) out[-c] = row[c];
  else
    for (int64_t c = 0; c < width; ++c) out[c * stride] = row[c];
}

// What a job reports that met a pivot that is not positive, of the leading minor of this order: -1 when its block is not finite.
template <class S>
int32_t failure(const Job& job, int64_t n, int64_t order) {
  const Matrix& block = job.block;
  bool finite = true;
  with_type<S>(block, [&](const auto* data) {
    S row[2 * kLanesOf<S>];
    for (int64_t r = 0; r < n && finite; ++r)
      for (int64_t c = 0; c <= r; c += 2 * kLanesOf<S>) {
        const int64_t width = r + 1 - c < 2 * kLanesOf<S> ? r + 1 - c : 2 * kLanesOf<S>;
        load_row(data + r * block.row_stride + c * block.column_stride, block.column_stride, width, 2 * kLanesOf<S>, row);
        if (c + width == r + 1) row[width - 1] += static_cast<S>(job.damping);
        for (const S x : row) finite = finite && x - x == 0;
      }
  });
  return finite ? static_cast<int32_t>(order) : -1;
}

template <class S>
void fill_nan(const Matrix& out, int64_t n) {
  for (int64_t r = 0; r < n; ++r)
    for (int64_t c = 0; c < n; ++c)
      static_cast<S*>(out.data)[r * out.row_stride + c * out.column_stride] = static_cast<S>(__builtin_nan(""));
}

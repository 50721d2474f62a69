template <class S, class T>
void stage_rows(const T* g, int64_t rows, int64_t stride, int64_t columns, S* staged) {
  for (int64_t i = 0; i < rows; ++i) widen_row(g + i * stride, columns, staged + i * kStagedColumns<S>, round_up(columns, kLanesOf<S>));
}

// Prefetches part `step` of `steps` of a chunk of the rows to L2.
template <class T, class S>
MFAC_INLINE void prefetch_part(const T* g, int64_t rows, int64_t stride, int64_t step, int64_t steps) {
  constexpr int64_t kLine = 64 / sizeof(T), kLines = kStagedColumns<S> / kLine;
  for (int64_t line = kLines * step / steps; line < kLines * (step + 1) / steps; ++line)
    for (int64_t i = 0; i < rows; ++i) __builtin_prefetch(g + i * stride + line * kLine, 0, 2);
}

template <class T>
void gram_block(const void* a_rows, int64_t a_count, const void* b_rows, int64_t b_count, int64_t stride, int64_t columns, double* out,
                int64_t out_stride, void* work) {
  using S = Compute<T>;
  constexpr int64_t kGroup = 8;  // rows of b that stay in L1 while the rows of a pass
  const bool diagonal = a_rows == b_rows;
  const T *a = static_cast<const T*>(a_rows), *b = static_cast<const T*>(b_rows);
  const int64_t row_tiles = round_up(a_count, kDotRows) / kDotRows, column_tiles = round_up(b_count, kDotColumns) / kDotColumns;
  double* sums = static_cast<double*>(work);  // (row_tiles, column_tiles, kDotRows, kDotColumns)
  S* x = reinterpret_cast<S*>(sums + kGramRows * kGramRows);
  S* y = diagonal ? x : x + kGramRows * kStagedColumns<S>;
  __builtin_memset(sums, 0, row_tiles * column_tiles * kDotTile * sizeof(double));
  __builtin_memset(x + a_count * kStagedColumns<S>, 0, (row_tiles * kDotRows - a_count) * kStagedBytes);
  __builtin_memset(y + b_count * kStagedColumns<S>, 0, (column_tiles * kDotColumns - b_count) * kStagedBytes);

  for (int64_t first = 0; first < columns; first += kStagedColumns<S>) {
    const int64_t n = columns - first < kStagedColumns<S> ? columns - first : kStagedColumns<S>;
    const int64_t next = first + kStagedColumns<S>;
    stage_rows<S>(a + first, a_count, stride, n, x);
    if (!diagonal) stage_rows<S>(b + first, b_count, stride, n, y);
    for (int64_t group = 0; group < b_count; group += kGroup) {
      const int64_t top = diagonal ? group / kDotRows : 0;
      for (int64_t i = top; i < row_tiles; ++i) {
        if (next < columns) {
          prefetch_part<T, S>(b + group * stride + next, kGroup, stride, i - top, row_tiles - top);
          if (!diagonal) prefetch_part<T, S>(a + i * kDotRows * stride + next, kDotRows, stride, group, b_count);
        }
        int64_t end = group + kGroup < b_count ? group + kGroup : b_count;
        if (diagonal && end > (i + 1) * kDotRows) end = (i + 1) * kDotRows;
        for (int64_t j = group; j < end; j += kDotColumns)
          dot_tile(x + i * kDotRows * kStagedColumns<S>, y + j * kStagedColumns<S>, round_up(n, kLanesOf<S>),
                   sums + (i * column_tiles + j / kDotColumns) * kDotTile);
      }
    }
  }
  for (int64_t i = 0; i < a_count; ++i) {
    const double* row = sums + i / kDotRows * column_tiles * kDotTile + i % kDotRows * kDotColumns;
    const int64_t end = diagonal ? i + 1 : b_count;
    for (int64_t j = 0; j < end; j += kDotColumns)
      __builtin_memcpy(out + i * out_stride + j, row + j * kDotRows, (end - j < kDotColumns ? end - j : kDotColumns) * sizeof(double));
  }
}

// Blocks of the Gram matrix: S[i, j] = a_i . b_j over `columns` columns of gradients a (m_a, columns), b (m_b, columns).
//
// Floor: 2 m_a m_b columns flops, half of it on the diagonal; bound by arithmetic from about m = 32 on. Fast because each element that
// a tile of dot products loads serves kDotRows or kDotColumns of them; rows are copied next to each other a piece at a time, and the
// pieces of a whole block stay in L2. Accurate because only the sums over one lane of a piece are in the type of the products: they are
// added up in float64, so that the error (a few 1e-8 of |a| . |b| at worst for float32) does not grow with the number of columns.

template <class S, class T>
void stage_rows(const T* g, int64_t rows, int64_t stride, int64_t columns, S* staged) {
  for (int64_t i = 0; i < rows; ++i) widen_row(g + i * stride, columns, staged + i * kStagedColumns<S>, round_up(columns, kLanesOf<S>));
}

// Prefetches part `step` of `steps` of a piece of the rows to L2.
template <class T, class S>
MFAC_INLINE void prefetch_part(const T* g, int64_t rows, int64_t stride, int64_t step, int64_t steps) {
  constexpr int64_t kLine = 64 / sizeof(T), kLines = kStagedColumns<S> / kLine;
  for (int64_t line = kLines * step / steps; line < kLines * (step + 1) / steps; ++line)
    for (int64_t i = 0; i < rows; ++i) __builtin_prefetch(g + i * stride + line * kLine, 0, 2);
}

template <class T, class S>
void gram_block(const void* a_rows, int64_t a_count, const void* b_rows, int64_t b_count, int64_t stride, int64_t columns, double* out,
                int64_t out_stride, void* work) {
  static_assert(kGramWork >= kGramSums * 8 + 2 * kGramStagedRows * kStagedBytes);
  constexpr int64_t kGroup = 2 * kDotColumns;  // rows of b that stay in L1 while the rows of a pass
  const bool diagonal = !b_rows;
  const bool prefetching = diagonal && a_count <= 128;  // with more rows the loads of the next pieces only get in each other's way
  const T *a = static_cast<const T*>(a_rows), *b = static_cast<const T*>(diagonal ? a_rows : b_rows);
  const int64_t row_tiles = round_up(a_count, kDotRows) / kDotRows, column_tiles = round_up(b_count, kDotColumns) / kDotColumns;
  double* sums = static_cast<double*>(work);  // (row_tiles, column_tiles, kDotSums): tiles of (kDotRows, kDotColumns)
  S* x = reinterpret_cast<S*>(sums + kGramSums);
  S* y = diagonal ? x : x + kGramStagedRows * kStagedColumns<S>;
  __builtin_memset(sums, 0, row_tiles * column_tiles * kDotSums<S> * sizeof(double));
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
        if (prefetching && next < columns) prefetch_part<T, S>(b + group * stride + next, kGroup, stride, i - top, row_tiles - top);
        int64_t end = group + kGroup < b_count ? group + kGroup : b_count;
        if (diagonal && end > (i + 1) * kDotRows) end = (i + 1) * kDotRows;
        for (int64_t j = group; j < end; j += kDotColumns)
          dot_tile(x + i * kDotRows * kStagedColumns<S>, y + j * kStagedColumns<S>, round_up(n, kLanesOf<S>),
                   sums + (i * column_tiles + j / kDotColumns) * kDotSums<S>);
      }
    }
  }
  for (int64_t i = 0; i < a_count; ++i) {
    const double* row = sums + i / kDotRows * column_tiles * kDotSums<S> + i % kDotRows * kDotColumns;
    const int64_t end = diagonal ? i + 1 : b_count;
    for (int64_t j = 0; j < end; j += kDotColumns, row += kDotSums<S>)
      __builtin_memcpy(out + i * out_stride + j, row, (end - j < kDotColumns ? end - j : kDotColumns) * sizeof(double));
  }
}

// The diagonal of F^-1 by coordinates: y_j = (1 - sum_i (T G)_ij^2) / damping, with T (m, m) lower triangular and G (m, d).
//
// Floor: m (m + 1) d flops, m d elements of G read, d written. Fast because T G exists only in registers, kTileRows x 2 vectors at a
// time, squared as soon as they are complete; T is packed once in strips of kTileRows rows, cut off at the diagonal.
// Squares are summed in float32 over kSquaredStrips strips, then in float64. The error of T G is that of its dot products.

constexpr int64_t kSquaredStrips = 4;
constexpr int64_t kDiagonalPanels = 4;  // packed at a time: a row's piece then spans several cache lines

// Strip p, rows [p kTileRows, ...) of T, column k, is at packed[strip_at(p) + k * kTileRows]; zero above the diagonal.
constexpr int64_t strip_at(int64_t p) { return kTileRows * kTileRows * (p * (p + 1) / 2); }

template <class T>
int64_t packed_transform_bytes(int64_t m) {
  return strip_at(round_up(m, kTileRows) / kTileRows) * sizeof(Compute<T>);
}

template <class T>
void pack_transform(const double* transform, int64_t m, void* packed) {
  using S = Compute<T>;
  S* out = static_cast<S*>(packed);
  for (int64_t first = 0; first < m; first += kTileRows)
    for (int64_t k = 0; k < first + kTileRows; ++k)
      for (int64_t i = first; i < first + kTileRows; ++i) *out++ = i < m && k <= i ? static_cast<S>(transform[i * m + k]) : S(0);
}

template <class T>
int64_t inverse_diagonal_work(int64_t m) {
  return kDiagonalPanels * m * kTile<Compute<T>> * sizeof(Compute<T>);
}

// squares[c] = sum_i (T G)_ic^2 for one panel of columns
template <class S>
__attribute__((noinline)) void column_squares(const S* packed, const S* panel, int64_t m, double* squares) {
  using V = Vec<S>;
  for (int64_t c = 0; c < kTile<S>; ++c) squares[c] = 0;
  const int64_t strips = round_up(m, kTileRows) / kTileRows;
  for (int64_t first = 0; first < strips; first += kSquaredStrips) {
    V sum[2] = {};
    for (int64_t p = first; p < strips && p < first + kSquaredStrips; ++p) {
      const int64_t end = (p + 1) * kTileRows;
      V y[kTileRows][2] = {};
      multiply_rows(packed + strip_at(p), kTileRows, panel, end < m ? end : m, y);
#pragma GCC unroll 8
      for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < 2; ++v) sum[v] += y[r][v] * y[r][v];
    }
    for (int v = 0; v < 2; ++v) add_to(squares + v * kLanesOf<S>, sum[v]);
  }
}

template <class T>
void inverse_diagonal(const void* columns, int64_t stride, int64_t m, int64_t n, const void* packed, double damping, void* out,
                      void* work) {
  using S = Compute<T>;
  constexpr int64_t kWidth = kDiagonalPanels * kTile<S>;
  const T* g = static_cast<const T*>(columns);
  S *y = static_cast<S*>(out), *panels = static_cast<S*>(work);
  for (int64_t first = 0; first < n; first += kWidth) {
    const int64_t width = n - first < kWidth ? n - first : kWidth, rest = n - first - width;
    pack_columns(g + first, m, stride, width, rest < kWidth ? rest : kWidth, panels);
    for (int64_t c = 0; c < width; c += kTile<S>) {
      double squares[kTile<S>];
      column_squares(static_cast<const S*>(packed), panels + c * m, m, squares);
      for (int64_t j = c; j < width && j < c + kTile<S>; ++j) y[first + j] = static_cast<S>((1 - squares[j - c]) / damping);
    }
  }
}

// Primal blocks of a Fisher matrix: X_b = (damping I + G_b^T G_b / n)^-1, G_b (m, b) a block of columns.
//
// Floor: m b^2 flops for the lower triangle of G_b^T G_b, b^3 for the inverse, m b elements read and b^2 written. Fast because the
// product is left in the tiles that the inverse starts from: per block nothing else goes to memory.

constexpr int64_t kInverseDepth = 256;  // rows of G_b packed at a time

template <class S>
constexpr int64_t block_inverse_bytes(int64_t n) {
  const int64_t packed = tiles_of<S>(n) * kTile<S> * kInverseDepth, work = spd_work_size<S>(n);
  return (spd_tiles_size<S>(n) + (packed > work ? packed : work)) * sizeof(S);
}

template <class T>
int64_t block_inverse_work(int64_t n) {
  return block_inverse_bytes<Compute<T>>(n);
}

template <class T>
int32_t block_inverse(const void* block, int64_t stride, int64_t m, int64_t n, int64_t ahead, double damping, double count, void* out,
                      int64_t out_stride, void* work) {
  using S = Compute<T>;
  const T* g = static_cast<const T*>(block);
  const Tiles<S> tiles{static_cast<S*>(work)};
  S *x = static_cast<S*>(out), *panels = tiles.first + spd_tiles_size<S>(n);
  if (m == 0) __builtin_memset(tiles.first, 0, spd_tiles_size<S>(n) * sizeof(S));
  for (int64_t first = 0; first < m; first += kInverseDepth) {
    const int64_t depth = m - first < kInverseDepth ? m - first : kInverseDepth;
    pack_columns(g + first * stride, depth, stride, n, ahead, panels);
    for (int64_t i = 0; i < tiles_of<S>(n); ++i)
      for (int64_t j = 0; j <= i; ++j) {
        S* tile = tile_at(tiles, i, j);
        multiply_tile(panels + i * depth * kTile<S>, panels + j * depth * kTile<S>, depth, static_cast<S>(1 / count),
                      first ? tile : nullptr, tile, i == j ? Part::upper : Part::full);
      }
  }
  int64_t info = spd_prepare(tiles, n, static_cast<S>(damping)) ? spd_eliminate(tiles, n, panels) : -1;
  if (info == 0) {
    spd_store_negated(tiles, n, x, out_stride);
  } else {
    const S nan = static_cast<S>(__builtin_nan(""));
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < n; ++j) x[i * out_stride + j] = nan;
  }
  return static_cast<int32_t>(info);
}

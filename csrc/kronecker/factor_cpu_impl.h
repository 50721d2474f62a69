// Sums of products of columns of a patch matrix P (rows, columns): S = sum_r w_r a_r b_r^T for blocks a, b of its columns.
//
// Floor: rows a b multiply-adds, half of them for a = b; the bound is arithmetic from some 32 columns on. Fast because each block is
// packed where L2 holds it, kDepth rows at a time, and multiplied by register tiles of 8 x 2 vectors: two loads and eight broadcasts for
// sixteen multiply-adds. Accurate because a sum is never long: kDepth products in registers, kFlush of those in the tiles, and then at
// most rows / (kDepth kFlush): with c = kDepth + kFlush + rows / 4096, an entry is within c eps sum |w a b|.

constexpr int64_t kFlush = 32;

template <class S>
constexpr int64_t factor_tiles(int64_t columns) {
  return (columns + kTile<S> - 1) / kTile<S>;
}

template <class T>
int64_t sums_size(int64_t a, int64_t b) {
  using S = Compute<T>;
  return factor_tiles<S>(a) * factor_tiles<S>(b) * kTileArea<S>;
}

// out += a^T b for kVectors vectors of kTileRows rows
template <int kVectors, class S>
MFAC_INLINE void accumulate_strip(const S* a, const S* b, int64_t depth, S* out) {
  using V = Vec<S>;
  V sum[kTileRows][kVectors] = {};
  multiply_rows(a, kTile<S>, b, depth, sum);
#pragma GCC unroll 8
  for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      S* at = out + r * kTile<S> + v * kLanesOf<S>;
      store(at, load<V>(at) + sum[r][v]);
    }
}

// The first `rows` rows and `columns` columns of a tile; of a diagonal one, the upper triangle.
template <class S>
__attribute__((noinline)) void accumulate_tile(const S* a, const S* b, int64_t depth, int64_t rows, int64_t columns, bool diagonal,
                                               S* out) {
  constexpr int64_t n = kLanesOf<S>;
  for (int64_t r = 0; r < rows; r += kTileRows) {
    const bool left = !diagonal || r<n, right = columns> n;
    S* to = out + r * kTile<S>;
    if (left && right)
      accumulate_strip<2>(a + r, b, depth, to);
    else if (left)
      accumulate_strip<1>(a + r, b, depth, to);
    else if (right)
      accumulate_strip<1>(a + r, b + n, depth, to + n);
  }
}

template <class S>
void scale_rows(const S* panels, int64_t count, int64_t depth, const S* weights, S* out) {
  for (int64_t panel = 0; panel < count; ++panel, panels += kTile<S> * kDepth, out += kTile<S> * kDepth)
    for (int64_t k = 0; k < depth; ++k)
      for (int64_t v = 0; v < kTile<S>; v += kLanesOf<S>)
        store(out + k * kTile<S> + v, load<Vec<S>>(panels + k * kTile<S> + v) * splat(weights[k]));
}

template <class S>
void add_columns(const S* panels, int64_t count, int64_t depth, double* sums) {
  for (int64_t panel = 0; panel < count; ++panel, panels += kTile<S> * kDepth, sums += kTile<S>) {
    Vec<S> sum[2] = {};
    for (int64_t k = 0; k < depth; ++k)
      for (int v = 0; v < 2; ++v) sum[v] += load<Vec<S>>(panels + k * kTile<S> + v * kLanesOf<S>);
    for (int v = 0; v < 2; ++v) add_to(sums + v * kLanesOf<S>, sum[v]);
  }
}

// What the workspace of a task holds, in elements.
template <class T>
struct FactorWork {
  using S = Compute<T>;
  int64_t a, b, weighted, staged, sums;

  FactorWork(const Columns& x, const Columns* y)
      : a(aligned(Packer<T>::panels_size(x.count))),
        b(y ? aligned(Packer<T>::panels_size(y->count)) : 0),
        weighted(a),
        staged(aligned(Packer<T>(x).staged_size())),
        sums(sums_size<T>(x.count, y ? y->count : x.count)) {
    if (y && aligned(Packer<T>(*y).staged_size()) > staged) staged = aligned(Packer<T>(*y).staged_size());
  }
  static int64_t aligned(int64_t n) { return round_up(n, 64 / sizeof(S)); }
  int64_t bytes() const { return (a + b + weighted + staged + sums) * sizeof(S) + kBlockColumnsPadded * sizeof(double); }
  static constexpr int64_t kBlockColumnsPadded = round_up(kBlockColumns, kTile<S>);
};

template <class T>
int64_t factor_work_bytes(const Columns& a, const Columns& b) {
  return FactorWork<T>(a, &b).bytes();
}

template <class T>
void accumulate_factor(const Columns& x, const Columns* y, const Weights& weights, int64_t first, int64_t rows, void* result,
                       double* column_sums, void* memory) {
  using S = Compute<T>;
  const FactorWork<T> work(x, y);
  S *a = static_cast<S*>(memory), *b = a + work.a, *weighted = b + work.b, *staged = weighted + work.weighted, *sums = staged + work.staged;
  double* columns = reinterpret_cast<double*>(sums + work.sums);
  S* total = static_cast<S*>(result);
  const Packer<T> pack_x(x), pack_y(y ? *y : x);
  const Columns& other = y ? *y : x;
  const int64_t x_tiles = factor_tiles<S>(x.count), y_tiles = factor_tiles<S>(other.count), positions = x.patches->positions();
  __builtin_memset(total, 0, work.sums * sizeof(S));
  __builtin_memset(columns, 0, x_tiles * kTile<S> * sizeof(double));
  Segment segments[kDepth];

  for (int64_t block = 0; block < rows; block += kDepth * kFlush) {
    const int64_t block_end = rows - block < kDepth * kFlush ? rows : block + kDepth * kFlush;
    __builtin_memset(sums, 0, work.sums * sizeof(S));
    for (int64_t done = block; done < block_end; done += kDepth) {
      const int64_t depth = block_end - done < kDepth ? block_end - done : kDepth;
      pack_x.pack(segments, cut_rows(*x.patches, first + done, depth, segments), staged, a);
      if (y) pack_y.pack(segments, cut_rows(*y->patches, first + done, depth, segments), staged, b);
      const S *left = a, *right = y ? b : a;
      if (weights.values) {
        S row_weights[kDepth];
        for (int64_t k = 0; k < depth; ++k) {
          const int64_t row = first + done + k;
          row_weights[k] = static_cast<const S*>(weights.values)[row / positions * weights.step + row % positions];
        }
        scale_rows(a, x_tiles, depth, row_weights, weighted);
        left = weighted;
      }
      if (column_sums) add_columns(left, x_tiles, depth, columns);
      for (int64_t j = 0; j < y_tiles; ++j)
        for (int64_t i = 0; i < x_tiles && (y || i <= j); ++i) {
          const int64_t height = x.count - i * kTile<S>, width = other.count - j * kTile<S>;
          accumulate_tile(left + i * kTile<S> * kDepth, right + j * kTile<S> * kDepth, depth, height < kTile<S> ? height : kTile<S>,
                          width < kTile<S> ? width : kTile<S>, !y && i == j, sums + (i * y_tiles + j) * kTileArea<S>);
        }
    }
    for (int64_t i = 0; i < work.sums; i += kLanesOf<S>) store(total + i, load<Vec<S>>(total + i) + load<Vec<S>>(sums + i));
  }
  if (column_sums) {
    int32_t order[kBlockColumns];
    pack_x.column_order(order);
    for (int64_t c = 0; c < x.count; ++c) column_sums[order[c]] = columns[c];
  }
}

template <class T>
bool reduce_sums(void* memory, int64_t count, int64_t size) {
  using S = Compute<T>;
  S* sums = static_cast<S*>(memory);
  Vec<S> zero = {};  // x - x is zero for finite x alone
  for (int64_t i = 0; i < size; i += kLanesOf<S>) {
    Vec<S> sum = load<Vec<S>>(sums + i);
    for (int64_t s = 1; s < count; ++s) sum += load<Vec<S>>(sums + s * size + i);
    store(sums + i, sum);
    zero += sum - sum;
  }
  S result = 0;
  for (int i = 0; i < kLanesOf<S>; ++i) result += zero[i];
  return result == 0;
}

template <class T>
void store_sums(const Columns& x, const Columns* y, const void* memory, const Target& target) {
  using S = Compute<T>;
  const Columns& other = y ? *y : x;
  int32_t rows[kBlockColumns], columns[kBlockColumns];
  Packer<T>(x).column_order(rows);
  Packer<T>(other).column_order(columns);
  const int64_t x_tiles = factor_tiles<S>(x.count), y_tiles = factor_tiles<S>(other.count);
  const S beta = static_cast<S>(target.beta), alpha = static_cast<S>(target.alpha), *tile = static_cast<const S*>(memory);
  S* out = static_cast<S*>(target.data);
  const auto put = [&](int64_t row, int64_t column, S sum) {
    S& entry = out[row * target.stride + column];
    entry = beta == 0 ? alpha * sum : beta * entry + alpha * sum;
  };
  for (int64_t i = 0; i < x_tiles; ++i)
    for (int64_t j = 0; j < y_tiles; ++j, tile += kTileArea<S>) {
      if (!y && i > j) continue;
      for (int64_t r = 0; r < kTile<S> && i * kTile<S> + r < x.count; ++r)
        for (int64_t c = !y && i == j ? r : 0; c < kTile<S> && j * kTile<S> + c < other.count; ++c) {
          const int64_t row = target.row + rows[i * kTile<S> + r], column = target.column + columns[j * kTile<S> + c];
          const S sum = tile[r * kTile<S> + c];
          put(row, column, sum);
          if (target.mirror && row != column) put(column, row, sum);
        }
    }
}

template <class T>
constexpr FactorKernels factor_kernels_of() {
  return {sums_size<T>, factor_work_bytes<T>, accumulate_factor<T>, reduce_sums<T>, store_sums<T>};
}
constexpr FactorKernels kFactorKernels[kDTypes] = {factor_kernels_of<float>(), factor_kernels_of<double>(), factor_kernels_of<bf16>(),
                                                   factor_kernels_of<fp16>()};

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

// out += a^T b for kVectors vectors of kRows rows
template <int kRows, int kVectors, class S>
MFAC_INLINE void accumulate_strip(const S* a, const S* b, int64_t depth, S* out) {
  Vec<S> sum[kRows][kVectors] = {};
  multiply_rows(a, kTile<S>, b, depth, sum);
  add_rows(sum, out);
}

// The first `rows` rows and `columns` columns of a tile; of a diagonal one, the upper triangle.
template <class S>
__attribute__((noinline)) void accumulate_tile(const S* a, const S* b, int64_t depth, int64_t rows, int64_t columns, bool diagonal,
                                               S* out) {
  constexpr int64_t n = kLanesOf<S>;
  const int64_t both = columns <= n ? 0 : diagonal ? n : rows;
  for_each_strip<S>(rows, both, [&]<int kRows, int kVectors>(int64_t r) {
    const int64_t vector = kVectors == 1 && columns > n ? n : 0;
    accumulate_strip<kRows, kVectors>(a + r, b + vector, depth, out + r * kTile<S> + vector);
  });
}

template <class S>
void load_weights(const Weights& weights, int64_t positions, int64_t first, int64_t rows, S* out) {
  for (int64_t row = first; row < first + rows; ++row)
    *out++ = static_cast<const S*>(weights.values)[row / positions * weights.step + row % positions];
}

template <class S>
void scale_rows(const S* panels, int64_t count, int64_t depth, const S* weights, S* out) {
  for (int64_t panel = 0; panel < count; ++panel, panels += kPanel<S>, out += kPanel<S>)
    for (int64_t k = 0; k < depth; ++k)
      for (int64_t v = 0; v < kTile<S>; v += kLanesOf<S>)
        store(out + k * kTile<S> + v, load<Vec<S>>(panels + k * kTile<S> + v) * splat(weights[k]));
}

template <class S>
void add_columns(const S* panels, int64_t count, int64_t depth, double* sums) {
  for (int64_t panel = 0; panel < count; ++panel, panels += kPanel<S>, sums += kTile<S>) {
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
        load_weights(weights, positions, first + done, depth, row_weights);
        scale_rows(a, x_tiles, depth, row_weights, weighted);
        left = weighted;
      }
      if (column_sums) add_columns(left, x_tiles, depth, columns);
      RowsAhead<T> ahead(x, first + done + depth, depth, y ? x_tiles * y_tiles : x_tiles * (x_tiles + 1) / 2);
      for (int64_t pair = 0; pair < y_tiles; pair += 2)  // two panels stay in L1 while those of the other side pass
        for (int64_t i = 0; i < x_tiles; ++i)
          for (int64_t j = y || i <= pair ? pair : i; j < pair + 2 && j < y_tiles; ++j) {
            ahead.prefetch_part();
            const int64_t height = x.count - i * kTile<S>, width = other.count - j * kTile<S>;
            accumulate_tile(left + i * kPanel<S>, right + j * kPanel<S>, depth, height < kTile<S> ? height : kTile<S>,
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

// The upper half of a diagonal tile, mirrored.
template <class S>
void symmetrise_tile(const S* tile, S* out) {
  transpose_tile(tile, out);
  for (int64_t r = 0; r < kTile<S>; ++r) __builtin_memcpy(out + r * (kTile<S> + 1), tile + r * (kTile<S> + 1), (kTile<S> - r) * sizeof(S));
}

// out[c] = beta out[c] + alpha sums[c]: every entry by the same instructions, so that what is symmetric stays it.
template <class S>
void store_row(const S* sums, int64_t n, S beta, S alpha, S* out) {
  constexpr int64_t lanes = kLanesOf<S>;
  for (int64_t c = 0; c < n; c += lanes) {
    const int64_t width = n - c < lanes ? n - c : lanes;
    Vec<S> v = splat(alpha) * load<Vec<S>>(sums + c);
    if (beta != 0) v += splat(beta) * (width < lanes ? load_first_as<S>(out + c, width) : load<Vec<S>>(out + c));
    if (width < lanes)
      __builtin_memcpy(out + c, &v, width * sizeof(S));
    else
      store(out + c, v);
  }
}

template <class T>
class SumsWriter {
 public:
  using S = Compute<T>;

  SumsWriter(const Columns& x, const Columns& y, const S* sums, const Target& target)
      : beta_(static_cast<S>(target.beta)),
        alpha_(static_cast<S>(target.alpha)),
        out_(static_cast<S*>(target.data)),
        stride_(target.stride) {
    a_.init(x, target.row);
    b_.init(y, target.column);
    sums_ = sums;
  }

  void write() {  // at (row, column)
    for (int64_t i = 0; i < a_.tiles; ++i) {
      for (int64_t j = 0; j < b_.tiles; ++j) strip_[j] = tile(i, j);
      write_strip(a_, i, b_);
    }
  }
  void write_mirrored() {
    for (int64_t j = 0; j < b_.tiles; ++j) {
      for (int64_t i = 0; i < a_.tiles; ++i) strip_[i] = transposed(i, j, i);
      write_strip(b_, j, a_);
    }
  }
  void write_symmetric() {
    for (int64_t i = 0; i < a_.tiles; ++i) {
      for (int64_t j = 0; j < a_.tiles; ++j) strip_[j] = j < i ? transposed(j, i, j) : tile(i, j);
      symmetrise_tile(tile(i, i), copies_ + i * kTileArea<S>);
      strip_[i] = copies_ + i * kTileArea<S>;
      write_strip(a_, i, a_);
    }
  }

 private:
  static constexpr int64_t kMost = factor_tiles<S>(kBlockColumns);
  struct Side {
    int64_t at, count, tiles;
    bool in_order;
    int32_t order[kBlockColumns];

    void init(const Columns& columns, int64_t first) {
      at = first;
      count = columns.count;
      tiles = factor_tiles<S>(count);
      in_order = columns.patches->offsets() == 1;
      Packer<T>(columns).column_order(order);
    }
  };

  const S* tile(int64_t i, int64_t j) const { return sums_ + (i * b_.tiles + j) * kTileArea<S>; }
  const S* transposed(int64_t i, int64_t j, int64_t copy) {
    transpose_tile(tile(i, j), copies_ + copy * kTileArea<S>);
    return copies_ + copy * kTileArea<S>;
  }

  // Rows of tile row i: what strip_ holds, brought into the order of the columns.
  void write_strip(const Side& rows, int64_t i, const Side& columns) {
    S line[kMost * kTile<S>];
    for (int64_t r = 0; r < kTile<S> && i * kTile<S> + r < rows.count; ++r) {
      S* out = out_ + (rows.at + rows.order[i * kTile<S> + r]) * stride_ + columns.at;
      for (int64_t j = 0; j < columns.tiles; ++j) {
        const int64_t first = j * kTile<S>, width = columns.count - first < kTile<S> ? columns.count - first : kTile<S>;
        const S* row = strip_[j] + r * kTile<S>;
        if (columns.in_order)
          store_row(row, width, beta_, alpha_, out + first);
        else
          for (int64_t c = 0; c < width; ++c) line[columns.order[first + c]] = row[c];
      }
      if (!columns.in_order) store_row(line, columns.count, beta_, alpha_, out);
    }
  }

  Side a_, b_;
  const S *sums_, *strip_[kMost];
  S beta_, alpha_, *out_;
  int64_t stride_;
  alignas(64) S copies_[kMost * kTileArea<S>];
};

template <class T>
void store_sums(const Columns& x, const Columns* y, const void* sums, const Target& target) {
  SumsWriter<T> writer(x, y ? *y : x, static_cast<const Compute<T>*>(sums), target);
  if (!y) return writer.write_symmetric();
  writer.write();
  if (target.mirror) writer.write_mirrored();
}

template <class T>
constexpr FactorKernels factor_kernels_of() {
  return {sums_size<T>, factor_work_bytes<T>, accumulate_factor<T>, reduce_sums<T>, store_sums<T>};
}
constexpr FactorKernels kFactorKernels[kDTypes] = {factor_kernels_of<float>(), factor_kernels_of<double>(), factor_kernels_of<bf16>(),
                                                   factor_kernels_of<fp16>()};

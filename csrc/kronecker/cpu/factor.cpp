// How the sums of products of columns are cut into tasks. The cut depends on shapes alone: results are the same bit for bit whatever the
// number of threads. Pairs of blocks of columns are independent; where they are few, rows are cut into segments, whose sums are added in
// order.
#include "kronecker/cpu/factor.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <optional>
#include <vector>

#include "common/cpu/tasks.h"
#include "common/sizes.h"

namespace mfac_kernels {
namespace {

// Columns of a block: whole channels where possible, so that a patch is copied in long runs.
int64_t block_columns(int64_t columns, int64_t offsets) {
  constexpr int64_t kChannels = 16;
  if (columns <= kBlockColumns) return std::max<int64_t>(1, columns);
  const int64_t unit = kChannels * offsets <= kBlockColumns ? kChannels * offsets : kChannels;
  const int64_t count = divide_up(columns, kBlockColumns / unit * unit);
  return divide_up(divide_up(columns, count), unit) * unit;
}

constexpr int64_t kNoColumnSums = -1;

// Two blocks of columns, and where their sums go.
struct Pair {
  Columns a, b;
  bool diagonal;  // b is a
  Target target;
  int64_t column_sums;              // where those of a go, or kNoColumnSums
  int64_t sums = 0, first_sum = 0;  // in elements
  const Columns* other() const { return diagonal ? nullptr : &b; }
};

class Products {
 public:
  Products(DType dtype, int64_t rows, const Weights& weights, bool squares_first)
      : kernels_(factor_kernels(dtype)),
        item_(dtype == DType::f64 ? 8 : 4),
        rows_(rows),
        weights_(weights),
        squares_first_(squares_first) {}

  void add(Pair pair) {
    pair.sums = kernels_.sums_size(pair.a.count, pair.b.count);
    if (pair.column_sums != kNoColumnSums) columns_ = std::max(columns_, pair.column_sums + pair.a.count);
    work_ += pair.a.count * pair.b.count * rows_;
    pairs_.push_back(pair);
  }

  // Sums everything if rows are cut, else the diagonal blocks if these come first. Returns whether what it summed is finite: so is the
  // batch if its squares are.
  bool prepare() {
    cut_rows();
    for_each(count() * segments_, [&](int64_t task) {
      const Pair& pair = pairs_[task / segments_];
      const int64_t segment = task % segments_, first = rows_ * segment / segments_, end = rows_ * (segment + 1) / segments_;
      if (!stored(pair)) return;
      accumulate(pair, segment, first, end - first, sums_of(pair) + segment * pair.sums * item_, scratch(work_bytes(pair)));
    });
    std::atomic<bool> finite{true};
    for_each(count(), [&](int64_t p) {
      if (stored(pairs_[p]) && !kernels_.reduce(sums_of(pairs_[p]), segments_, pairs_[p].sums)) finite = false;
    });
    for (int64_t i = columns_; i < segments_ * columns_; ++i) column_sums_[i % columns_] += column_sums_[i];
    return finite;
  }

  void store() {
    for_each(count(), [&](int64_t p) {
      const Pair& pair = pairs_[p];
      char* sums = sums_of(pair);
      if (!stored(pair)) {
        sums = static_cast<char*>(scratch(work_bytes(pair) + pair.sums * item_));
        accumulate(pair, 0, 0, rows_, sums, sums + pair.sums * item_);
      }
      kernels_.store(pair.a, pair.other(), sums, pair.target);
    });
  }

  const double* column_sums(int64_t at) const { return column_sums_.data() + at; }

 private:
  int64_t count() const { return static_cast<int64_t>(pairs_.size()); }
  bool stored(const Pair& pair) const { return segments_ > 1 || (squares_first_ && pair.diagonal); }
  char* sums_of(const Pair& pair) const { return sums_->data() + pair.first_sum * item_; }
  int64_t work_bytes(const Pair& pair) const { return kernels_.work_bytes(pair.a, pair.b); }

  void cut_rows() {
    constexpr int64_t kEnough = 64, kMinRows = 1024, kRowsPerColumn = 8;  // partial sums are small beside the rows that they sum
    int64_t least = kMinRows, size = 0;
    for (const Pair& pair : pairs_) least = std::max({least, kRowsPerColumn * pair.a.count, kRowsPerColumn * pair.b.count});
    while (2 * segments_ * count() <= kEnough && 2 * segments_ * least <= rows_) segments_ *= 2;
    for (Pair& pair : pairs_) {
      pair.first_sum = size;
      if (stored(pair)) size += segments_ * pair.sums;
    }
    sums_.emplace(size * item_);
    column_sums_.resize(segments_ * columns_);
  }

  void accumulate(const Pair& pair, int64_t segment, int64_t first, int64_t rows, void* sums, void* work) {
    double* columns = pair.column_sums == kNoColumnSums ? nullptr : column_sums_.data() + segment * columns_ + pair.column_sums;
    kernels_.accumulate(pair.a, pair.other(), weights_, first, rows, sums, columns, work);
  }

  template <class Body>
  void for_each(int64_t count, const Body& body) const {
    constexpr int64_t kWorthThreads = 1 << 19;
    if (work_ >= kWorthThreads)
      for_each_task(count, body);
    else
      for (int64_t i = 0; i < count; ++i) body(i);
  }

  const FactorKernels& kernels_;
  int64_t item_, rows_, work_ = 0, segments_ = 1, columns_ = 0;
  Weights weights_;
  bool squares_first_;
  std::vector<Pair> pairs_;
  std::optional<Workspace> sums_;    // of stored pairs: (segments, sums) each
  std::vector<double> column_sums_;  // (segments, columns)
};

// The bias row and column of a block of `columns` columns and the bias.
template <class S>
void store_bias(const FactorUpdate& u, const double* sums, int64_t columns, S* out) {
  const S beta = static_cast<S>(u.beta);
  const auto put = [&](int64_t row, int64_t column, double sum) {
    S& entry = out[row * u.factor.size + column];
    const S value = static_cast<S>(u.alpha * sum);
    entry = beta == 0 ? value : beta * entry + value;
  };
  for (int64_t c = 0; c < columns; ++c) {
    put(columns, c, u.bias * sums[c]);
    put(c, columns, u.bias * sums[c]);
  }
  put(columns, columns, u.bias_squares);
}

template <class S>
void clear_padding(int64_t used, int64_t size, S* out) {
  for (int64_t row = 0; row < size; ++row) std::fill(out + row * size + (row < used ? used : 0), out + (row + 1) * size, S(0));
}

template <class S>
void update(const FactorUpdate& u) {
  const Factor& f = u.factor;
  const int64_t channels = u.patches.channels / f.groups, offsets = u.patches.offsets();
  std::vector<Patches> groups(f.groups, u.patches);
  for (int64_t g = 0; g < f.groups; ++g) {
    groups[g].channels = channels;
    groups[g].data = static_cast<const char*>(u.patches.data) + g * channels * u.patches.channel_step * element_size(u.patches.dtype);
  }
  // A block of the factor: features [first, first + used) of a group, the bias as the last one or not.
  struct Block {
    S* out;
    int64_t group, first, used, column_sums;
  };
  std::vector<Block> blocks;
  for (int64_t b = 0; b < f.blocks; ++b) {
    const int64_t group = f.groups > 1 ? b : 0, first = f.groups > 1 ? 0 : b * f.size, used = std::min(f.size, f.features - first);
    const bool bias = f.bias && first + used == f.features;
    blocks.push_back(
        {static_cast<S*>(f.data) + b * f.size * f.size, group, first, used, bias ? group * channels * offsets : kNoColumnSums});
  }

  Products products(u.patches.dtype, u.patches.rows(), u.weights, u.refused != nullptr);
  for (const Block& block : blocks) {
    const bool bias = block.column_sums != kNoColumnSums;
    const int64_t columns = block.used - bias, width = block_columns(columns, offsets);
    for (int64_t j = 0; j < columns; j += width)
      for (int64_t i = 0; i <= j; i += width) {
        const auto columns_at = [&](int64_t at) { return Columns{&groups[block.group], block.first + at, std::min(width, columns - at)}; };
        products.add({columns_at(i),
                      columns_at(j),
                      i == j,
                      {block.out, f.size, i, j, true, u.beta, u.alpha},
                      bias && i == j ? block.column_sums + i : kNoColumnSums});
      }
  }
  const bool finite = products.prepare() && std::isfinite(u.bias_squares);
  if (u.refused && !finite) {
    *u.refused = 1;
    return;
  }
  products.store();
  for (const Block& block : blocks) {
    if (block.column_sums != kNoColumnSums) store_bias(u, products.column_sums(block.column_sums), block.used - 1, block.out);
    clear_padding(block.used, f.size, block.out);
  }
}

}  // namespace

void update_factor(const FactorUpdate& u) {
  if (is_narrow(u)) return update_narrow(u);
  u.factor.dtype == DType::f64 ? update<double>(u) : update<float>(u);
}

void cross_products(const Patches& x, const Patches& y, const Weights& weights, void* out) {
  Products products(x.dtype, x.rows(), weights, false);
  const int64_t height = block_columns(x.channels, 1), width = block_columns(y.channels, 1);
  for (int64_t i = 0; i < x.channels; i += height)
    for (int64_t j = 0; j < y.channels; j += width)
      products.add({{&x, i, std::min(height, x.channels - i)},
                    {&y, j, std::min(width, y.channels - j)},
                    false,
                    {out, y.channels, i, j, false, 0, 1},
                    kNoColumnSums});
  products.prepare();
  products.store();
}

}  // namespace mfac_kernels

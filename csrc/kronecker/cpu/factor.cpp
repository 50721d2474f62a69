// How the sums of products of columns are cut into tasks. The cut depends on shapes alone: results are the same bit for bit whatever the
// number of threads. Pairs of blocks of columns are independent; where they are few, rows are cut into segments, whose sums are added in
// order.
#include "kronecker/cpu/factor.h"

#include <algorithm>
#include <cmath>
#include <deque>
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

// The sums that one batch of rows adds to: tasks of three passes, each done before the next begins.
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

  // Once all pairs are there. Returns the bytes of the sums that are stored: of all pairs if rows are cut, else of the diagonal blocks if
  // these come first.
  int64_t cut_rows() {
    constexpr int64_t kEnough = 64, kMinRows = 1024, kRowsPerColumn = 8;  // partial sums are small beside the rows that they sum
    int64_t least = kMinRows;
    for (const Pair& pair : pairs_) least = std::max({least, kRowsPerColumn * pair.a.count, kRowsPerColumn * pair.b.count});
    while (2 * segments_ * pair_count() <= kEnough && 2 * segments_ * least <= rows_) segments_ *= 2;
    for (Pair& pair : pairs_) {
      pair.first_sum = size_;
      if (stored(pair)) size_ += segments_ * pair.sums;
    }
    return size_ * item_;
  }
  void allocate() {
    sums_.emplace(size_ * item_);
    column_sums_.resize(segments_ * columns_);
    finite_.assign(pairs_.size(), true);
  }

  int64_t rows() const { return rows_; }
  int64_t work() const { return work_; }
  int64_t pair_count() const { return static_cast<int64_t>(pairs_.size()); }
  int64_t segment_count() const { return pair_count() * segments_; }

  void sum_segment(int64_t task) {
    const Pair& pair = pairs_[task / segments_];
    const int64_t segment = task % segments_, first = rows_ * segment / segments_, end = rows_ * (segment + 1) / segments_;
    if (!stored(pair)) return;
    accumulate(pair, segment, first, end - first, sums_of(pair) + segment * pair.sums * item_, scratch(work_bytes(pair)));
  }
  void add_segments(int64_t p) {
    if (stored(pairs_[p])) finite_[p] = kernels_.reduce(sums_of(pairs_[p]), segments_, pairs_[p].sums);
  }
  void add_column_sums() {
    for (int64_t i = columns_; i < segments_ * columns_; ++i) column_sums_[i % columns_] += column_sums_[i];
  }
  // Whether what is summed so far is finite: so is the batch if its squares are.
  bool is_finite() const {
    return std::all_of(finite_.begin(), finite_.end(), [](char finite) { return finite; });
  }
  void store(int64_t p) {
    const Pair& pair = pairs_[p];
    char* sums = sums_of(pair);
    if (!stored(pair)) {
      sums = static_cast<char*>(scratch(work_bytes(pair) + pair.sums * item_));
      accumulate(pair, 0, 0, rows_, sums, sums + pair.sums * item_);
    }
    kernels_.store(pair.a, pair.other(), sums, pair.target);
  }

  const double* column_sums(int64_t at) const { return column_sums_.data() + at; }

 private:
  bool stored(const Pair& pair) const { return segments_ > 1 || (squares_first_ && pair.diagonal); }
  char* sums_of(const Pair& pair) const { return sums_->data() + pair.first_sum * item_; }
  int64_t work_bytes(const Pair& pair) const { return kernels_.work_bytes(pair.a, pair.b); }

  void accumulate(const Pair& pair, int64_t segment, int64_t first, int64_t rows, void* sums, void* work) {
    double* columns = pair.column_sums == kNoColumnSums ? nullptr : column_sums_.data() + segment * columns_ + pair.column_sums;
    kernels_.accumulate(pair.a, pair.other(), weights_, first, rows, sums, columns, work);
  }

  const FactorKernels& kernels_;
  int64_t item_, rows_, work_ = 0, segments_ = 1, columns_ = 0, size_ = 0;
  Weights weights_;
  bool squares_first_;
  std::vector<Pair> pairs_;
  std::optional<Workspace> sums_;    // of stored pairs: (segments, sums) each
  std::vector<double> column_sums_;  // (segments, columns)
  std::vector<char> finite_;         // one for each pair
};

// A pass over several: the tasks of all are dealt to the threads, those of the most rows first.
void for_each_task_of(const std::vector<Products*>& all, int64_t (Products::*count)() const, void (Products::*run)(int64_t)) {
  constexpr int64_t kWorthThreads = 1 << 19;
  struct Task {
    Products* of;
    int64_t index;
  };
  std::vector<Task> tasks;
  int64_t work = 0;
  for (Products* products : all) {
    work += products->work();
    for (int64_t i = 0; i < (products->*count)(); ++i) tasks.push_back({products, i});
  }
  const auto run_task = [&](int64_t t) { (tasks[t].of->*run)(tasks[t].index); };
  if (work >= kWorthThreads) {
    std::stable_sort(tasks.begin(), tasks.end(), [](const Task& a, const Task& b) { return a.of->rows() > b.of->rows(); });
    for_each_task(static_cast<int64_t>(tasks.size()), run_task);
  } else {
    for (size_t t = 0; t < tasks.size(); ++t) run_task(static_cast<int64_t>(t));
  }
}

void sum_stored(const std::vector<Products*>& all) {
  for (Products* products : all) products->allocate();
  for_each_task_of(all, &Products::segment_count, &Products::sum_segment);
  for_each_task_of(all, &Products::pair_count, &Products::add_segments);
  for (Products* products : all) products->add_column_sums();
}

void store(const std::vector<Products*>& all) { for_each_task_of(all, &Products::pair_count, &Products::store); }

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

// The blocks of a factor, and the products that are added to them
class Update {
 public:
  explicit Update(const FactorUpdate& u)
      : products(u.patches.dtype, u.patches.rows(), u.weights, u.refused != nullptr),
        update_(u),
        groups_(u.factor.groups, along_one_axis(u.patches)) {
    const Factor& f = u.factor;
    const int64_t channels = u.patches.channels / f.groups, offsets = u.patches.offsets();
    for (int64_t g = 0; g < f.groups; ++g) {
      groups_[g].channels = channels;
      groups_[g].data = static_cast<const char*>(u.patches.data) + g * channels * u.patches.channel_step * element_size(u.patches.dtype);
    }
    for (int64_t b = 0; b < f.blocks; ++b) {
      const int64_t group = f.groups > 1 ? b : 0, first = f.groups > 1 ? 0 : b * f.size, used = std::min(f.size, f.features - first);
      const bool bias = f.bias && first + used == f.features;
      void* const out = static_cast<char*>(f.data) + b * f.size * f.size * element_size(f.dtype);
      blocks_.push_back({out, used, bias ? group * channels * offsets : kNoColumnSums});
      const int64_t columns = used - bias, width = block_columns(columns, offsets);
      for (int64_t j = 0; j < columns; j += width)
        for (int64_t i = 0; i <= j; i += width) {
          const auto columns_at = [&](int64_t at) { return Columns{&groups_[group], first + at, std::min(width, columns - at)}; };
          products.add({columns_at(i),
                        columns_at(j),
                        i == j,
                        {out, f.size, i, j, true, u.beta, u.alpha},
                        bias && i == j ? blocks_.back().column_sums + i : kNoColumnSums});
        }
    }
  }

  Products products;

  // Is the batch not to be stored? Then its flag says so.
  bool refuses() const {
    const bool refused = update_.refused && !(products.is_finite() && std::isfinite(update_.bias_squares) && std::isfinite(update_.beta) &&
                                              std::isfinite(update_.alpha));
    if (refused) *update_.refused = 1;
    return refused;
  }
  // What is no product of columns
  void finish() const { update_.factor.dtype == DType::f64 ? finish_as<double>() : finish_as<float>(); }

 private:
  // Features of a group, the bias as the last one or not
  struct Block {
    void* out;
    int64_t used, column_sums;
  };

  template <class S>
  void finish_as() const {
    for (const Block& block : blocks_) {
      S* const out = static_cast<S*>(block.out);
      if (block.column_sums != kNoColumnSums) store_bias(update_, products.column_sums(block.column_sums), block.used - 1, out);
      clear_padding(block.used, update_.factor.size, out);
    }
  }

  const FactorUpdate& update_;
  std::vector<Patches> groups_;
  std::vector<Block> blocks_;
};

}  // namespace

void update_factor(const FactorUpdate& u) {
  if (is_narrow(u)) return update_narrow(u);
  update_factors({u});
}

void update_factors(const std::vector<FactorUpdate>& updates) {
  constexpr int64_t kMostBytes = 64 << 20;  // of sums, about; an update more may come
  for (size_t next = 0; next < updates.size();) {
    std::deque<Update> together;
    for (int64_t bytes = 0; next < updates.size() && bytes < kMostBytes; ++next)
      bytes += together.emplace_back(updates[next]).products.cut_rows();
    std::vector<Products*> all, accepted;
    for (Update& update : together) all.push_back(&update.products);
    sum_stored(all);
    std::vector<const Update*> rest;
    for (Update& update : together) {
      if (update.refuses()) continue;
      accepted.push_back(&update.products);
      rest.push_back(&update);
    }
    store(accepted);
    for (const Update* update : rest) update->finish();
  }
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
  products.cut_rows();
  sum_stored({&products});
  store({&products});
}

}  // namespace mfac_kernels

// Glue of the compressed form of a convolution's factor: checks, and the split of the work over threads. The split depends on the shapes
// alone, so results are the same bit for bit whatever the number of threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <optional>
#include <utility>
#include <vector>

#include "common/tasks.h"
#include "kronecker/lags_checks.h"

namespace mfac_kernels {
namespace {

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int64_t kPanelBytes = 16 << 20;  // of the samples at work at a time: stays in the last level of cache
constexpr int64_t kBandPixels = 512;       // summed in registers at a time: their panels stay in L2 from lag to lag
constexpr int64_t kRunPieces = 32;         // whose tiles stay in L2 beside them

// A batch's image planes as panels of channels, some samples at a time
class Panels {
 public:
  Panels(const Tensor& x, const Patches& patches, int64_t groups)
      : kernels_(lag_kernels(patches.dtype)),
        x_(patches),
        item_(static_cast<int64_t>(x.element_size())),
        rows_(patches.axes[1].size),
        columns_(patches.axes[2].size),
        channels_(patches.channels / groups),
        blocks_(divide_up(channels_, kernels_.tile)),
        panels_(groups * blocks_),
        samples_(std::clamp<int64_t>(kPanelBytes / std::max<int64_t>(1, panels_ * image_bytes()), 1, std::max<int64_t>(1, x_.samples))),
        buffer_(torch::stable::new_empty(x, {panels_ * samples_ * image_bytes()}, ScalarType::Byte)) {}

  const LagKernels& kernels() const { return kernels_; }
  int64_t rows() const { return rows_; }
  int64_t columns() const { return columns_; }
  int64_t channels() const { return channels_; }  // of a group
  int64_t blocks() const { return blocks_; }      // of a group
  int64_t chunks() const { return divide_up(x_.samples, samples_); }
  int64_t samples(int64_t chunk) const { return std::min(samples_, x_.samples - chunk * samples_); }
  int64_t block_channels(int64_t block) const { return std::min(kernels_.tile, channels_ - block * kernels_.tile); }
  int64_t image_elements() const { return rows_ * columns_ * kernels_.tile; }
  int64_t image_bytes() const { return image_elements() * kernels_.item; }

  char* at(int64_t group, int64_t block, int64_t sample, int64_t row, int64_t column) const {
    const int64_t pixel = (((group * blocks_ + block) * samples_ + sample) * rows_ + row) * columns_ + column;
    return static_cast<char*>(buffer_.mutable_data_ptr()) + pixel * kernels_.tile * kernels_.item;
  }

  // Returns whether the chunk is finite, if asked to look.
  bool pack(int64_t chunk, bool look) const {
    std::atomic<bool> finite{true};
    for_each_task(panels_ * samples(chunk), [&](int64_t task) {
      const int64_t panel = task / samples(chunk), sample = task % samples(chunk);
      const int64_t group = panel / blocks_, block = panel % blocks_;
      const int64_t from = (chunk * samples_ + sample) * x_.sample_step + (group * channels_ + block * kernels_.tile) * x_.channel_step;
      char* image = at(group, block, sample, 0, 0);
      kernels_.pack(static_cast<const char*>(x_.data) + from * item_, block_channels(block), x_.channel_step, rows_, x_.axes[1].step,
                    columns_, x_.axes[2].step, image);
      if (look && !kernels_.all_finite(image, image_elements())) finite.store(false, std::memory_order_relaxed);
    });
    return finite.load();
  }

 private:
  const LagKernels& kernels_;
  const Patches& x_;
  int64_t item_, rows_, columns_, channels_, blocks_, panels_, samples_;
  Tensor buffer_;
};

// Runs of neighbouring lags: a task takes one run for one pair of blocks of channels.
std::vector<Interval> runs_of(const std::vector<LagPieces>& lags, int64_t pairs) {
  constexpr int64_t kEnough = 16;
  const int64_t limit = pairs >= kEnough ? kRunPieces : 1;
  std::vector<Interval> runs;
  int64_t pieces = 0;
  for (int64_t i = 0; i < static_cast<int64_t>(lags.size()); ++i) {
    const auto more = static_cast<int64_t>(lags[i].pieces.size());
    if (runs.empty() || pieces + more > limit) {
      runs.push_back({i, i});
      pieces = 0;
    }
    runs.back().end = i + 1;
    pieces += more;
  }
  return runs;
}

// The longest loop innermost
Pixels nest(std::array<std::pair<int64_t, int64_t>, 3> loops) {
  std::sort(loops.begin(), loops.end());
  return {{loops[0].first, loops[1].first, loops[2].first}, {loops[0].second, loops[1].second, loops[2].second}};
}

class LagSums {
 public:
  LagSums(const Panels& panels, const LagForm& form, const LagState& state, bool bias)
      : panels_(panels), kernels_(panels.kernels()), form_(form), state_(state), bias_(bias) {
    for (const Lag& lag : form.lags()) lags_.emplace_back(form, lag, panels.rows(), panels.columns());
    runs_ = runs_of(lags_, state.groups * panels.blocks() * panels.blocks());
    const bool whole = panels.rows() * panels.columns() <= kBandPixels;
    band_rows_ = whole ? panels.rows() : std::max<int64_t>(1, kBandPixels / panels.columns());
    band_samples_ = whole ? std::max<int64_t>(1, kBandPixels / (panels.rows() * panels.columns())) : 1;
  }

  // state <- beta state + alpha (the sums of a packed chunk)
  void add(int64_t chunk, double beta, double alpha) const {
    const int64_t blocks = panels_.blocks(), runs = static_cast<int64_t>(runs_.size());
    for_each_task(state_.groups * blocks * blocks * runs, [&](int64_t task) {
      const int64_t a = task / runs / blocks % blocks, b = task / runs % blocks;
      add_run(chunk, task / runs / blocks / blocks, a, b, runs_[task % runs], beta, alpha);
    });
    if (bias_) for_each_task(state_.groups * blocks, [&](int64_t task) { add_bias(chunk, task / blocks, task % blocks, beta, alpha); });
  }

 private:
  char* slot(int64_t group, int64_t slot, int64_t row, int64_t column) const {
    return static_cast<char*>(state_.data) +
           (group * state_.size + (slot * state_.channels + row) * state_.channels + column) * kernels_.item;
  }

  // body(first sample, samples, rows) for bands of a chunk whose panels fit L2
  template <class Body>
  void for_each_band(int64_t chunk, const Body& body) const {
    const int64_t samples = panels_.samples(chunk);
    for (int64_t n = 0; n < samples; n += band_samples_)
      for (int64_t row = 0; row < panels_.rows(); row += band_rows_)
        body(n, std::min(band_samples_, samples - n), Interval{row, std::min(row + band_rows_, panels_.rows())});
  }

  Pixels pixels(int64_t samples, int64_t rows, int64_t columns) const {
    const int64_t pixel = kernels_.tile;
    return nest({{{samples, panels_.image_elements()}, {rows, panels_.columns() * pixel}, {columns, pixel}}});
  }

  void add_run(int64_t chunk, int64_t group, int64_t a, int64_t b, Interval run, double beta, double alpha) const {
    const int64_t tile_bytes = kernels_.tile * kernels_.tile * kernels_.item;
    int64_t tiles = 0;
    for (int64_t i = run.begin; i < run.end; ++i) tiles += static_cast<int64_t>(lags_[i].pieces.size());
    char* sums = static_cast<char*>(scratch(tiles * tile_bytes));
    std::memset(sums, 0, tiles * tile_bytes);
    for_each_band(chunk, [&](int64_t sample, int64_t samples, Interval band) {
      char* sum = sums;
      for (int64_t i = run.begin; i < run.end; ++i) {
        const LagPieces& lag = lags_[i];
        for (const Piece& piece : lag.pieces) {
          const int64_t first = std::max(piece.rows.begin, band.begin), last = std::min(piece.rows.end, band.end);
          if (first < last && !(lag.symmetric && b > a))
            kernels_.add_products(panels_.at(group, a, sample, first, piece.columns.begin + lag.a_columns),
                                  panels_.at(group, b, sample, first + lag.b_rows, piece.columns.begin + lag.b_columns),
                                  pixels(samples, last - first, piece.columns.end - piece.columns.begin), sum);
          sum += tile_bytes;
        }
      }
    });
    const int64_t tile = kernels_.tile;
    for (int64_t i = run.begin; i < run.end; ++i) {
      const LagPieces& lag = lags_[i];
      for (size_t s = 0; s < lag.of_slot.size() && !(lag.symmetric && b > a); ++s) {
        const int64_t at = lag.first_slot + static_cast<int64_t>(s);
        kernels_.add_tiles(sums, lag.of_slot[s].data(), static_cast<int64_t>(lag.of_slot[s].size()), panels_.block_channels(a),
                           panels_.block_channels(b), beta, alpha, slot(group, at, a * tile, b * tile),
                           lag.symmetric && b < a ? slot(group, at, b * tile, a * tile) : nullptr, state_.channels);
      }
      sums += static_cast<int64_t>(lag.pieces.size()) * tile_bytes;
    }
  }

  // The sums of what each kernel offset meets, over the regions of lag 0, in the first rows of tiles.
  void add_bias(int64_t chunk, int64_t group, int64_t block, double beta, double alpha) const {
    const LagPieces& lag = lags_.front();
    const int64_t pieces = static_cast<int64_t>(lag.pieces.size()), tile_bytes = kernels_.tile * kernels_.tile * kernels_.item;
    char* sums = static_cast<char*>(scratch(pieces * tile_bytes));
    std::memset(sums, 0, pieces * tile_bytes);
    for_each_band(chunk, [&](int64_t sample, int64_t samples, Interval band) {
      for (int64_t p = 0; p < pieces; ++p) {
        const auto& [rows, columns] = lag.pieces[p];
        const int64_t first = std::max(rows.begin, band.begin), last = std::min(rows.end, band.end);
        if (first < last)
          kernels_.add_sums(panels_.at(group, block, sample, first, columns.begin),
                            pixels(samples, last - first, columns.end - columns.begin), sums + p * tile_bytes);
      }
    });
    char* out = slot(group, form_.slots(), 0, block * kernels_.tile);
    for (int64_t o = 0; o < form_.offsets(); ++o) {
      const auto& chosen = lag.of_slot[form_.place(o, o).slot];
      kernels_.add_tiles(sums, chosen.data(), static_cast<int64_t>(chosen.size()), 1, panels_.block_channels(block), beta, alpha,
                         out + o * state_.channels * kernels_.item, nullptr, 0);
    }
  }

  const Panels& panels_;
  const LagKernels& kernels_;
  const LagForm& form_;
  const LagState& state_;
  bool bias_;
  std::vector<LagPieces> lags_;
  std::vector<Interval> runs_;
  int64_t band_rows_, band_samples_;
};

template <class S>
void accumulate(double value, double beta, double alpha, void* out) {
  S& to = *static_cast<S*>(out);
  to = static_cast<S>((beta == 0 ? 0 : beta * static_cast<double>(to)) + alpha * value);
}

void conv_lags_(const Tensor& state, const Tensor& x, std::vector<int64_t> kernel_size, std::vector<int64_t> padding_before,
                std::vector<int64_t> padding_after, std::vector<int64_t> dilation, int64_t groups, bool bias, bool fft, double beta,
                double alpha, std::optional<Tensor> refused) {
  constexpr const char* op = "conv_lags_";
  (void)fft;
  check_scales(op, beta, alpha);
  const LagForm form = check_form(op, kernel_size, padding_before, padding_after, dilation);
  const Patches patches =
      check_conv(op, x, kernel_size, std::vector<int64_t>(kernel_size.size(), 1), padding_before, padding_after, dilation, groups);
  const LagState sums = check_lags(op, state, patches.dtype, form, groups, patches.channels / groups, bias);
  int32_t* flag = check_refused(op, refused);

  const Panels panels(x, patches, groups);
  const int64_t chunks = std::max<int64_t>(1, panels.chunks());
  if (flag) {
    bool finite = true;
    for (int64_t chunk = 0; chunk < chunks && finite; ++chunk) finite = panels.pack(chunk, true);
    if (!finite) {
      *flag = 1;
      return;
    }
  }
  const LagSums lags(panels, form, sums, bias);
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    if (!(flag && chunks == 1)) panels.pack(chunk, false);
    lags.add(chunk, chunk == 0 ? beta : 1, alpha);
  }
  const auto& add_count = patches.dtype == DType::f64 ? accumulate<double> : accumulate<float>;
  for (int64_t group = 0; group < groups && bias; ++group)
    add_count(static_cast<double>(patches.rows()), beta, alpha,
              static_cast<char*>(sums.data) + ((group + 1) * sums.size - 1) * panels.kernels().item);
}

// The dense factor of a group, or its diagonal blocks, a row at a time.
class Expansion {
 public:
  Expansion(const LagForm& form, const LagState& state, const Factor& factor, double beta, double alpha)
      : kernels_(expand_kernels(factor.dtype)),
        form_(form),
        state_(state),
        factor_(factor),
        item_(factor.dtype == DType::f64 ? 8 : 4),
        channels_(state.channels),
        offsets_(form.offsets()),
        beta_(beta),
        alpha_(alpha) {}

  // The rows (c, o) of an offset o and some channels c: whole lines of the blocks that are read transposed.
  static constexpr int64_t kChannels = 16;
  void write_rows(int64_t group, int64_t offset, int64_t channel) const {
    const int64_t count = std::min(kChannels, channels_ - channel);
    const Interval rows{channel * offsets_ + offset, (channel + count - 1) * offsets_ + offset};
    const int64_t first = block_of(rows.begin).begin / offsets_;
    const int64_t width = std::min(divide_up(block_of(rows.end).end, offsets_), channels_) - first;
    char* transposed = static_cast<char*>(scratch(offsets_ * count * width * item_));
    std::vector<const char*> in(offsets_);
    std::vector<int64_t> steps(offsets_);
    for (int64_t o = 0; o < offsets_; ++o) {
      const auto [slot, is_transposed] = form_.place(offset, o);
      if (is_transposed) {
        in[o] = transposed + o * count * width * item_;
        steps[o] = width * item_;
        kernels_.transpose(sums(group, slot, first) + channel * item_, width, count, channels_, const_cast<char*>(in[o]));
      } else {
        in[o] = sums(group, slot, channel) + first * item_;
        steps[o] = channels_ * item_;
      }
    }
    for (int64_t c = 0; c < count; ++c) {
      write_row(group, rows.begin + c * offsets_, first, in.data(), bias_sums(group) + (offset * channels_ + channel + c) * item_);
      for (int64_t o = 0; o < offsets_; ++o) in[o] += steps[o];
    }
  }

  // The row of the bias, and the zeros after it
  void write_last_rows(int64_t group) const {
    if (factor_.bias) {
      const int64_t row = channels_ * offsets_, first = block_of(row).begin / offsets_;
      std::vector<const char*> in(offsets_);
      for (int64_t o = 0; o < offsets_; ++o) in[o] = bias_sums(group) + (o * channels_ + first) * item_;
      write_row(group, row, first, in.data(), bias_sums(group) + offsets_ * channels_ * item_);
    }
    if (factor_.groups == 1) {
      const int64_t rows = factor_.blocks * factor_.size - factor_.features, bytes = rows * factor_.size * item_;
      std::memset(static_cast<char*>(factor_.data) + factor_.blocks * factor_.size * factor_.size * item_ - bytes, 0, bytes);
    }
  }

 private:
  // Of one group. The features of the diagonal block that has row i
  Interval block_of(int64_t i) const {
    const int64_t begin = i / factor_.size * factor_.size;
    return {begin, std::min(begin + factor_.size, factor_.features)};
  }
  const char* sums(int64_t group, int64_t slot, int64_t row) const {
    return static_cast<const char*>(state_.data) + (group * state_.size + (slot * channels_ + row) * channels_) * item_;
  }
  const char* bias_sums(int64_t group) const { return sums(group, form_.slots(), 0); }

  // in: for each offset, from channel `first` on; last: the bias's column
  void write_row(int64_t group, int64_t i, int64_t first, const char* const* in, const char* last) const {
    const Interval block = block_of(i);
    char* row = static_cast<char*>(factor_.data) + ((group * factor_.features + i) * factor_.size) * item_;
    const int64_t begin = block.begin - first * offsets_, columns = (channels_ - first) * offsets_;
    kernels_.interleave(in, last, offsets_, columns, begin, begin + block.end - block.begin, beta_, alpha_, row);
    std::memset(row + (block.end - block.begin) * item_, 0, (factor_.size - block.end + block.begin) * item_);
  }

  const ExpandKernels& kernels_;
  const LagForm& form_;
  const LagState& state_;
  const Factor& factor_;
  int64_t item_, channels_, offsets_;
  double beta_, alpha_;
};

void conv_expand_(const Tensor& factor, const Tensor& state, std::vector<int64_t> kernel_size, std::vector<int64_t> padding_before,
                  std::vector<int64_t> padding_after, std::vector<int64_t> dilation, int64_t groups, bool bias, double beta, double alpha) {
  constexpr const char* op = "conv_expand_";
  check_scales(op, beta, alpha);
  const LagForm form = check_form(op, kernel_size, padding_before, padding_after, dilation);
  const LagState sums = check_lags_of_any_size(op, state, form, groups, bias);
  const Factor out = check_factor(op, factor, dtype_of(op, "state", state), groups, sums.channels * form.offsets(), bias);
  const Expansion expansion(form, sums, out, beta, alpha);
  const int64_t offsets = form.offsets(), row_blocks = divide_up(sums.channels, Expansion::kChannels);
  for_each_task(groups * row_blocks * offsets, [&](int64_t task) {
    expansion.write_rows(task / offsets / row_blocks, task % offsets, task / offsets % row_blocks * Expansion::kChannels);
  });
  for (int64_t group = 0; group < groups; ++group) expansion.write_last_rows(group);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mfac_kernels, CPU, m) {
  m.impl("conv_lags_", TORCH_BOX(&conv_lags_));
  m.impl("conv_expand_", TORCH_BOX(&conv_expand_));
}

}  // namespace mfac_kernels

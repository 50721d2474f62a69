// The batch of the compressed form's glue, laid out for its kernels.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstring>

#include "common/cpu/tasks.h"
#include "lags/checks.h"
#include "lags/cpu/lags_kernels.h"

namespace mfac_kernels {

// Image planes as panels of channels (lags/form.h), a chunk of the samples at a time
class Panels {
 public:
  Panels(const Patches& patches, int64_t groups, int64_t most_samples)
      : kernels_(lag_kernels(patches.dtype)),
        x_(patches),
        item_(element_size(patches.dtype)),
        rows_(patches.axes[1].size),
        columns_(patches.axes[2].size),
        channels_(patches.channels / groups),
        blocks_(divide_up(channels_, kernels_.tile)),
        panels_(groups * blocks_),
        samples_(std::clamp<int64_t>(kPanelBytes / std::max<int64_t>(1, panels_ * image_bytes()), 1,
                                     std::clamp<int64_t>(x_.samples, 1, most_samples))),
        buffer_(panels_ * samples_ * image_bytes()) {}

  const LagKernels& kernels() const { return kernels_; }
  int64_t rows() const { return rows_; }
  int64_t columns() const { return columns_; }
  int64_t channels() const { return channels_; }  // of a group
  int64_t blocks() const { return blocks_; }      // of a group
  int64_t panels() const { return panels_; }      // of all groups
  int64_t chunks() const { return std::max<int64_t>(1, divide_up(x_.samples, samples_)); }
  int64_t samples() const { return samples_; }  // at most
  int64_t samples(int64_t chunk) const { return std::min(samples_, x_.samples - chunk * samples_); }
  int64_t block_channels(int64_t block) const { return std::min(kernels_.tile, channels_ - block * kernels_.tile); }
  int64_t image_elements() const { return rows_ * columns_ * kernels_.tile; }
  int64_t image_bytes() const { return image_elements() * kernels_.item; }

  char* at(int64_t group, int64_t block, int64_t sample, int64_t row, int64_t column) const {
    const int64_t pixel = (((group * blocks_ + block) * samples_ + sample) * rows_ + row) * columns_ + column;
    return buffer_.data() + pixel * kernels_.tile * kernels_.item;
  }

  // Whether the batch is finite. If it is one chunk, it is packed then.
  bool look() const {
    if (chunks() == 1) return pack(0, true);
    if (lies_in_one_piece()) return look_in_place();
    for (int64_t chunk = 0; chunk < chunks(); ++chunk)
      if (!pack(chunk, true)) return false;
    return true;
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
  int64_t elements() const { return x_.channels * rows_ * columns_; }  // of a sample
  bool lies_in_one_piece() const {
    const int64_t row = x_.axes[1].step, column = x_.axes[2].step;
    const bool channels_first = x_.channel_step == rows_ * columns_ && row == columns_ && column == 1;
    const bool channels_last = x_.channel_step == 1 && row == columns_ * x_.channels && column == x_.channels;
    return item_ == kernels_.item && x_.sample_step == elements() && (channels_first || channels_last);
  }
  bool look_in_place() const {
    constexpr int64_t kPiece = 1 << 16;  // elements
    const int64_t total = x_.samples * elements();
    const char* data = static_cast<const char*>(x_.data);
    std::atomic<bool> finite{true};
    for_each_task(divide_up(total, kPiece), [&](int64_t piece) {
      const int64_t first = piece * kPiece, n = std::min(kPiece, total - first), whole = n / kernels_.tile * kernels_.tile;
      alignas(64) char rest[kMaxTileBytes] = {};
      std::memcpy(rest, data + (first + whole) * item_, (n - whole) * item_);
      if (!kernels_.all_finite(data + first * item_, whole) || !kernels_.all_finite(rest, kernels_.tile))
        finite.store(false, std::memory_order_relaxed);
    });
    return finite.load();
  }

  static constexpr int64_t kMaxTileBytes = 128;     // of a row of a tile, with AVX-512
  static constexpr int64_t kPanelBytes = 16 << 20;  // stays in the last level of cache

  const LagKernels& kernels_;
  const Patches& x_;
  int64_t item_, rows_, columns_, channels_, blocks_, panels_, samples_;
  Workspace buffer_;
};

}  // namespace mfac_kernels

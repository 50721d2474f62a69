// The batch of the compressed form's glue, laid out for its kernels.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>

#include "common/tasks.h"
#include "kronecker/lags_checks.h"

namespace mfac_kernels {

// Image planes as panels of channels (lags.h), a chunk of the samples at a time
class Panels {
 public:
  Panels(const Tensor& x, const Patches& patches, int64_t groups, int64_t most_samples)
      : kernels_(lag_kernels(patches.dtype)),
        x_(patches),
        item_(static_cast<int64_t>(x.element_size())),
        rows_(patches.axes[1].size),
        columns_(patches.axes[2].size),
        channels_(patches.channels / groups),
        blocks_(divide_up(channels_, kernels_.tile)),
        panels_(groups * blocks_),
        samples_(std::clamp<int64_t>(kPanelBytes / std::max<int64_t>(1, panels_ * image_bytes()), 1,
                                     std::clamp<int64_t>(x_.samples, 1, most_samples))),
        buffer_(torch::stable::new_empty(x, {panels_ * samples_ * image_bytes()}, ScalarType::Byte)) {}

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
  static constexpr int64_t kPanelBytes = 16 << 20;  // stays in the last level of cache

  const LagKernels& kernels_;
  const Patches& x_;
  int64_t item_, rows_, columns_, channels_, blocks_, panels_, samples_;
  Tensor buffer_;
};

}  // namespace mfac_kernels

// The dense factor of a compressed one
#pragma once
#include <algorithm>
#include <cstring>
#include <vector>

#include "common/cpu/tasks.h"
#include "lags/checks.h"
#include "lags/cpu/lags_kernels.h"

namespace mfac_kernels {

// The dense factor of a group, or its diagonal blocks, a row at a time.
class Expansion {
 public:
  Expansion(const LagForm& form, const LagState& state, const Factor& factor, double beta, double alpha)
      : kernels_(expand_kernels(factor.dtype)),
        form_(form),
        state_(state),
        factor_(factor),
        item_(state.item),
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
  const char* sums(int64_t group, int64_t slot, int64_t row) const { return state_.at(group, slot, row, 0); }
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

}  // namespace mfac_kernels

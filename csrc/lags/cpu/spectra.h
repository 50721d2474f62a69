// Sums of the compressed form by way of the frequencies (fft.h): of whole planes, for all slots of a lag alike.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include "lags/cpu/fft.h"
#include "lags/cpu/panels.h"

namespace mfac_kernels {

class Spectra {
 public:
  static constexpr int64_t kSamples = 32;  // whose products the cost of the sums over the frequencies is small to

  Spectra(const Panels& panels, const LagForm& form, const LagState& state)
      : panels_(panels),
        form_(form),
        state_(state),
        kernels_(fft_kernels(panels.kernels().item == 8 ? DType::f64 : DType::f32)),
        plan_(panels.rows(), panels.columns(), form.y().reach(), form.x().reach()),
        reach_(form.y().kernel()),
        samples_(divide_up(kSamples, panels.samples()) * panels.samples()),
        part_step_((samples_ + 1) * panels.kernels().tile),
        panel_step_(2 * part_step_ * plan_.frequencies()),
        buffer_(panels.panels() * panel_step_ * panels.kernels().item) {
    // Spectra are twice the transforms, their products four times as large.
    const double scale = 0.25 / static_cast<double>(plan_.y.n * plan_.x.n);
    for (int64_t kx = 0; kx < plan_.kept_columns; ++kx)
      for (int64_t ky = 0; ky < plan_.first[kx + 1] - plan_.first[kx]; ++ky)
        for (int64_t lag = 0; lag < reach_; ++lag) {
          const int64_t angle = ky * lag * form.y().dilation() % plan_.y.n;
          const double weight = scale * static_cast<double>(plan_.weight(ky, kx));
          weights_.insert(weights_.end(), {weight * plan_.y.cosines[angle], -weight * plan_.y.sines[angle]});
        }
  }

  bool full() const { return filled_ + panels_.samples() > samples_; }

  // Whether the frequencies are accurate enough for a packed chunk: an entry's error is relative to its channels' norms over the whole
  // plane, the entry itself to those over its region. Refused if the border outweighs the core by far in any channel, as outliers there do.
  bool accurate_for(int64_t chunk) const {
    const Interval rows = form_.y().core(panels_.rows()), columns = form_.x().core(panels_.columns());
    const int64_t core[] = {rows.begin, rows.end, columns.begin, columns.end};
    std::atomic<bool> accurate{true};
    for_each_task(panels_.panels(), [&](int64_t panel) {
      if (!kernels_.mostly_in_core(at_panel(panel, 0), panels_.samples(chunk), panels_.rows(), panels_.columns(), core))
        accurate.store(false, std::memory_order_relaxed);
    });
    return accurate.load();
  }

  void transform(int64_t chunk) {
    const int64_t count = panels_.samples(chunk);
    for_each_task(panels_.panels() * count, [&](int64_t task) {
      const int64_t panel = task / count, sample = task % count;
      kernels_.transform(at_panel(panel, sample), panels_.block_channels(panel % panels_.blocks()), plan_,
                         scratch(kernels_.transform_work(plan_)), at(0, panel, filled_ + sample), part_step_);
    });
    filled_ += count;
  }

  // state <- state + alpha (the sums of what has been transformed since the last time)
  void add(double alpha) {
    if (filled_ == 0) return;
    const int64_t blocks = panels_.blocks(), pairs = state_.groups * blocks * (blocks + 1) / 2;
    const int64_t segments = std::min(plan_.kept_columns, divide_up(kEnough, pairs));
    const int64_t bytes = lags() * 2 * tile_bytes(), column_bytes = reach_ * 4 * tile_bytes();
    std::vector<char> partial(segments > 1 ? pairs * segments * bytes : 0);
    for_each_task(pairs * segments, [&](int64_t task) {
      char* work = static_cast<char*>(scratch(column_bytes + bytes + kernels_.product_work()));
      char* sums = segments > 1 ? partial.data() + task * bytes : work + column_bytes;
      add_columns(task / segments, task % segments, segments, work, work + column_bytes + bytes, sums);
      for (int64_t lag = 0; lag < lags() && segments == 1; ++lag) add_lag(task, lag, sums + lag * 2 * tile_bytes(), alpha);
    });
    if (segments > 1)
      for_each_task(pairs * lags(), [&](int64_t task) {
        char* sums = partial.data() + task / lags() * segments * bytes + task % lags() * 2 * tile_bytes();
        for (int64_t s = 1; s < segments; ++s) kernels_.add(sums + s * bytes, sums);
        add_lag(task / lags(), task % lags(), sums, alpha);
      });
    filled_ = 0;
  }

 private:
  static constexpr int64_t kEnough = 16;  // tasks

  struct Pair {
    int64_t group, a, b;
  };
  Pair pair(int64_t number) const {
    const int64_t blocks = panels_.blocks(), each = blocks * (blocks + 1) / 2;
    int64_t a = 0, b = number % each;  // b <= a
    while (b > a) b -= ++a;
    return {number / each, a, b};
  }
  int64_t lags() const { return static_cast<int64_t>(form_.lags().size()); }
  int64_t tile_bytes() const { return panels_.kernels().tile * panels_.kernels().tile * panels_.kernels().item; }
  const char* at_panel(int64_t panel, int64_t sample) const { return panels_.at(0, panel, sample, 0, 0); }
  char* at(int64_t frequency, int64_t panel, int64_t sample) const {
    return buffer_.data() + (panel * panel_step_ + frequency * 2 * part_step_ + sample * panels_.kernels().tile) * panels_.kernels().item;
  }

  // sums (lags, 2, tile, tile) of a segment of the columns of frequencies
  void add_columns(int64_t number, int64_t segment, int64_t segments, char* column, char* work, char* sums) const {
    const auto [group, a, b] = pair(number);
    const int64_t panel = group * panels_.blocks();
    std::memset(sums, 0, lags() * 2 * tile_bytes());
    for (int64_t kx = plan_.kept_columns * segment / segments; kx < plan_.kept_columns * (segment + 1) / segments; ++kx) {
      const int64_t first = plan_.first[kx];
      kernels_.multiply_column(at(first, panel + a, 0), at(first, panel + b, 0), panels_.block_channels(a), panels_.block_channels(b),
                               filled_, part_step_, plan_.first[kx + 1] - first, weights_.data() + first * reach_ * 2, reach_, work,
                               column);
      for (int64_t i = 0; i < lags(); ++i) {
        const Lag& lag = form_.lags()[i];
        const int64_t angle = kx * std::abs(lag.x) * form_.x().dilation() % plan_.x.n;
        const double sine = -plan_.x.sines[angle];
        kernels_.add_column(column + lag.y * 4 * tile_bytes(), plan_.x.cosines[angle], lag.x < 0 ? -sine : sine,
                            sums + i * 2 * tile_bytes());
      }
    }
  }

  void add_lag(int64_t number, int64_t lag, char* sums, double alpha) const {
    const auto [group, a, b] = pair(number);
    const int64_t tile = panels_.kernels().tile, rows = panels_.block_channels(a), columns = panels_.block_channels(b);
    const int64_t end = lag + 1 < lags() ? form_.lags()[lag + 1].first_slot : form_.slots();
    constexpr int64_t kForward = 0, kBackward = 1;
    kernels_.separate(sums);
    for (int64_t slot = form_.lags()[lag].first_slot; slot < end; ++slot) {
      panels_.kernels().add_tiles(sums, &kForward, 1, rows, columns, 1, alpha, state_.at(group, slot, a * tile, b * tile), nullptr,
                                  state_.channels);
      if (b < a)
        panels_.kernels().add_tiles(sums, &kBackward, 1, rows, columns, 1, alpha, nullptr, state_.at(group, slot, b * tile, a * tile),
                                    state_.channels);
    }
  }

  const Panels& panels_;
  const LagForm& form_;
  const LagState& state_;
  const FftKernels& kernels_;
  FftPlan plan_;
  int64_t reach_, samples_;
  int64_t part_step_;  // one sample longer than need be: powers of two between frequencies would share few lines of a cache
  int64_t panel_step_;
  int64_t filled_ = 0;
  std::vector<double> weights_;  // (frequencies, row lags, 2)
  Workspace buffer_;
};

}  // namespace mfac_kernels

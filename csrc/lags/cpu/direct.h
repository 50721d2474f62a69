// Sums of the compressed form pixel by pixel: of whole regions, or of the border that other ways to whole planes have to leave out.
#pragma once
#include <algorithm>
#include <array>
#include <cstring>
#include <utility>
#include <vector>

#include "lags/cpu/panels.h"

namespace mfac_kernels {

class DirectSums {
 public:
  DirectSums(const Panels& panels, const LagForm& form, const LagState& state, Pieces which)
      : panels_(panels), kernels_(panels.kernels()), form_(form), state_(state) {
    for (const Lag& lag : form.lags()) lags_.emplace_back(form, lag, panels.rows(), panels.columns(), which);
    runs_ = runs_of(lags_, state.groups * panels.blocks() * panels.blocks());
    const bool whole = panels.rows() * panels.columns() <= kBandPixels;
    band_rows_ = whole ? std::max<int64_t>(1, panels.rows()) : std::max<int64_t>(1, kBandPixels / panels.columns());
    band_samples_ = whole ? kBandPixels / std::max<int64_t>(1, panels.rows() * panels.columns()) : 1;
  }

  // state <- beta state + alpha (the sums of a packed chunk)
  void add(int64_t chunk, double beta, double alpha) const {
    const int64_t blocks = panels_.blocks(), runs = static_cast<int64_t>(runs_.size());
    for_each_task(state_.groups * blocks * blocks * runs, [&](int64_t task) {
      const int64_t a = task / runs / blocks % blocks, b = task / runs % blocks;
      add_run(chunk, task / runs / blocks / blocks, a, b, runs_[task % runs], beta, alpha);
    });
  }

  // The sums that a bias meets
  void add_bias(int64_t chunk, double beta, double alpha) const {
    const int64_t blocks = panels_.blocks();
    const LagPieces lag(form_, form_.lags().front(), panels_.rows(), panels_.columns(), Pieces::in_region);
    for_each_task(state_.groups * blocks, [&](int64_t task) { add_bias(chunk, lag, task / blocks, task % blocks, beta, alpha); });
  }

 private:
  static constexpr int64_t kBandPixels = 128;  // summed in registers at a time: a panel of them stays in L1, all the lags' in L2
  static constexpr int64_t kRunPieces = 32;    // whose tiles stay in L2 beside them

  // Runs of neighbouring lags: a task takes one run for one pair of blocks of channels.
  static std::vector<Interval> runs_of(const std::vector<LagPieces>& lags, int64_t pairs) {
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
  static Pixels nest(std::array<std::pair<int64_t, int64_t>, 3> loops) {
    std::sort(loops.begin(), loops.end());
    return {{loops[0].first, loops[1].first, loops[2].first}, {loops[0].second, loops[1].second, loops[2].second}};
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
                                  pixels(samples, last - first, piece.columns.end - piece.columns.begin), panels_.block_channels(a),
                                  panels_.block_channels(b), sum);
          sum += tile_bytes;
        }
      }
    });
    const int64_t tile = kernels_.tile;
    for (int64_t i = run.begin; i < run.end; ++i) {
      const LagPieces& lag = lags_[i];
      for (size_t s = 0; s < lag.of_slot.size() && !(lag.symmetric && b > a); ++s) {
        const auto count = static_cast<int64_t>(lag.of_slot[s].size());
        if (count == 0 && beta == 1) continue;
        const int64_t at = lag.first_slot + static_cast<int64_t>(s);
        kernels_.add_tiles(sums, lag.of_slot[s].data(), count, panels_.block_channels(a), panels_.block_channels(b), beta, alpha,
                           state_.at(group, at, a * tile, b * tile),
                           lag.symmetric && b < a ? state_.at(group, at, b * tile, a * tile) : nullptr, state_.channels);
      }
      sums += static_cast<int64_t>(lag.pieces.size()) * tile_bytes;
    }
  }

  // The sums of what each kernel offset meets, over the regions of lag 0, in the first rows of tiles.
  void add_bias(int64_t chunk, const LagPieces& lag, int64_t group, int64_t block, double beta, double alpha) const {
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
    char* out = state_.at(group, form_.slots(), 0, block * kernels_.tile);
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
  std::vector<LagPieces> lags_;
  std::vector<Interval> runs_;
  int64_t band_rows_, band_samples_;
};

}  // namespace mfac_kernels

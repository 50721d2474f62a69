// The compressed form of a stride-1 convolution's input factor, without torch: which sums it consists of, and from which pieces of the
// image plane each one is added up.
//
// Entry ((c, o), (c', o')) of X X^T is the sum of x_c(p) x_c'(p + l) over the pixels p that kernel offset o meets, zero outside the image,
// where the lag l = dilation (o' - o) is the same for many pairs. Along one axis, o <= o', it runs over the region
//
//   p in [before(o), size - l - after(o')),   before(o) = max(0, dilation o - padding),
//                                             after(o') = max(0, dilation (kernel - 1 - o') - padding_after)
//
// since output q = p + padding - dilation o has to be one (0 <= q < outputs) and both p and p + l pixels. Pairs of one lag differ in these
// margins alone. In the plane a region is the product of one per axis; o' before o along the second axis only swaps the operands' parts.
//
// The form holds one C x C sum per lag and distinct pair of margins, a *slot*: 29 for 3 x 3 kernels and padding 1, in place of 81 blocks,
// and never more than half of them. Slots know nothing of the image's size, so batches of any size add up, and expanding is copying.
//
// The regions of a lag overlap. Their ends cut each axis into intervals, hence the plane into *pieces*: a large one, which all regions
// share, and thin ones along the border. Each piece is summed once and added to the regions that contain it. Nothing is subtracted: an
// entry is a sum over its own pixels, and is as accurate as if it had been computed alone.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "common/types.h"
#include "kronecker/patches.h"

namespace mfac_kernels {

struct Interval {
  int64_t begin, end;
  bool contains(const Interval& other) const { return begin <= other.begin && other.end <= end; }
};

// Pairs of kernel offsets along one axis
class LagAxis {
 public:
  LagAxis(const Axis& axis, int64_t padding_after)
      : kernel_(axis.kernel), dilation_(axis.dilation), padding_(axis.padding), padding_after_(padding_after) {}

  int64_t kernel() const { return kernel_; }
  int64_t dilation() const { return dilation_; }

  // The number of the region of the pair (low, low + lag) among the distinct ones of the lag, lag >= 0.
  int64_t region(int64_t lag, int64_t low) const {
    int64_t number = 0;
    for (int64_t o = 1; o <= low; ++o) number += before(o) != before(o - 1) || after(o + lag) != after(o + lag - 1);
    return number;
  }
  int64_t regions(int64_t lag) const { return region(lag, kernel_ - 1 - lag) + 1; }

  // By number, as far as p and p + l are pixels. Each may be empty.
  std::vector<Interval> intervals(int64_t lag, int64_t size) const {
    std::vector<Interval> result(regions(lag));
    for (int64_t o = 0; o < kernel_ - lag; ++o) result[region(lag, o)] = {before(o), size - dilation_ * lag - after(o + lag)};
    return result;
  }

  // The pixels that all kernel offsets meet
  Interval core(int64_t size) const { return {before(kernel_ - 1), size - after(0)}; }
  int64_t reach() const { return dilation_ * (kernel_ - 1); }

 private:
  int64_t before(int64_t o) const { return std::max<int64_t>(0, dilation_ * o - padding_); }
  int64_t after(int64_t o) const { return std::max<int64_t>(0, dilation_ * (kernel_ - 1 - o) - padding_after_); }

  int64_t kernel_, dilation_, padding_, padding_after_;
};

// In kernel offsets; y > 0, or y = 0 and x >= 0. Its slots are first_slot + (region along y) * (regions along x) + (region along x).
struct Lag {
  int64_t y, x, first_slot;
};

class LagForm {
 public:
  LagForm(const LagAxis& y, const LagAxis& x) : y_(y), x_(x) {
    for (int64_t ly = 0; ly < y.kernel(); ++ly)
      for (int64_t lx = ly > 0 ? 1 - x.kernel() : 0; lx < x.kernel(); ++lx) {
        lags_.push_back({ly, lx, slots_});
        slots_ += y.regions(ly) * x.regions(std::abs(lx));
      }
  }

  const LagAxis& y() const { return y_; }
  const LagAxis& x() const { return x_; }
  const std::vector<Lag>& lags() const { return lags_; }
  int64_t slots() const { return slots_; }
  int64_t offsets() const { return y_.kernel() * x_.kernel(); }

  // Per group of so many channels: (slots, channels, channels) sums of products, then, with a bias, (offsets, channels) sums and the number
  // of patches.
  int64_t size(int64_t channels, bool bias) const { return slots_ * channels * channels + (bias ? offsets() * channels + 1 : 0); }

  // Where the block of the offsets o and o' is: in `slot`, as it stands or transposed.
  struct Place {
    int64_t slot;
    bool transposed;
  };
  Place place(int64_t o, int64_t o2) const {
    if (o > o2) return {place(o2, o).slot, true};
    const int64_t columns = x_.kernel(), y = o / columns, ly = o2 / columns - y, lx = o2 % columns - o % columns;
    const int64_t low = std::min(o % columns, o2 % columns), distance = std::abs(lx);
    const int64_t lag = ly == 0 ? lx : columns + (ly - 1) * (2 * columns - 1) + lx + columns - 1;
    return {lags_[lag].first_slot + y_.region(ly, y) * x_.regions(distance) + x_.region(distance, low), false};
  }

 private:
  LagAxis y_, x_;
  std::vector<Lag> lags_;
  int64_t slots_ = 0;
};

// A rectangle of the plane; rows and columns are those of the operand that comes first along the axis.
struct Piece {
  Interval rows, columns;
};

// What a slot is made of: the pieces that its region consists of; or those of the whole plane that it lacks, of which the large one is
// none.
enum class Pieces { in_region, out_of_region };

// The pieces of one lag, for images of one size, and the shifts of the operands in pixels.
struct LagPieces {
  std::vector<Piece> pieces;
  std::vector<std::vector<int64_t>> of_slot;
  int64_t first_slot;
  int64_t b_rows, a_columns, b_columns;
  bool symmetric;  // lag 0: the sums are symmetric matrices

  LagPieces(const LagForm& form, const Lag& lag, int64_t rows, int64_t columns, Pieces which)
      : first_slot(lag.first_slot),
        b_rows(form.y().dilation() * lag.y),
        a_columns(form.x().dilation() * std::max<int64_t>(0, -lag.x)),
        b_columns(form.x().dilation() * std::max<int64_t>(0, lag.x)),
        symmetric(lag.y == 0 && lag.x == 0) {
    const auto y = form.y().intervals(lag.y, rows), x = form.x().intervals(std::abs(lag.x), columns);
    of_slot.resize(y.size() * x.size());
    for (const Interval& r : cut(y, rows - b_rows))
      for (const Interval& c : cut(x, columns - a_columns - b_columns)) {
        const auto number = static_cast<int64_t>(pieces.size());
        bool needed = false;
        for (size_t i = 0; i < of_slot.size(); ++i)
          if ((y[i / x.size()].contains(r) && x[i % x.size()].contains(c)) == (which == Pieces::in_region)) {
            of_slot[i].push_back(number);
            needed = true;
          }
        if (needed) pieces.push_back({r, c});
      }
  }

 private:
  // [0, size) cut at the ends of the intervals
  static std::vector<Interval> cut(const std::vector<Interval>& intervals, int64_t size) {
    std::vector<int64_t> ends{0, std::max<int64_t>(0, size)};
    for (const Interval& i : intervals)
      if (i.begin < i.end) ends.insert(ends.end(), {i.begin, i.end});
    std::sort(ends.begin(), ends.end());
    ends.erase(std::unique(ends.begin(), ends.end()), ends.end());
    std::vector<Interval> result;
    for (size_t i = 1; i < ends.size(); ++i) result.push_back({ends[i - 1], ends[i]});
    return result;
  }
};

}  // namespace mfac_kernels

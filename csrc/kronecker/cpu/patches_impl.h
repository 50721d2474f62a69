// Columns of a patch matrix, a few rows at a time, side by side in panels: panels[c / kTile, row, c % kTile].
//
// For kernels of more than one offset, the pixels that the rows meet are first staged channel-last with the padding around them, once per
// line of the kernel: a patch then is a few contiguous runs, one per line where the kernel is not dilated. Columns are taken in the order
// (offset, channel), in which runs are as long as possible; column_order() tells the order of the patch matrix.
//
// Floor: columns x rows elements written. A block of b columns meets b others, so that packing costs some 2 / b of the multiplications.

constexpr int64_t kDepth = 128;  // rows at a time: a panel takes 16 KiB, half of L1
// From panel to panel: a cache line more than they hold, so that a row's pieces do not fall into one set of the cache.
template <class S>
constexpr int64_t kPanel = kTile<S> * kDepth + 64 / sizeof(S);

// `length` rows from output (z, y, x) of one sample, along the last axis.
struct Segment {
  int64_t sample, z, y, x, length;
};

// Cuts rows [first, first + rows) into segments; returns how many.
inline int64_t cut_rows(const Patches& p, int64_t first, int64_t rows, Segment* segments) {
  const int64_t width = p.axes[2].outputs, height = p.axes[1].outputs, depth = p.axes[0].outputs;
  int64_t x = first % width, y = first / width % height, z = first / width / height % depth, n = first / width / height / depth, count = 0;
  while (rows > 0) {
    const int64_t length = rows < width - x ? rows : width - x;
    segments[count++] = {n, z, y, x, length};
    rows -= length;
    x = 0;
    if (++y == height) {
      y = 0;
      if (++z == depth) z = 0, ++n;
    }
  }
  return count;
}

template <class S>
MFAC_INLINE S widen_one(S x) {
  return x;
}
MFAC_INLINE float widen_one(bf16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
MFAC_INLINE float widen_one(fp16 x) {
  const fp16 padded[kLanes] = {x};
  return widen32(padded)[0];
}

// Where `gather` puts channel c of pixel p: side by side, or in panels.
template <class S>
struct SideBySide {
  S* out;
  int64_t channels;  // of all that are put there
  S* at(int64_t p, int64_t c) const { return out + p * channels + c; }
  SideBySide from(int64_t p) const { return {at(p, 0), channels}; }
};
template <class S>
struct InPanels {
  S* out;
  S* at(int64_t p, int64_t c) const { return out + c / kTile<S> * kPanel<S> + p * kTile<S> + c % kTile<S>; }
  InPanels from(int64_t p) const { return {at(p, 0)}; }
};

// `height` channels of `width` pixels, each at most the lanes of a vector
template <class S, class T, class Place>
MFAC_INLINE void gather_square(const T* x, int64_t channel_step, int64_t height, int64_t width, const Place& to, int64_t p, int64_t c) {
  constexpr int64_t n = kLanesOf<S>;
  Vec<S> v[n];
  load_transposed<S>(x, channel_step, height, width, v);
  if (height == n && width == n) {
#pragma GCC unroll 16
    for (int64_t i = 0; i < n; ++i) store(to.at(p + i, c), v[i]);
  } else {
    for (int64_t i = 0; i < width; ++i) __builtin_memcpy(to.at(p + i, c), &v[i], height * sizeof(S));
  }
}

// to.at(p, c) = x[c * channel_step + p * pixel_step]
template <class S, class T, class Place>
void gather(const T* x, int64_t channel_step, int64_t pixel_step, int64_t channels, int64_t pixels, const Place& to) {
  constexpr int64_t n = kLanesOf<S>, kAhead = 4096;  // bytes
  if (channel_step == 1) {
    const int64_t ahead = (kAhead / (channels * static_cast<int64_t>(sizeof(T))) + 1) * pixel_step;
    for (int64_t p = 0; p < pixels; ++p, x += pixel_step) {
      int64_t c = 0;
      for (; c + n <= channels; c += n) {
        prefetch(x + ahead + c);
        store(to.at(p, c), load_as<S>(x + c));
      }
      if (c < channels) {
        const Vec<S> rest = load_first_as<S>(x + c, channels - c);
        __builtin_memcpy(to.at(p, c), &rest, (channels - c) * sizeof(S));
      }
    }
  } else if (pixel_step == 1) {
    for (int64_t c = 0; c < channels; c += n)
      for (int64_t next = 0; next < pixels; next += n) {
        const int64_t p = next + n <= pixels || pixels < n ? next : pixels - n;  // the last square covers some pixels twice
        // A line of each of the next channels, to L2: their runs are too short for the hardware to foresee.
        if (c + n < channels && next % (64 / sizeof(T)) == 0)
#pragma GCC unroll 16
          for (int64_t i = 0; i < n; ++i) __builtin_prefetch(x + (c + n + i) * channel_step + p, 0, 2);
        gather_square<S>(x + c * channel_step + p, channel_step, channels - c < n ? channels - c : n, pixels < n ? pixels : n, to, p, c);
      }
  } else {
    for (int64_t p = 0; p < pixels; ++p)
      for (int64_t c = 0; c < channels; ++c) *to.at(p, c) = widen_one(x[c * channel_step + p * pixel_step]);
  }
}

// The same for the pixels that a segment meets in one line of the kernel, `pace` apart; those outside of the input are zero.
template <class S, class T, class Place>
void gather_line(const Patches& p, int64_t channel, int64_t channels, const Segment& segment, int64_t line, int64_t pace, int64_t pixels,
                 const Place& to) {
  const auto& [az, ay, ax] = p.axes;
  const int64_t z = segment.z * az.stride + line / ay.kernel * az.dilation - az.padding;
  const int64_t y = segment.y * ay.stride + line % ay.kernel * ay.dilation - ay.padding;
  const int64_t x = segment.x * ax.stride - ax.padding;
  int64_t begin = x < 0 ? (pace - 1 - x) / pace : 0, end = ax.size > x ? (ax.size - x + pace - 1) / pace : 0;
  if (end > pixels) end = pixels;
  if (z < 0 || z >= az.size || y < 0 || y >= ay.size || begin >= end) begin = end = pixels;
  const auto clear = [&](int64_t from, int64_t to_end) {
    for (int64_t i = from; i < to_end; ++i)
      for (int64_t c = 0; c < channels; c += kTile<S>)
        __builtin_memset(to.at(i, c), 0, (channels - c < kTile<S> ? channels - c : kTile<S>)*sizeof(S));
  };
  clear(0, begin);
  if (begin < end) {
    const T* pixel = static_cast<const T*>(p.data) + segment.sample * p.sample_step + channel * p.channel_step + z * az.step + y * ay.step +
                     (x + begin * pace) * ax.step;
    gather<S>(pixel, p.channel_step, ax.step * pace, channels, end - begin, to.from(begin));
  }
  clear(end, pixels);
}

// The pixels that a few segments of rows meet, line by line with the padding around them.
struct Staging {
  int64_t pace, stride, reach;         // along the last axis: pixels per staged one, staged ones per output, staged ones of a patch
  int64_t pitch, lines, segments = 0;  // staged pixels of a line, lines of a segment, segments at most

  explicit Staging(const Patches& p) {
    const Axis& axis = p.axes[2];
    pace = axis.kernel == 1 ? axis.stride : 1;
    stride = axis.kernel == 1 ? 1 : axis.stride;
    reach = axis.kernel == 1 ? 1 : (axis.kernel - 1) * axis.dilation + 1;
    const int64_t longest = axis.outputs < kDepth ? axis.outputs : kDepth;
    pitch = (longest - 1) * stride + reach;
    lines = p.axes[0].kernel * p.axes[1].kernel;
    if (longest > 0) segments = (kDepth - 1) / longest + 2 < kDepth ? (kDepth - 1) / longest + 2 : kDepth;
  }
  int64_t segment_size() const { return lines * pitch; }  // in pixels
  int64_t size() const { return segments * segment_size(); }

  // From the first staged pixel of a row to the one at a kernel offset
  int64_t distance(const Patches& p, int64_t offset) const {
    const Axis& axis = p.axes[2];
    return offset / axis.kernel * pitch + offset % axis.kernel * axis.dilation;
  }

  template <class T, class S>
  void stage(const Patches& p, int64_t channel, int64_t channels, const Segment* segment, int64_t count, const SideBySide<S>& to) const {
    for (int64_t s = 0; s < count; ++s)
      for (int64_t line = 0; line < lines; ++line)
        gather_line<S, T>(p, channel, channels, segment[s], line, pace, (segment[s].length - 1) * stride + reach,
                          to.from(s * segment_size() + line * pitch));
  }
};

// Packs the columns of one block.
template <class T>
class Packer {
 public:
  using S = Compute<T>;

  explicit Packer(const Columns& columns)
      : p_(*columns.patches), staging_(p_), first_(columns.first), count_(columns.count), channel_(first_ / p_.offsets()) {
    channels_ = (first_ + count_ + p_.offsets() - 1) / p_.offsets() - channel_;
  }

  static constexpr int64_t panels_size(int64_t columns) { return (columns + kTile<S> - 1) / kTile<S> * kPanel<S>; }
  int64_t staged_size() const { return p_.offsets() == 1 ? 0 : staging_.size() * channels_ + kLanesOf<S>; }

  void pack(const Segment* segments, int64_t count, S* staged, S* panels) const {
    if (p_.offsets() == 1) {
      const int64_t rest = count_ % kTile<S>;
      S* last = panels + count_ / kTile<S> * kPanel<S>;
      if (rest) __builtin_memset(last, 0, kTile<S> * kDepth * sizeof(S));
      int64_t row = 0;
      for (int64_t s = 0; s < count; row += segments[s++].length)
        gather_line<S, T>(p_, channel_, channels_, segments[s], 0, staging_.pace, segments[s].length, InPanels<S>{panels}.from(row));
      return;
    }
    staging_.template stage<T>(p_, channel_, channels_, segments, count, SideBySide<S>{staged, channels_});
    copy_runs(segments, count, staged, panels);
  }

  // body(first column of the run in the packed order, channels in the run, its first channel of those staged, offset)
  template <class Body>
  void for_each_run(const Body& body) const {
    const int64_t offsets = p_.offsets();
    int64_t at = 0;
    for (int64_t o = 0; o < offsets; ++o) {
      // channels c with first <= c offsets + o < first + count
      const int64_t begin = (first_ - o + offsets - 1) / offsets - channel_, end = (first_ + count_ - o + offsets - 1) / offsets - channel_;
      if (begin < end) body(at, end - begin, begin, o);
      at += end - begin;
    }
  }

  // order[packed column] = column of the block
  void column_order(int32_t* order) const {
    const int64_t offsets = p_.offsets();
    for_each_run([&](int64_t at, int64_t n, int64_t channel, int64_t offset) {
      for (int64_t i = 0; i < n; ++i) order[at + i] = static_cast<int32_t>((channel_ + channel + i) * offsets + offset - first_);
    });
  }

 private:
  struct Run {
    int32_t to, length;
    int64_t from;
  };

  // A run is copied in whole vectors: what it writes too much belongs to runs and rows that follow.
  void copy_runs(const Segment* segments, int64_t count, const S* staged, S* panels) const {
    Run runs[kTile<S> + 1];
    int64_t filled = 0, panel = 0;
    const auto flush = [&] {
      copy_panel(segments, count, staged, runs, filled, panels + panel++ * kPanel<S>);
      filled = 0;
    };
    for_each_run([&](int64_t at, int64_t n, int64_t channel, int64_t offset) {
      int64_t from = staging_.distance(p_, offset) * channels_ + channel;
      while (n > 0) {
        const int64_t to = at % kTile<S>, length = n < kTile<S> - to ? n : kTile<S> - to;
        if (filled > 0 && runs[filled - 1].from + runs[filled - 1].length == from)
          runs[filled - 1].length += static_cast<int32_t>(length);
        else
          runs[filled++] = {static_cast<int32_t>(to), static_cast<int32_t>(length), from};
        at += length;
        from += length;
        n -= length;
        if (at % kTile<S> == 0) flush();
      }
    });
    if (filled > 0) flush();
  }
  void copy_panel(const Segment* segments, int64_t count, const S* staged, const Run* runs, int64_t filled, S* out) const {
    const int64_t used = runs[filled - 1].to + runs[filled - 1].length;
    for (int64_t s = 0; s < count; ++s) {
      const S* from = staged + s * staging_.segment_size() * channels_;
      for (int64_t i = 0; i < segments[s].length; ++i, from += staging_.stride * channels_, out += kTile<S>) {
        for (int64_t r = 0; r < filled; ++r)
          for (int64_t v = 0; v < runs[r].length; v += kLanesOf<S>) store(out + runs[r].to + v, load<Vec<S>>(from + runs[r].from + v));
        for (int64_t v = used; v < kTile<S>; v += kLanesOf<S>) store(out + v, Vec<S>{});
      }
    }
  }

  const Patches& p_;
  Staging staging_;
  int64_t first_, count_;
  int64_t channel_, channels_;  // that the columns belong to
};

// The rows that follow those of a step, where they follow in memory: prefetched in parts while products are formed. With few of these the
// hardware is as early.
template <class T>
class RowsAhead {
 public:
  RowsAhead(const Columns& columns, int64_t first, int64_t rows, int64_t parts)
      : next_(static_cast<const T*>(columns.patches->data) + first * columns.patches->axes[2].step + columns.first),
        step_(columns.patches->axes[2].step),
        width_(columns.count),
        rows_(columns.patches->channel_step == 1 && columns.patches->offsets() == 1 && parts >= kFewestParts ? rows : 0),
        parts_(parts) {}

  void prefetch_part() {
    for (const int64_t end = ++part_ * rows_ / parts_; row_ < end; ++row_, next_ += step_)
      for (int64_t c = 0; c < width_; c += 64 / sizeof(T)) prefetch(next_ + c);
  }

 private:
  static constexpr int64_t kFewestParts = 8;

  const T* next_;
  int64_t step_, width_, rows_, parts_, part_ = 0, row_ = 0;
};

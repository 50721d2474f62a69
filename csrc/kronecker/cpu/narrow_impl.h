// Sums of products of the columns of many narrow groups (depthwise convolutions): S_g = sum_r w_r row_gr row_gr^T, one group per lane.
//
// Floor: n (n + 1) / 2 multiply-adds per row and group for n columns; tiles of one group would compute eight rows of sixteen for them.
// Fast because a vector holds one column of as many groups as there are lanes: pixels are staged once with these groups side by side, a
// column is a distance in what is staged, and blocks of kGrid x kGrid columns stay in registers. Sums are as short as those of
// factor_impl.h.

constexpr int kGrid = 3;

template <class T>
struct NarrowWork {
  using S = Compute<T>;
  static constexpr int64_t kGroups = kLanesOf<S>;
  int64_t columns, blocks, staged, sums;

  explicit NarrowWork(const Patches& group)
      : columns(group.channels * group.offsets()),
        blocks((columns + kGrid - 1) / kGrid),
        staged(Staging(group).size() * group.channels * kGroups),
        sums(blocks * (blocks + 1) / 2 * kGrid * kGrid * kGroups) {}
  int64_t bytes() const { return (staged + 2 * sums) * sizeof(S) + columns * kGroups * sizeof(double); }
};

template <class T>
int64_t narrow_work_bytes(const Patches& group) {
  return NarrowWork<T>(group).bytes();
}

// sums += the products of columns a[i] and b[j] over `rows` rows, `step` apart
template <bool weighted, class S>
MFAC_INLINE void multiply_lanes(const S* const (&a)[kGrid], const S* const (&b)[kGrid], int64_t step, int64_t rows, const S* weights,
                                Vec<S> (&sums)[kGrid][kGrid]) {
  using V = Vec<S>;
  for (int64_t r = 0, at = 0; r < rows; ++r, at += step) {
    V y[kGrid];
#pragma GCC unroll 3
    for (int j = 0; j < kGrid; ++j) y[j] = load<V>(b[j] + at);
#pragma GCC unroll 3
    for (int i = 0; i < kGrid; ++i) {
      V x = load<V>(a[i] + at);
      if constexpr (weighted) x *= splat(weights[r]);
#pragma GCC unroll 3
      for (int j = 0; j < kGrid; ++j) sums[i][j] += x * y[j];
    }
  }
}

// See NarrowKernels::accumulate.
template <class T>
void accumulate_narrow(const Patches& group, int64_t group_step, int64_t groups, const Weights& weights, int64_t first, int64_t rows,
                       void* out, double* column_sums, void* memory) {
  using S = Compute<T>;
  using V = Vec<S>;
  constexpr int64_t kGroups = NarrowWork<T>::kGroups;
  const NarrowWork<T> work(group);
  const Staging staging(group);
  const int64_t columns = work.columns, pixel = group.channels * kGroups, step = staging.stride * pixel, positions = group.positions();
  S *staged = static_cast<S*>(memory), *sums = staged + work.staged, *total = sums + work.sums;
  double* wide_sums = reinterpret_cast<double*>(total + work.sums);
  __builtin_memset(total, 0, work.sums * sizeof(S));
  __builtin_memset(wide_sums, 0, columns * kGroups * sizeof(double));
  if (groups < kGroups) __builtin_memset(staged, 0, work.staged * sizeof(S));
  // Where column c of the first row lies; columns past the end repeat the first.
  int64_t distance[kNarrowColumns + kGrid];
  for (int64_t c = 0; c < work.blocks * kGrid; ++c)
    distance[c] = c < columns ? staging.distance(group, c % group.offsets()) * pixel + c / group.offsets() * kGroups : 0;
  Patches lanes = group;  // a channel of each group
  lanes.channel_step = group_step;
  Segment segments[kDepth];
  S row_weights[kDepth];

  for (int64_t block = 0; block < rows; block += kDepth * kFlush) {
    const int64_t block_end = rows - block < kDepth * kFlush ? rows : block + kDepth * kFlush;
    __builtin_memset(sums, 0, work.sums * sizeof(S));
    for (int64_t done = block; done < block_end; done += kDepth) {
      const int64_t depth = block_end - done < kDepth ? block_end - done : kDepth, count = cut_rows(group, first + done, depth, segments);
      for (int64_t c = 0; c < group.channels; ++c) {
        lanes.data = static_cast<const T*>(group.data) + c * group.channel_step;
        staging.template stage<T>(lanes, 0, groups, segments, count, SideBySide<S>{staged + c * kGroups, pixel});
      }
      if (weights.values) load_weights(weights, positions, first + done, depth, row_weights);
      S* sum = sums;
      for (int64_t i = 0; i < work.blocks; ++i)
        for (int64_t j = i; j < work.blocks; ++j) {
          V v[kGrid][kGrid] = {};
          const S* weight = row_weights;
          for (int64_t s = 0; s < count; weight += segments[s++].length) {
            const S *a[kGrid], *b[kGrid], *from = staged + s * staging.segment_size() * pixel;
            for (int k = 0; k < kGrid; ++k) a[k] = from + distance[i * kGrid + k], b[k] = from + distance[j * kGrid + k];
            if (weights.values)
              multiply_lanes<true>(a, b, step, segments[s].length, weight, v);
            else
              multiply_lanes<false>(a, b, step, segments[s].length, weight, v);
          }
          for (int k = 0; k < kGrid * kGrid; ++k, sum += kGroups) store(sum, load<V>(sum) + v[k / kGrid][k % kGrid]);
        }
      for (int64_t c = 0; column_sums && c < columns; ++c) {
        V v = {};
        const S* weight = row_weights;
        for (int64_t s = 0; s < count; weight += segments[s++].length)
          for (int64_t r = 0; r < segments[s].length; ++r) {
            const V x = load<V>(staged + s * staging.segment_size() * pixel + distance[c] + r * step);
            v += weights.values ? x * splat(weight[r]) : x;
          }
        add_to(wide_sums + c * kGroups, v);
      }
    }
    for (int64_t i = 0; i < work.sums; i += kGroups) store(total + i, load<V>(total + i) + load<V>(sums + i));
  }

  S* result = static_cast<S*>(out);
  const S* sum = total;
  for (int64_t i = 0; i < work.blocks; ++i)
    for (int64_t j = i; j < work.blocks; ++j, sum += kGrid * kGrid * kGroups)
      for (int64_t k = 0; k < kGrid * kGrid; ++k) {
        const int64_t row = i * kGrid + k / kGrid, column = j * kGrid + k % kGrid;
        if (row > column || column >= columns) continue;
        for (int64_t g = 0; g < groups; ++g)
          result[(g * columns + row) * columns + column] = result[(g * columns + column) * columns + row] = sum[k * kGroups + g];
      }
  for (int64_t i = 0; column_sums && i < groups * columns; ++i) column_sums[i] = wide_sums[i % columns * kGroups + i / columns];
}

template <class T>
constexpr NarrowKernels narrow_kernels_of() {
  return {kLanesOf<Compute<T>>, narrow_work_bytes<T>, accumulate_narrow<T>};
}
constexpr NarrowKernels kNarrowKernels[kDTypes] = {narrow_kernels_of<float>(), narrow_kernels_of<double>(), narrow_kernels_of<bf16>(),
                                                   narrow_kernels_of<fp16>()};

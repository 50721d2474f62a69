// The sums of the compressed form (lags/form.h): products of panels, 32 channels side by side (16 without AVX-512), over rectangles of
// pixels.
//
// Floor: 2 C^2 flops per pixel and lag, (lags - 1/2) of them: 25 pixels C^2 for 3 x 3 kernels against 81 for half of the patch matrix's
// product and 162 for all of it; bound by arithmetic. Fast because the image is laid out once, a pixel's channels side by side: a lag is
// then a pointer offset, a rectangle three loops with fixed steps around one register tile, and two loads feed each pair of multiply-adds.
#include "common/cpu/syrk_impl.h"

// panel (columns, kTile) <- x at (channel, column), neighbours side by side: transposed a square of vectors at a time
template <class T, class S>
void pack_planes(const T* x, int64_t channels, int64_t channel_step, int64_t columns, S* panel) {
  constexpr int64_t n = kLanesOf<S>;
  for (int64_t c = 0; c < kTile<S>; c += n) {
    const int64_t height = channels - c < n ? channels - c : n;
    for (int64_t j = 0; j < columns; j += n) {
      const int64_t width = columns - j < n ? columns - j : n;
      Vec<S> v[n];
      load_transposed<S>(x + c * channel_step + j, channel_step, height, width, v);
      for (int64_t i = 0; i < width; ++i) store(panel + (j + i) * kTile<S> + c, v[i]);
    }
  }
}

template <class T>
void pack_image(const void* image, int64_t channels, int64_t channel_step, int64_t rows, int64_t row_step, int64_t columns,
                int64_t column_step, void* out) {
  using S = Compute<T>;
  const T* x = static_cast<const T*>(image);
  S* panel = static_cast<S*>(out);
  if (column_step == 1 && row_step == columns) {
    pack_planes(x, channels, channel_step, rows * columns, panel);
    return;
  }
  for (int64_t i = 0; i < rows; ++i, x += row_step) {
    if (column_step == 1) {
      pack_planes(x, channels, channel_step, columns, panel + i * columns * kTile<S>);
      continue;
    }
    for (int64_t j = 0; j < columns; ++j) {
      const T* pixel = x + j * column_step;
      S* to = panel + (i * columns + j) * kTile<S>;
      if (channel_step == 1 && channels == kTile<S>) {
        widen_row(pixel, kTile<S>, to, kTile<S>);
      } else if (channel_step == 1) {
        widen_row(pixel, channels, to, kTile<S>);
      } else {
        T row[kTile<S>];
        for (int64_t c = 0; c < channels; ++c) row[c] = pixel[c * channel_step];
        widen_row(row, channels, to, kTile<S>);
      }
    }
  }
}

// v * 0 is 0, or NaN. n: a multiple of the lanes.
template <class S>
bool all_finite(const void* panel, int64_t n) {
  using V = Vec<S>;
  const S* p = static_cast<const S*>(panel);
  V bad = {};
  for (int64_t i = 0; i < n; i += kLanesOf<S>) bad += load<V>(p + i) * splat(S(0));
  S lanes[kLanesOf<S>];
  store(lanes, bad);
  S sum = 0;
  for (S lane : lanes) sum += lane;
  return sum == 0;
}

// kRows rows and the first kVectors vectors of a tile
template <int kRows, int kVectors, class S>
MFAC_INLINE void add_strip(const S* a_panel, const S* b_panel, const Pixels& pixels, S* tile) {
  using V = Vec<S>;
  const auto& [counts, steps] = pixels;
  V sum[kRows][kVectors] = {};
  for (int64_t i = 0; i < counts[0]; ++i)
    for (int64_t j = 0; j < counts[1]; ++j) {
      const S *a = a_panel + i * steps[0] + j * steps[1], *b = b_panel + i * steps[0] + j * steps[1];
#pragma GCC unroll 4
      for (int64_t k = 0; k < counts[2]; ++k) {
        V x[kVectors];
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) x[v] = load<V>(b + k * steps[2] + v * kLanesOf<S>);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
          for (int v = 0; v < kVectors; ++v) sum[r][v] += splat(a[k * steps[2] + r]) * x[v];
      }
    }
  add_rows(sum, tile);
}

template <class S>
void add_products(const void* a_panel, const void* b_panel, const Pixels& pixels, int64_t rows, int64_t columns, void* out) {
  const S *a = static_cast<const S*>(a_panel), *b = static_cast<const S*>(b_panel);
  for_each_strip<S>(rows, columns > kLanesOf<S> ? rows : 0, [&]<int kRows, int kVectors>(int64_t row) {
    add_strip<kRows, kVectors>(a + row, b, pixels, static_cast<S*>(out) + row * kTile<S>);
  });
}

template <class S>
void add_sums(const void* panel, const Pixels& pixels, void* out) {
  using V = Vec<S>;
  const auto& [counts, steps] = pixels;
  S* sums = static_cast<S*>(out);
  for (int64_t c = 0; c < kTile<S>; c += kLanesOf<S>) {
    V sum = {};
    for (int64_t i = 0; i < counts[0]; ++i)
      for (int64_t j = 0; j < counts[1]; ++j) {
        const S* a = static_cast<const S*>(panel) + i * steps[0] + j * steps[1] + c;
        for (int64_t k = 0; k < counts[2]; ++k, a += steps[2]) sum += load<V>(a);
      }
    store(sums + c, load<V>(sums + c) + sum);
  }
}

// out <- beta out + alpha in, n elements
template <class S>
MFAC_INLINE void scale_and_add(const S* in, int64_t n, S beta, S alpha, S* out) {
  if (beta == S(0))
    for (int64_t i = 0; i < n; ++i) out[i] = alpha * in[i];
  else
    for (int64_t i = 0; i < n; ++i) out[i] = beta * out[i] + alpha * in[i];
}

template <class S>
void add_tiles(const void* all, const int64_t* chosen, int64_t count, int64_t rows, int64_t columns, double beta, double alpha, void* out,
               void* mirror, int64_t stride) {
  const S* tiles = static_cast<const S*>(all);
  alignas(64) S sum[kTileArea<S>] = {}, transposed[kTileArea<S>];
  for (int64_t t = 0; t < count; ++t)
    for (int64_t i = 0; i < kTileArea<S>; i += kLanesOf<S>)
      store(sum + i, load<Vec<S>>(sum + i) + load<Vec<S>>(tiles + chosen[t] * kTileArea<S> + i));
  for (int64_t i = 0; out && i < rows; ++i)
    scale_and_add(sum + i * kTile<S>, columns, S(beta), S(alpha), static_cast<S*>(out) + i * stride);
  if (mirror) {
    transpose_tile(sum, transposed);
    for (int64_t i = 0; i < columns; ++i)
      scale_and_add(transposed + i * kTile<S>, rows, S(beta), S(alpha), static_cast<S*>(mirror) + i * stride);
  }
}

// ---- the dense factor -----------------------------------------------------------------------------------------------------------

template <class S>
void transpose_rows(const void* from, int64_t rows, int64_t columns, int64_t stride, void* to) {
  const S* in = static_cast<const S*>(from);
  S* out = static_cast<S*>(to);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j) out[j * rows + i] = in[i * stride + j];
}

template <class S>
void interleave(const char* const* in, const void* last, int64_t offsets, int64_t columns, int64_t begin, int64_t end, double beta,
                double alpha, void* to) {
  S* out = static_cast<S*>(to);
  int64_t channel = begin / offsets, offset = begin % offsets;
  for (int64_t i = begin; i < end; ++i, ++out) {
    const S* v = i == columns ? static_cast<const S*>(last) : reinterpret_cast<const S*>(in[offset]) + channel;
    *out = (beta == 0 ? S(0) : S(beta) * *out) + S(alpha) * *v;
    if (++offset == offsets) offset = 0, ++channel;
  }
}

template <class T, class S = Compute<T>>
constexpr LagKernels lag_kernels_of() {
  return {kTile<S>, sizeof(S), pack_image<T>, all_finite<S>, add_products<S>, add_sums<S>, add_tiles<S>};
}
constexpr LagKernels kLagKernels[kDTypes] = {lag_kernels_of<float>(), lag_kernels_of<double>(), lag_kernels_of<bf16>(),
                                             lag_kernels_of<fp16>()};
constexpr ExpandKernels kExpandKernels[kDTypes] = {{transpose_rows<float>, interleave<float>},
                                                   {transpose_rows<double>, interleave<double>}};

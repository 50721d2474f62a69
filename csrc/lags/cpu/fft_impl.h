// Transforms and products of spectra (fft.h) on vectors of channels: one transform per lane, so no shuffle is needed.
//
// Floor: the products, 4 N C^2 flops per frequency for Re and Im together (half of the pairs of channels), bound by arithmetic from about
// N = 8 on. Fast because one pass over a pair of panels feeds both parts from registers: 18 loads for 32 multiply-adds; the sums over the
// frequencies are taken one axis at a time, from tiles that are still in L2.
#include "common/cpu/syrk_impl.h"

template <class V>
struct Complex {
  V re, im;
};

template <class S>
MFAC_INLINE Complex<Vec<S>> load_complex(const S* re, const S* im, int64_t at) {
  return {load<Vec<S>>(re + at * kLanesOf<S>), load<Vec<S>>(im + at * kLanesOf<S>)};
}
template <class S>
MFAC_INLINE void store_complex(S* re, S* im, int64_t at, Complex<Vec<S>> z) {
  store(re + at * kLanesOf<S>, z.re);
  store(im + at * kLanesOf<S>, z.im);
}

// y[u] = sum_q x[q] e^{-2 pi i u q / kRadix}
template <int kRadix, class S, class V = Vec<S>>
MFAC_INLINE void butterfly(const Complex<V>* x, Complex<V>* y) {
  if constexpr (kRadix == 2) {
    y[0] = {x[0].re + x[1].re, x[0].im + x[1].im};
    y[1] = {x[0].re - x[1].re, x[0].im - x[1].im};
  } else if constexpr (kRadix == 4) {
    const Complex<V> s{x[0].re + x[2].re, x[0].im + x[2].im}, d{x[0].re - x[2].re, x[0].im - x[2].im};
    const Complex<V> t{x[1].re + x[3].re, x[1].im + x[3].im}, e{x[1].re - x[3].re, x[1].im - x[3].im};
    y[0] = {s.re + t.re, s.im + t.im};
    y[1] = {d.re + e.im, d.im - e.re};
    y[2] = {s.re - t.re, s.im - t.im};
    y[3] = {d.re - e.im, d.im + e.re};
  } else {
    // Odd: x[q] and x[kRadix - q] meet the same cosines and opposite sines.
    constexpr int kPairs = kRadix / 2;
    constexpr double kCosine[2][2] = {{kRadix == 3 ? -0.5 : 0.30901699437494742, -0.80901699437494742},
                                      {-0.80901699437494742, 0.30901699437494742}};
    constexpr double kSine[2][2] = {{kRadix == 3 ? 0.86602540378443865 : 0.95105651629515357, 0.58778525229247313},
                                    {0.58778525229247313, -0.95105651629515357}};
    Complex<V> s[kPairs], d[kPairs];
    y[0] = x[0];
#pragma GCC unroll 2
    for (int q = 0; q < kPairs; ++q) {
      const Complex<V> a = x[q + 1], b = x[kRadix - 1 - q];
      s[q] = {a.re + b.re, a.im + b.im};
      d[q] = {a.re - b.re, a.im - b.im};
      y[0] = {y[0].re + s[q].re, y[0].im + s[q].im};
    }
#pragma GCC unroll 2
    for (int u = 0; u < kPairs; ++u) {
      Complex<V> even = x[0], odd{};
#pragma GCC unroll 2
      for (int q = 0; q < kPairs; ++q) {
        const V c = splat(S(kCosine[u][q])), w = splat(S(kSine[u][q]));
        even = {even.re + c * s[q].re, even.im + c * s[q].im};
        odd = {odd.re + w * d[q].re, odd.im + w * d[q].im};
      }
      y[u + 1] = {even.re + odd.im, even.im - odd.re};
      y[kRadix - 1 - u] = {even.re - odd.im, even.im + odd.re};
    }
  }
}

// A stage of Stockham's algorithm: from transforms of length `done` to ones of length done * kRadix.
template <int kRadix, class S>
void fft_stage(const FftLength& length, int64_t done, const S* re, const S* im, S* out_re, S* out_im) {
  using V = Vec<S>;
  const int64_t rest = length.n / (done * kRadix);
  for (int64_t j = 0; j < done; ++j) {
    Complex<V> twiddle[kRadix];
#pragma GCC unroll 5
    for (int q = 1; q < kRadix; ++q) twiddle[q] = {splat(S(length.cosines[j * q * rest])), splat(S(length.sines[j * q * rest]))};
    for (int64_t k = 0; k < rest; ++k) {
      Complex<V> x[kRadix], y[kRadix];
#pragma GCC unroll 5
      for (int q = 0; q < kRadix; ++q) {
        const Complex<V> z = load_complex(re, im, (j * kRadix + q) * rest + k);
        x[q] = q == 0 || j == 0 ? z : Complex<V>{z.re * twiddle[q].re - z.im * twiddle[q].im, z.re * twiddle[q].im + z.im * twiddle[q].re};
      }
      butterfly<kRadix, S>(x, y);
#pragma GCC unroll 5
      for (int u = 0; u < kRadix; ++u) store_complex(out_re, out_im, (u * done + j) * rest + k, y[u]);
    }
  }
}

// Two buffers of one complex vector per element, used in turns
template <class S>
struct FftBuffers {
  S *re, *im, *other_re, *other_im;
  FftBuffers(S* work, int64_t n)
      : re(work), im(re + n * kLanesOf<S>), other_re(im + n * kLanesOf<S>), other_im(other_re + n * kLanesOf<S>) {}
  void swap() {
    S *r = re, *i = im;
    re = other_re, im = other_im, other_re = r, other_im = i;
  }
};

template <class S>
void fft(const FftLength& length, FftBuffers<S>& buffers) {
  int64_t done = 1;
  for (const int64_t radix : length.radices) {
    const auto stage = radix == 4 ? fft_stage<4, S> : radix == 2 ? fft_stage<2, S> : radix == 3 ? fft_stage<3, S> : fft_stage<5, S>;
    stage(length, done, buffers.re, buffers.im, buffers.other_re, buffers.other_im);
    buffers.swap();
    done *= radix;
  }
}

template <class S>
int64_t transform_work(const FftPlan& plan) {
  const int64_t longest = plan.y.n > plan.x.n ? plan.y.n : plan.x.n;
  return (2 * plan.kept_columns * plan.y.n + 4 * longest) * static_cast<int64_t>(sizeof(Vec<S>));
}

template <class S>
void transform(const void* image, int64_t channels, const FftPlan& plan, void* work, void* out, int64_t part_step) {
  using V = Vec<S>;
  constexpr int64_t n = kLanesOf<S>;
  const int64_t rows = plan.rows, columns = plan.columns;
  S* column_re = static_cast<S*>(work);  // (kept_columns, y.n)
  S* column_im = column_re + plan.kept_columns * plan.y.n * n;
  S* line = column_im + plan.kept_columns * plan.y.n * n;
  for (int64_t half = 0; half < channels; half += n) {
    const S* pixels = static_cast<const S*>(image) + half;
    S* spectrum = static_cast<S*>(out) + half;
    // Two rows at a time, as real and imaginary part: z = a + i b, 2 a^ = z^(k) + conj(z^(-k)), 2 i b^ = z^(k) - conj(z^(-k))
    for (int64_t row = 0; row < rows; row += 2) {
      FftBuffers<S> z(line, plan.x.n);
      const bool two = row + 1 < rows;
      for (int64_t i = 0; i < columns; ++i) {
        const S* pixel = pixels + (row * columns + i) * kTile<S>;
        store_complex(z.re, z.im, i, {load<V>(pixel), two ? load<V>(pixel + columns * kTile<S>) : V{}});
      }
      for (int64_t i = columns; i < plan.x.n; ++i) store_complex(z.re, z.im, i, {V{}, V{}});
      fft(plan.x, z);
      for (int64_t k = 0; k < plan.kept_columns; ++k) {
        const Complex<V> a = load_complex(z.re, z.im, k), b = load_complex(z.re, z.im, k ? plan.x.n - k : 0);
        const int64_t at = k * plan.y.n + row;
        store_complex(column_re, column_im, at, {a.re + b.re, a.im - b.im});
        if (two) store_complex(column_re, column_im, at + 1, {a.im + b.im, b.re - a.re});
      }
    }
    for (int64_t k = 0; k < plan.kept_columns; ++k) {
      FftBuffers<S> z(line, plan.y.n);
      for (int64_t i = 0; i < plan.y.n; ++i)
        store_complex(z.re, z.im, i, i < rows ? load_complex(column_re, column_im, k * plan.y.n + i) : Complex<V>{});
      fft(plan.y, z);
      const int64_t first = plan.first[k], count = plan.first[k + 1] - first;
      for (int64_t i = 0; i < count; ++i) {
        const Complex<V> value = load_complex(z.re, z.im, i);
        store(spectrum + (first + i) * 2 * part_step, value.re);
        store(spectrum + (first + i) * 2 * part_step + part_step, value.im);
      }
    }
  }
}

// out (2, tile, tile) = Re and Im of sum_n conj(a[n]) b[n]^T; what is past `rows` and `columns` does not count
template <class S>
MFAC_INLINE void multiply_spectra(const S* a, const S* b, int64_t rows, int64_t columns, int64_t samples, int64_t part_step, S* out) {
  using V = Vec<S>;
  for (int64_t row = 0; row < kTile<S>; row += kTileRows)
    for (int64_t column = 0; column < kTile<S>; column += kLanesOf<S>) {
      V re[kTileRows] = {}, im[kTileRows] = {};
      const S *x = a + row, *y = b + column;
      const int64_t terms = row < rows && column < columns ? samples : 0;
#pragma GCC unroll 4
      for (int64_t n = 0; n < terms; ++n, x += kTile<S>, y += kTile<S>) {
        const V y_re = load<V>(y), y_im = load<V>(y + part_step);
#pragma GCC unroll 8
        for (int r = 0; r < kTileRows; ++r) {
          const V x_re = splat(x[r]), x_im = splat(x[part_step + r]);
          re[r] += x_re * y_re;
          im[r] += x_re * y_im;
          re[r] += x_im * y_im;
          im[r] -= x_im * y_re;
        }
      }
#pragma GCC unroll 8
      for (int r = 0; r < kTileRows; ++r) {
        store(out + (row + r) * kTile<S> + column, re[r]);
        store(out + kTileArea<S> + (row + r) * kTile<S> + column, im[r]);
      }
    }
}

constexpr int64_t kColumnPart = 24;  // frequencies whose products wait in L2 for their sums

template <class S>
int64_t product_work() {
  return kColumnPart * 2 * kTileArea<S> * static_cast<int64_t>(sizeof(S));
}

// sums (kLags, 4, tile, tile) += products (count, 2, tile, tile) weighted for kLags row lags
template <int kLags, class S>
void sum_products(const S* products, int64_t count, const double* weights, int64_t reach, S* sums) {
  using V = Vec<S>;
  for (int64_t at = 0; at < kTileArea<S>; at += kLanesOf<S>) {
    V sum[kLags][4];
#pragma GCC unroll 12
    for (int i = 0; i < 4 * kLags; ++i) sum[i / 4][i % 4] = load<V>(sums + i * kTileArea<S> + at);
    for (int64_t f = 0; f < count; ++f) {
      const V re = load<V>(products + 2 * f * kTileArea<S> + at), im = load<V>(products + (2 * f + 1) * kTileArea<S> + at);
#pragma GCC unroll 3
      for (int lag = 0; lag < kLags; ++lag) {
        const double* w = weights + (f * reach + lag) * 2;
        const V cosine = splat(S(w[0])), sine = splat(S(w[1]));
        sum[lag][0] += cosine * re;
        sum[lag][1] += sine * re;
        sum[lag][2] += cosine * im;
        sum[lag][3] += sine * im;
      }
    }
#pragma GCC unroll 12
    for (int i = 0; i < 4 * kLags; ++i) store(sums + i * kTileArea<S> + at, sum[i / 4][i % 4]);
  }
}

template <class S>
void multiply_column(const void* a, const void* b, int64_t rows, int64_t columns, int64_t samples, int64_t part_step, int64_t count,
                     const double* weights, int64_t reach, void* work, void* out) {
  S *products = static_cast<S*>(work), *sums = static_cast<S*>(out);
  __builtin_memset(sums, 0, reach * 4 * kTileArea<S> * sizeof(S));
  for (int64_t first = 0; first < count; first += kColumnPart) {
    const int64_t part = count - first < kColumnPart ? count - first : kColumnPart;
    for (int64_t f = 0; f < part; ++f) {
      const int64_t at = (first + f) * 2 * part_step;
      multiply_spectra(static_cast<const S*>(a) + at, static_cast<const S*>(b) + at, rows, columns, samples, part_step,
                       products + 2 * f * kTileArea<S>);
    }
    int64_t lag = 0;
    for (; lag + 3 <= reach; lag += 3)
      sum_products<3>(products, part, weights + (first * reach + lag) * 2, reach, sums + lag * 4 * kTileArea<S>);
    for (; lag < reach; ++lag) sum_products<1>(products, part, weights + (first * reach + lag) * 2, reach, sums + lag * 4 * kTileArea<S>);
  }
}

// cos(u + v) and sin(u + v) from the sums weighted by those of u
template <class S>
void add_column(const void* column, double cosine, double sine, void* lag) {
  using V = Vec<S>;
  const S* sums = static_cast<const S*>(column);
  S* out = static_cast<S*>(lag);
  const V c = splat(S(cosine)), s = splat(S(sine));
  for (int64_t at = 0; at < kTileArea<S>; at += kLanesOf<S>) {
    const auto part = [&](int i) { return load<V>(sums + i * kTileArea<S> + at); };
    store(out + at, load<V>(out + at) + (c * part(0) - s * part(1)));
    store(out + kTileArea<S> + at, load<V>(out + kTileArea<S> + at) + (c * part(3) + s * part(2)));
  }
}

template <class S>
void separate(void* lag) {
  using V = Vec<S>;
  S* out = static_cast<S*>(lag);
  for (int64_t at = 0; at < kTileArea<S>; at += kLanesOf<S>) {
    const V even = load<V>(out + at), odd = load<V>(out + kTileArea<S> + at);
    store(out + at, even - odd);
    store(out + kTileArea<S> + at, even + odd);
  }
}

template <class S>
void add_parts(const void* from, void* to) {
  using V = Vec<S>;
  const S* in = static_cast<const S*>(from);
  S* out = static_cast<S*>(to);
  for (int64_t at = 0; at < 2 * kTileArea<S>; at += kLanesOf<S>) store(out + at, load<V>(out + at) + load<V>(in + at));
}

template <class S>
bool mostly_in_core(const void* panel, int64_t samples, int64_t rows, int64_t columns, const int64_t core[4]) {
  using V = Vec<S>;
  bool mostly = true;
  for (int64_t c = 0; c < kTile<S>; c += kLanesOf<S>) {
    const S* pixel = static_cast<const S*>(panel) + c;
    V all{}, inner{};
    for (int64_t i = 0; i < samples * rows; ++i) {
      const bool inside = i % rows >= core[0] && i % rows < core[1];
      for (int64_t j = 0; j < columns; ++j, pixel += kTile<S>) {
        const V x = load<V>(pixel), square = x * x;
        all += square;
        if (inside && j >= core[2] && j < core[3]) inner += square;
      }
    }
    for (int i = 0; i < kLanesOf<S>; ++i) mostly = mostly && 16 * inner[i] >= all[i];  // not so if NaN
  }
  return mostly;
}

template <class S>
constexpr FftKernels fft_kernels_of() {
  return {transform_work<S>, transform<S>, product_work<S>, multiply_column<S>,
          add_column<S>,     separate<S>,  add_parts<S>,    mostly_in_core<S>};
}
// By the type of the panels: float32 or float64
constexpr FftKernels kFftKernels[] = {fft_kernels_of<float>(), fft_kernels_of<double>()};

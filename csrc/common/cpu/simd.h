// Vectors of the instruction set being compiled (see for_each_isa.h; no include guard: read once per set, inside its namespace).
// GCC's vector extensions carry the arithmetic; intrinsics appear only where the language has no word for the operation.

#define MFAC_INLINE __attribute__((always_inline)) inline

// f64v and f32v fill a register; f32h is the half register of float32 that widens into one f64v.
constexpr int kLanes = MFAC_VECTOR_BYTES / 8;
constexpr int kLanes32 = MFAC_VECTOR_BYTES / 4;
typedef double f64v __attribute__((vector_size(MFAC_VECTOR_BYTES)));
typedef float f32v __attribute__((vector_size(MFAC_VECTOR_BYTES)));
typedef float f32h __attribute__((vector_size(MFAC_VECTOR_BYTES / 2)));
typedef uint32_t u32h __attribute__((vector_size(MFAC_VECTOR_BYTES / 2)));
typedef uint16_t u16q __attribute__((vector_size(MFAC_VECTOR_BYTES / 4)));

// memcpy is the portable unaligned load; it compiles to one move.
template <class V, class T>
MFAC_INLINE V load(const T* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}
template <class V, class T>
MFAC_INLINE void store(T* p, V v) {
  __builtin_memcpy(p, &v, sizeof(V));
}

// v, in a register from here on: GCC else repeats the load of what is used several times, one for each use.
template <class V>
MFAC_INLINE V in_register(V v) {
#if MFAC_ISA_LEVEL > 0
  asm("" : "+v"(v));
#endif
  return v;
}

// Into every cache level. The address need not exist.
template <class T>
MFAC_INLINE void prefetch(const T* p) {
  __builtin_prefetch(p, 0, 3);
}

template <class To, class From>
MFAC_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

// The same by scalar type, for kernels that exist in float32 and in float64.
template <class S>
struct VecOf {
  using type = f64v;
};
template <>
struct VecOf<float> {
  using type = f32v;
};
template <class S>
using Vec = typename VecOf<S>::type;
template <class S>
constexpr int kLanesOf = MFAC_VECTOR_BYTES / sizeof(S);
template <class S>
MFAC_INLINE Vec<S> splat(S x) {
  return x - Vec<S>{};
}

template <class V>
MFAC_INLINE V vector_sqrt(V x) {
#if MFAC_ISA_LEVEL == 2
  if constexpr (sizeof(x[0]) == 4)
    return bit_cast<V>(_mm512_maskz_sqrt_ps(0xffff, bit_cast<__m512>(x)));
  else
    return bit_cast<V>(_mm512_maskz_sqrt_pd(0xff, bit_cast<__m512d>(x)));
#elif MFAC_ISA_LEVEL == 1
  if constexpr (sizeof(x[0]) == 4)
    return bit_cast<V>(_mm256_sqrt_ps(bit_cast<__m256>(x)));
  else
    return bit_cast<V>(_mm256_sqrt_pd(bit_cast<__m256d>(x)));
#else
  for (size_t l = 0; l < sizeof(V) / sizeof(x[0]); ++l) x[l] = static_cast<decltype(x[0] + 0)>(__builtin_sqrt(x[l]));
  return x;
#endif
}

// What products of T are computed in: float32 for float32 and narrower, float64 for float64.
template <class T>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};
template <class T>
using Compute = typename ComputeOf<T>::type;

MFAC_INLINE double horizontal_sum(f64v v) {
  double sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += v[i];
  return sum;
}

// ---- widen: kLanes elements of any type to float64, exactly -------------------------------------------------------------------
// By intrinsic where there is one: GCC's __builtin_convertvector goes through half registers. (maskz: the plain form warns in GCC 12.)

MFAC_INLINE f64v widen(f32h x) {
#if MFAC_ISA_LEVEL == 2
  return bit_cast<f64v>(_mm512_maskz_cvtps_pd(0xff, bit_cast<__m256>(x)));
#elif MFAC_ISA_LEVEL == 1
  return bit_cast<f64v>(_mm256_cvtps_pd(bit_cast<__m128>(x)));
#else
  return __builtin_convertvector(x, f64v);
#endif
}

MFAC_INLINE u32h widen(u16q x) {
#if MFAC_ISA_LEVEL == 2
  return bit_cast<u32h>(_mm256_cvtepu16_epi32(bit_cast<__m128i>(x)));
#elif MFAC_ISA_LEVEL == 1
  return bit_cast<u32h>(_mm_cvtepu16_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(&x))));
#else
  return __builtin_convertvector(x, u32h);
#endif
}

MFAC_INLINE f32h half_to_float(u16q x) {
#if MFAC_ISA_LEVEL == 2
  return bit_cast<f32h>(_mm256_cvtph_ps(bit_cast<__m128i>(x)));
#elif MFAC_ISA_LEVEL == 1
  return bit_cast<f32h>(_mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(&x))));
#else
  // Exponent and mantissa moved into place and rescaled by 2^112: right for subnormals too. Inf and NaN get float32's exponent.
  const u32h h = widen(x);
  const f32h scaled = bit_cast<f32h>((h & 0x7fff) << 13) * 0x1p112f;
  const u32h special = bit_cast<u32h>((h & 0x7c00) == 0x7c00) & 0x7f800000u;
  return bit_cast<f32h>(bit_cast<u32h>(scaled) | special | ((h & 0x8000) << 16));
#endif
}

MFAC_INLINE f64v widen(const double* p) { return load<f64v>(p); }
MFAC_INLINE f64v widen(const float* p) { return widen(load<f32h>(p)); }
MFAC_INLINE f64v widen(const bf16* p) { return widen(bit_cast<f32h>(widen(load<u16q>(p)) << 16)); }
MFAC_INLINE f64v widen(const fp16* p) { return widen(half_to_float(load<u16q>(p))); }

// Several vectors of neighbours
template <class T, int n>
MFAC_INLINE void widen_vectors(const T* p, f64v (&out)[n]) {
#pragma GCC unroll 4
  for (int i = 0; i < n; ++i) out[i] = widen(p + i * kLanes);
}
#if MFAC_ISA_LEVEL == 1
// Two vectors at a time: a zero below each element is what one instruction puts there.
template <int n>
  requires(n % 2 == 0)
MFAC_INLINE void widen_vectors(const bf16* p, f64v (&out)[n]) {
  typedef uint16_t u16h __attribute__((vector_size(16)));
#pragma GCC unroll 4
  for (int i = 0; i < n; i += 2) {
    const u16h x = load<u16h>(p + i * kLanes), zero = {};
    out[i] = widen(bit_cast<f32h>(__builtin_shufflevector(zero, x, 0, 8, 1, 9, 2, 10, 3, 11)));
    out[i + 1] = widen(bit_cast<f32h>(__builtin_shufflevector(zero, x, 4, 12, 5, 13, 6, 14, 7, 15)));
  }
}
#endif

// ---- widen32: kLanes elements of float32 or narrower to float32, exactly ---------------------------------------------------------

MFAC_INLINE f32h widen32(const float* p) { return load<f32h>(p); }
MFAC_INLINE f32h widen32(const bf16* p) { return bit_cast<f32h>(widen(load<u16q>(p)) << 16); }
MFAC_INLINE f32h widen32(const fp16* p) { return half_to_float(load<u16q>(p)); }

template <class S, class T>
MFAC_INLINE auto widen_as(const T* p) {
  if constexpr (sizeof(S) == sizeof(double))
    return widen(p);
  else
    return widen32(p);
}

// out[0, n) = p[0, n) as S, and zero up to `padded`, a multiple of kLanes.
template <class S, class T>
MFAC_INLINE void widen_row(const T* p, int64_t n, S* out, int64_t padded) {
  int64_t j = 0;
  if constexpr (sizeof(S) == sizeof(T)) {
    __builtin_memcpy(out, p, n * sizeof(S));
    j = n;
  } else {
    for (; j + kLanes <= n; j += kLanes) store(out + j, widen_as<S>(p + j));
    if (j < n) {
      T rest[kLanes] = {};
      __builtin_memcpy(rest, p + j, (n - j) * sizeof(T));
      store(out + j, widen_as<S>(rest));
      j += kLanes;
    }
  }
  if (j < padded) __builtin_memset(out + j, 0, (padded - j) * sizeof(S));
}

// ---- narrow: float64 to any type, to nearest even (16-bit types by way of float32) ---------------------------------------------

MFAC_INLINE void narrow(double* p, f64v v) { store(p, v); }
MFAC_INLINE void narrow(float* p, f64v v) { store(p, __builtin_convertvector(v, f32h)); }
MFAC_INLINE void narrow(bf16* p, f64v v) {
  const f32h single = __builtin_convertvector(v, f32h);
  const u32h bits = bit_cast<u32h>(single);
  const u32h rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const u32h is_nan = bit_cast<u32h>(single != single);
  store(p, __builtin_convertvector((rounded & ~is_nan) | (0x7fc0 & is_nan), u16q));
}
MFAC_INLINE void narrow(fp16* p, f64v v) {
  const f32h single = __builtin_convertvector(v, f32h);
#if MFAC_ISA_LEVEL == 2
  store(p, _mm256_cvtps_ph(bit_cast<__m256>(single), _MM_FROUND_TO_NEAREST_INT));
#elif MFAC_ISA_LEVEL == 1
  const __m128i half = _mm_cvtps_ph(bit_cast<__m128>(single), _MM_FROUND_TO_NEAREST_INT);
  __builtin_memcpy(p, &half, sizeof(u16q));
#else
  const u32h bits = bit_cast<u32h>(single);
  const u32h sign = (bits >> 16) & 0x8000;
  const u32h magnitude = bits & 0x7fffffff;
  // Normal results: rebias the exponent, round to nearest even on the 13 dropped bits; a carry into the exponent is right as it is.
  const u32h normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  // Subnormal results: adding 0.5 lets the float adder round at 2^-24.
  const u32h subnormal = bit_cast<u32h>(bit_cast<f32h>(magnitude) + 0.5f) - 0x3f000000u;
  const u32h is_subnormal = bit_cast<u32h>(magnitude < (113u << 23));
  const u32h overflows = bit_cast<u32h>(magnitude >= 0x477ff000u);
  const u32h is_nan = bit_cast<u32h>(magnitude > 0x7f800000u);
  u32h half = (subnormal & is_subnormal) | (normal & ~is_subnormal);
  half = (half & ~overflows) | (0x7c00 & overflows);
  half = (half & ~is_nan) | (0x7e00 & is_nan);
  store(p, __builtin_convertvector(half | sign, u16q));
#endif
}

// ---- ragged ends ----------------------------------------------------------------------------------------------------------------

// The first n < kLanesOf<S> elements of a vector; the rest are zero, or not written.
template <class S>
MFAC_INLINE Vec<S> load_first(const S* p, int64_t n) {
#if MFAC_ISA_LEVEL == 2
  if constexpr (sizeof(S) == 4)
    return bit_cast<Vec<S>>(_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p));
  else
    return bit_cast<Vec<S>>(_mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << n) - 1), p));
#else
  Vec<S> v = {};
  __builtin_memcpy(&v, p, n * sizeof(S));
  return v;
#endif
}
template <class S>
MFAC_INLINE void store_first(S* p, Vec<S> v, int64_t n) {
#if MFAC_ISA_LEVEL == 2
  if constexpr (sizeof(S) == 4)
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), bit_cast<__m512>(v));
  else
    _mm512_mask_storeu_pd(p, static_cast<__mmask8>((1u << n) - 1), bit_cast<__m512d>(v));
#else
  __builtin_memcpy(p, &v, n * sizeof(S));
#endif
}

// The same, or the whole vector where n is as large. store_upto: nothing for n <= 0.
template <class S>
MFAC_INLINE Vec<S> load_upto(const S* p, int64_t n) {
  return n >= kLanesOf<S> ? load<Vec<S>>(p) : load_first(p, n);
}
template <class S>
MFAC_INLINE void store_upto(S* p, Vec<S> v, int64_t n) {
  if (n >= kLanesOf<S>)
    store(p, v);
  else if (n > 0)
    store_first(p, v, n);
}

// The first n < kLanes elements; the rest are zero.
template <class T>
MFAC_INLINE f64v widen_first(const T* p, int64_t n) {
  T padded[kLanes] = {};
  __builtin_memcpy(padded, p, n * sizeof(T));
  return widen(padded);
}
template <class T>
MFAC_INLINE void narrow_first(T* p, f64v v, int64_t n) {
  T padded[kLanes];
  narrow(padded, v);
  __builtin_memcpy(p, padded, n * sizeof(T));
}

// The first n elements, n at most the size of `to`, as they are; the rest are zero. Without the call that a memcpy of unknown length is.
template <class T, int size>
MFAC_INLINE void copy_first(const T* p, int64_t n, T (&to)[size]) {
#if MFAC_ISA_LEVEL == 2
  if constexpr (size * sizeof(T) == 64) {
    if constexpr (sizeof(T) == 4)
      store(to, bit_cast<f32v>(_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p)));
    else
      store(to, bit_cast<f64v>(_mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << n) - 1), p)));
    return;
  }
  if constexpr (size * sizeof(T) == 32 && sizeof(T) == 2) {
    store(to, _mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << n) - 1), p));
    return;
  }
#endif
  __builtin_memset(to, 0, sizeof(to));
  __builtin_memcpy(to, p, n * sizeof(T));
}

// Symmetric products in float32 or float64 (S): micro-kernels on staged operands. Read once per instruction set (for_each_isa.h).
//
//   rows      S[i, j] = sum_k A[i, k] A[j, k]    A's rows are contiguous: Gram matrices, factors of channel-first tensors
//   columns   C[i, j] = sum_k A[k, i] A[k, j]    A's columns side by side: X^T X, the updates of a blocked factorisation
//
// Floor: half of a matrix product's flops, m (m + 1) d. Both keep kDotRows x kDotColumns, or kTileRows x 2, vectors of sums in
// registers, so that two loads feed each pair of multiply-adds; operands are copied next to each other first, padded with zeros and
// converted, hence no kernel knows strides, 16-bit types or ragged ends. Loops are unrolled: where two threads share a core they also
// share what decodes instructions, and those of the loop itself are then an eighth of the time.

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// ---- rows: a tile of dot products, each register a sum over lanes ---------------------------------------------------------------

constexpr int kDotRows = 4;
constexpr int kDotColumns = MFAC_ISA_LEVEL == 2 ? 4 : MFAC_ISA_LEVEL == 1 ? 3 : 2;  // as many sums as there are registers for
constexpr int kDotTile = kDotRows * kDotColumns;
// Sums of a tile in memory: room for whole vectors of them.
template <class S>
constexpr int kDotSums = (kDotTile + kLanesOf<S> - 1) / kLanesOf<S> * kLanesOf<S>;
constexpr int64_t kStagedBytes = 3072;  // of a staged row: a dozen of them fit L1
template <class S>
constexpr int64_t kStagedColumns = kStagedBytes / sizeof(S);

// Lane l of the result: the sum of two neighbours at distance h in a (where l has bit h clear) or in b (where it is set).
template <int h, class V, int... l>
MFAC_INLINE V fold(V a, V b, std::integer_sequence<int, l...>) {
  constexpr int n = sizeof...(l);
  return __builtin_shufflevector(a, b, (l & h ? l + n : l)...) + __builtin_shufflevector(a, b, (l & h ? l - h + n : l + h)...);
}

// v[0], lane l <- the sum of v[l]'s lanes
template <class V, int n, int h = 1>
MFAC_INLINE V lane_sums(V* v) {
  if constexpr (h < n) {
#pragma GCC unroll 8
    for (int i = 0; i < n / (2 * h); ++i) v[i] = fold<h>(v[2 * i], v[2 * i + 1], std::make_integer_sequence<int, n>());
    return lane_sums<V, n, 2 * h>(v);
  }
  return v[0];
}

// sums += v, in float64
MFAC_INLINE void add_to(double* sums, f64v v) { store(sums, load<f64v>(sums) + v); }
MFAC_INLINE void add_to(double* sums, f32v v) {
  float singles[kLanes32];
  store(singles, v);
  add_to(sums, widen(singles));
  add_to(sums + kLanes, widen(singles + kLanes));
}

// sums[r * kDotColumns + c] += row r of a . row c of b, over `columns` (a multiple of the lanes). The products and their short sums
// are in S, the running sums in float64.
template <class S>
__attribute__((noinline)) void dot_tile(const S* a, const S* b, int64_t columns, double* sums) {
  using V = Vec<S>;
  V sum[kDotSums<S>] = {};
#pragma GCC unroll 4
  for (int64_t k = 0; k < columns; k += kLanesOf<S>) {
    V y[kDotColumns];
#pragma GCC unroll 4
    for (int c = 0; c < kDotColumns; ++c) y[c] = load<V>(b + c * kStagedColumns<S> + k);
#pragma GCC unroll 4
    for (int r = 0; r < kDotRows; ++r) {
      const V x = load<V>(a + r * kStagedColumns<S> + k);
#pragma GCC unroll 4
      for (int c = 0; c < kDotColumns; ++c) sum[r * kDotColumns + c] += x * y[c];
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < kDotSums<S>; i += kLanesOf<S>) add_to(sums + i, lane_sums<V, kLanesOf<S>>(sum + i));
}

// ---- columns: a square tile, a row of it per broadcast element ------------------------------------------------------------------

// A panel holds kTile columns of an operand: (depth, kTile), contiguous. So does a tile of the result: (kTile, kTile).
template <class S>
constexpr int64_t kTile = 2 * kLanesOf<S>;
template <class S>
constexpr int64_t kTileArea = kTile<S> * kTile<S>;
constexpr int kTileRows = MFAC_ISA_LEVEL == 2 ? 8 : 4;  // rows computed at a time
// The same where one of the two vectors of a row is enough: with more rows as many sums are in flight.
template <class S>
constexpr int kStripRows = MFAC_ISA_LEVEL > 0 ? kLanesOf<S> : kTileRows;

// body<rows, 2>(first row) for the strips of a whole tile. With AVX2 they are not of kTileRows, a power of two, but as high as registers
// allow: a core that runs a second thread has latencies to hide.
template <class S, class Body>
MFAC_INLINE void for_each_strip(const Body& body) {
  if constexpr (MFAC_ISA_LEVEL == 1 && kTile<S> == 16) {
    body.template operator()<6, 2>(0);
    body.template operator()<5, 2>(6);
    body.template operator()<5, 2>(11);
  } else {
    for (int64_t r = 0; r < kTile<S>; r += kTileRows) body.template operator()<kTileRows, 2>(r);
  }
}
// The same for the first `rows` rows, of which those before `both` need both vectors and the others one: body<rows, vectors>(first row)
template <class S, class Body>
MFAC_INLINE void for_each_strip(int64_t rows, int64_t both, const Body& body) {
  if (both == kTile<S>) return for_each_strip<S>(body);
  int64_t r = 0;
  for (; r < both; r += kTileRows) body.template operator()<kTileRows, 2>(r);
  for (; r < rows; r += kStripRows<S>) body.template operator()<kStripRows<S>, 1>(r);
}

// sum[r][v] += sum_k a[k, r] b[k, vector v]; a row of a is `width` long
template <int kRows, int kVectors, class S, class V>
MFAC_INLINE void multiply_rows(const S* a, int64_t width, const S* b, int64_t depth, V (&sum)[kRows][kVectors]) {
#pragma GCC unroll 4
  for (int64_t k = 0; k < depth; ++k) {
    V x[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) x[v] = load<V>(b + v * kLanesOf<S> + k * kTile<S>);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sum[r][v] += splat(a[k * width + r]) * x[v];
  }
}

// The first kVectors vectors of kRows rows of a tile += sum
template <int kRows, int kVectors, class S, class V>
MFAC_INLINE void add_rows(const V (&sum)[kRows][kVectors], S* tile) {
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      S* to = tile + r * kTile<S> + v * kLanesOf<S>;
      store(to, load<V>(to) + sum[r][v]);
    }
}

// out = base + scale a^T b for the last kVectors vectors of kRows rows; base may be null (zero) or out.
template <int kRows, int kVectors, class S>
MFAC_INLINE void multiply_strip(const S* a, const S* b, int64_t depth, S scale, const S* base, S* out) {
  using V = Vec<S>;
  constexpr int64_t kSkipped = (2 - kVectors) * kLanesOf<S>;
  V sum[kRows][kVectors] = {};
  multiply_rows(a, kTile<S>, b + kSkipped, depth, sum);
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      const int64_t at = r * kTile<S> + v * kLanesOf<S> + kSkipped;
      const V from = base ? load<V>(base + at) : V{};
      store(out + at, from + splat(scale) * sum[r][v]);
    }
}

enum class Part { full, upper };  // upper: what lies below the tile's diagonal may be left as it is
constexpr int64_t kNoZeros = -1;

// out = base + scale a^T b, all tiles; a and b are panels of `depth` rows. zeros >= 0: column r of a is zero above row zeros + r.
template <class S>
__attribute__((noinline)) void multiply_tile(const S* a, const S* b, int64_t depth, S scale, const S* base, S* out, Part part,
                                             int64_t zeros = kNoZeros) {
  for_each_strip<S>(kTile<S>, part == Part::full ? kTile<S> : kTile<S> / 2, [&]<int kRows, int kVectors>(int64_t r) {
    const int64_t skip = zeros >= 0 ? zeros + r : 0;
    const S* from = base ? base + r * kTile<S> : nullptr;
    multiply_strip<kRows, kVectors>(a + skip * kTile<S> + r, b + skip * kTile<S>, depth - skip, scale, from, out + r * kTile<S>);
  });
}

// out = l b for a lower triangular l, given as its transpose u (kTile, kTile).
template <class S>
__attribute__((noinline)) void multiply_triangle(const S* u, const S* b, S* out) {
  for_each_strip<S>([&]<int kRows, int kVectors>(int64_t r) {
    multiply_strip<kRows, kVectors>(u + r, b, r + kRows, S(1), static_cast<const S*>(nullptr), out + r * kTile<S>);
  });
}

// Transposes go through chunks of 128 bits: shuffles within them, and of whole ones, are single instructions that need no index register.
template <class V, int n>
constexpr int kChunk = 16 * n / sizeof(V);  // elements

// Groups of `width` from the lower (high = 0) or upper halves of the chunks of a and b, in turns
template <int width, int high, class V, int... l>
MFAC_INLINE V interleave(V a, V b, std::integer_sequence<int, l...>) {
  constexpr int n = sizeof...(l), chunk = kChunk<V, n>;
  return __builtin_shufflevector(
      a, b, (l / chunk * chunk + high * chunk / 2 + l % chunk / (2 * width) * width + l % width + l / width % 2 * n)...);
}
// The even (odd = 0) or odd chunks of a, then those of b
template <int odd, class V, int... l>
MFAC_INLINE V alternate(V a, V b, std::integer_sequence<int, l...>) {
  constexpr int n = sizeof...(l), chunk = kChunk<V, n>;
  return __builtin_shufflevector(a, b, (l % (n / 2) / chunk * 2 * chunk + odd * chunk + l % chunk + l / (n / 2) * n)...);
}

// v[i], lane l <-> v[l], lane i
template <class V, int n>
MFAC_INLINE void transpose_vectors(V* v) {
  constexpr int chunk = kChunk<V, n>;
  constexpr auto lanes = std::make_integer_sequence<int, n>();
  V t[n];
#pragma GCC unroll 16
  for (int i = 0; i < n; ++i) t[i] = i % 2 == 0 ? interleave<1, 0>(v[i], v[i + 1], lanes) : interleave<1, 1>(v[i - 1], v[i], lanes);
  if constexpr (chunk == 4) {
#pragma GCC unroll 4
    for (int i = 0; i < n; i += 4) {
      v[i] = interleave<2, 0>(t[i], t[i + 2], lanes);
      v[i + 1] = interleave<2, 1>(t[i], t[i + 2], lanes);
      v[i + 2] = interleave<2, 0>(t[i + 1], t[i + 3], lanes);
      v[i + 3] = interleave<2, 1>(t[i + 1], t[i + 3], lanes);
    }
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) t[i] = v[i];
  }
  // Each chunk now holds a column of a small square: what is left is to transpose the chunks.
#pragma GCC unroll 4
  for (int k = 0; k < chunk; ++k)
    if constexpr (n / chunk == 2) {
      v[k] = alternate<0>(t[k], t[chunk + k], lanes);
      v[chunk + k] = alternate<1>(t[k], t[chunk + k], lanes);
    } else {
      const V even = alternate<0>(t[k], t[chunk + k], lanes), odd = alternate<1>(t[k], t[chunk + k], lanes);
      const V other_even = alternate<0>(t[2 * chunk + k], t[3 * chunk + k], lanes);
      const V other_odd = alternate<1>(t[2 * chunk + k], t[3 * chunk + k], lanes);
      v[k] = alternate<0>(even, other_even, lanes);
      v[chunk + k] = alternate<0>(odd, other_odd, lanes);
      v[2 * chunk + k] = alternate<1>(even, other_even, lanes);
      v[3 * chunk + k] = alternate<1>(odd, other_odd, lanes);
    }
}

// A vector of S from kLanesOf<S> elements of T.
template <class S, class T>
MFAC_INLINE Vec<S> load_as(const T* p) {
  if constexpr (sizeof(S) == sizeof(T)) {
    return load<Vec<S>>(p);
  } else {
    const auto join = [&]<int... l>(std::integer_sequence<int, l...>) {
      return __builtin_shufflevector(widen32(p), widen32(p + kLanes), l...);
    };
    return join(std::make_integer_sequence<int, kLanes32>());
  }
}
template <class S, class T>
MFAC_INLINE Vec<S> load_first_as(const T* p, int64_t n) {
  T padded[kLanesOf<S>];
  copy_first(p, n, padded);
  return load_as<S>(padded);
}

// v[j], lane i <- x[i * step + j] as S: `height` rows of `width` elements, at most as many as lanes, zero past them
template <class S, class T>
MFAC_INLINE void load_transposed(const T* x, int64_t step, int64_t height, int64_t width, Vec<S>* v) {
  constexpr int64_t n = kLanesOf<S>;
  if (height == n && width == n) {
#pragma GCC unroll 16
    for (int64_t i = 0; i < n; ++i) v[i] = load_as<S>(x + i * step);
  } else {
#pragma GCC unroll 16
    for (int64_t i = 0; i < n; ++i) v[i] = i < height ? load_first_as<S>(x + i * step, width) : Vec<S>{};
  }
  transpose_vectors<Vec<S>, n>(v);
}

// out = in^T, tiles
template <class S>
__attribute__((noinline)) void transpose_tile(const S* in, S* out) {
  constexpr int n = kLanesOf<S>;
  for (int64_t row = 0; row < kTile<S>; row += n)
    for (int64_t column = 0; column < kTile<S>; column += n) {
      Vec<S> v[n];
      load_transposed<S>(in + row * kTile<S> + column, kTile<S>, n, n, v);
#pragma GCC unroll 16
      for (int i = 0; i < n; ++i) store(out + (column + i) * kTile<S> + row, v[i]);
    }
}

// panels[c / kTile, k, c % kTile] = g[k, c], zero past `columns`; panels of `rows` rows. The `ahead` columns that follow are prefetched.
template <class S, class T>
void pack_columns(const T* g, int64_t rows, int64_t stride, int64_t columns, int64_t ahead, S* panels) {
  for (int64_t k = 0; k < rows; ++k, g += stride) {
    S* row = panels + k * kTile<S>;
    int64_t c = 0;
    for (; c + kTile<S> <= columns; c += kTile<S>, row += rows * kTile<S>) widen_row(g + c, kTile<S>, row, kTile<S>);
    if (c < columns) widen_row(g + c, columns - c, row, kTile<S>);
    for (int64_t p = 0; p < ahead; p += 64 / sizeof(T)) __builtin_prefetch(g + columns + p, 0, 2);
  }
}

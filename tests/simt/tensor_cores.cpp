// Tensor-core products, loads of matrices and asynchronous copies under the SIMT shim, rightly or with a fault planted. Fragments are
// spelled here as NVIDIA's documents spell them, element by element.
#include <vector>

#include "common/cuda/async_copy.cuh"
#include "common/cuda/mma.cuh"
#include "program.h"

using namespace mfac_kernels;

namespace {

template <class T>
uint32_t bits_of(float x) {
  if constexpr (sizeof(T) == 4) {
    return to_tf32(x);
  } else {
    T narrowed;
    narrow(x, narrowed);
    return narrowed.bits;
  }
}

enum class Fault { none, absent_lane, returned_lane };

// PTX ISA, "Matrix fragments for mma.m16n8k8" (TF32) and "mma.m16n8k16" (bf16, f16)
template <class T, Fault fault>
__global__ void product(const float* a, const float* b, float* d) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int group = lane >> 2, thread_in_group = lane % 4;
  constexpr int k = sizeof(T) == 4 ? 8 : 16;
  a += warp * 16 * k;
  b += warp * k * 8;
  d += warp * 16 * 8;
  uint32_t fragment_a[4] = {}, fragment_b[2] = {};
  if constexpr (sizeof(T) == 4) {
    for (int i = 0; i < 4; ++i) {
      const int row = i == 0 || i == 2 ? group : group + 8, column = i < 2 ? thread_in_group : thread_in_group + 4;
      fragment_a[i] = bits_of<T>(a[row * k + column]);
    }
    for (int i = 0; i < 2; ++i) fragment_b[i] = bits_of<T>(b[(i == 0 ? thread_in_group : thread_in_group + 4) * 8 + group]);
  } else {
    for (int i = 0; i < 8; ++i) {
      const int row = i < 2 || (4 <= i && i < 6) ? group : group + 8;
      const int column = i < 4 ? thread_in_group * 2 + (i & 1) : thread_in_group * 2 + (i & 1) + 8;
      fragment_a[i / 2] |= bits_of<T>(a[row * k + column]) << 16 * (i % 2);
    }
    for (int i = 0; i < 4; ++i) {
      const int row = i < 2 ? thread_in_group * 2 + (i & 1) : thread_in_group * 2 + (i & 1) + 8;
      fragment_b[i / 2] |= bits_of<T>(b[row * 8 + group]) << 16 * (i % 2);
    }
  }
  float fragment_d[4];
  for (int i = 0; i < 4; ++i) fragment_d[i] = d[(i < 2 ? group : group + 8) * 8 + thread_in_group * 2 + (i & 1)];
  if (fault == Fault::returned_lane && lane == 9) return;
  if (fault != Fault::absent_lane || lane != 9) mma<T>(fragment_d, fragment_a, fragment_b);
  __syncthreads();
  for (int i = 0; i < 4; ++i) d[(i < 2 ? group : group + 8) * 8 + thread_in_group * 2 + (i & 1)] = fragment_d[i];
}

// Small whole numbers: every sum is exact
float entry(int i, int seed) { return static_cast<float>((i * 37 + seed * 101) % 13 - 6); }

template <class T, Fault fault = Fault::none>
bool product_is_right() {
  constexpr int k = kMmaDepth<T>, kWarps = 2;
  std::vector<float> a(kWarps * 16 * k), b(kWarps * k * 8), d(kWarps * 16 * 8), expected;
  for (size_t i = 0; i < a.size(); ++i) a[i] = entry(i, 1);
  for (size_t i = 0; i < b.size(); ++i) b[i] = entry(i, 2);
  for (size_t i = 0; i < d.size(); ++i) d[i] = entry(i, 3);
  expected = d;
  for (int w = 0; w < kWarps; ++w)
    for (int row = 0; row < 16; ++row)
      for (int column = 0; column < 8; ++column)
        for (int j = 0; j < k; ++j) expected[(w * 16 + row) * 8 + column] += a[(w * 16 + row) * k + j] * b[(w * k + j) * 8 + column];
  (void)launch(product<T, fault>, dim3(1), dim3(kWarps * 32), 0, nullptr, a.data(), b.data(), d.data());
  return d == expected;
}

// Row r of matrix j holds 100 j + 10 r + column. Definition: PTX ISA, ldmatrix.
template <bool kTransposed, int n>
__global__ void load_and_compare(int rows, int* wrong) {
  MFAC_SHARED(uint16_t, matrices, 4 * 64);
  const int lane = static_cast<int>(threadIdx.x);
  for (int i = lane; i < 4 * 64; i += 32) matrices[i] = static_cast<uint16_t>(100 * (i / 64) + 10 * (i / 8 % 8) + i % 8);
  __syncwarp();
  uint32_t registers[n];
  load_matrices<kTransposed>(registers, matrices + lane % rows * 8);
  for (int j = 0; j < n; ++j) {
    for (int h = 0; h < 2; ++h) {
      const int held = lane / 4, pair = lane % 4 * 2 + h;
      const int expected = 100 * j + (kTransposed ? 10 * pair + held : 10 * held + pair);
      *wrong += (registers[j] >> 16 * h & 0xffff) != static_cast<unsigned>(expected);
    }
  }
}
template <bool kTransposed, int n, int kRows = 8 * n>
bool load_is_right() {
  int wrong = 0;
  (void)launch(load_and_compare<kTransposed, n>, dim3(1), dim3(32), 0, nullptr, kRows, &wrong);
  return wrong == 0;
}

__global__ void load_beyond_the_end() {
  MFAC_SHARED(uint16_t, matrix, 63);
  uint32_t registers[1];
  load_matrices(registers, matrix + lane_of_thread() % 8 * 8);
}
__global__ void load_misaligned() {
  MFAC_SHARED(uint16_t, matrix, 65);
  uint32_t registers[1];
  load_matrices(registers, matrix + (lane_of_thread() % 8 * 8 + 1));
}
template <void (*kernel)()>
bool runs() {
  (void)launch(kernel, dim3(1), dim3(32), 0, nullptr);
  return true;
}

// A (16, k) and B (k, 8) from shared memory to fragments, each stored as it is and (16-bit types) transposed, as mma.cuh says
template <class T, class Bits, bool kATransposed, bool kBTransposed>
__global__ void product_of_loaded(const Bits* a, const Bits* b, float* d) {
  constexpr int k = kMmaDepth<T>, kLine = 16 / sizeof(T);
  MFAC_SHARED(Bits, shared_a, 16 * k);
  MFAC_SHARED(Bits, shared_b, 8 * k);
  const int l = lane_of_thread();
  for (int i = l; i < 16 * k; i += 32) shared_a[i] = a[i];
  for (int i = l; i < 8 * k; i += 32) shared_b[i] = b[i];
  __syncwarp();
  uint32_t fragment_a[4], fragment_b[2];
  if constexpr (kATransposed)
    load_matrices<true>(fragment_a, shared_a + ((8 * (l / 16) + l % 8) * 16 + 8 * (l / 8 % 2)));
  else
    load_matrices(fragment_a, shared_a + (l % 16 * k + kLine * (l / 16)));
  if constexpr (kBTransposed)
    load_matrices<true>(fragment_b, shared_b + l % 16 * 8);
  else
    load_matrices(fragment_b, shared_b + (l % 8 * k + kLine * (l / 8 % 2)));
  float fragment_d[4] = {};
  mma<T>(fragment_d, fragment_a, fragment_b);
  for (int i = 0; i < 4; ++i) d[fragment_of_d(l, i).row * 8 + fragment_of_d(l, i).column] = fragment_d[i];
}
template <class T, bool kATransposed = false, bool kBTransposed = false>
bool product_of_loaded_is_right() {
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>;
  constexpr int k = kMmaDepth<T>;
  std::vector<Bits> a(16 * k), b(8 * k);
  std::vector<float> d(16 * 8, NAN), expected(16 * 8);
  for (int j = 0; j < k; ++j) {
    for (int row = 0; row < 16; ++row) a[kATransposed ? j * 16 + row : row * k + j] = static_cast<Bits>(bits_of<T>(entry(row * k + j, 1)));
    for (int column = 0; column < 8; ++column)
      b[kBTransposed ? j * 8 + column : column * k + j] = static_cast<Bits>(bits_of<T>(entry(column * k + j, 2)));
    for (int i = 0; i < 16 * 8; ++i) expected[i] += entry(i / 8 * k + j, 1) * entry(i % 8 * k + j, 2);
  }
  (void)launch(product_of_loaded<T, Bits, kATransposed, kBTransposed>, dim3(1), dim3(32), 0, nullptr, a.data(), b.data(), d.data());
  return d == expected;
}

// D[0, 0] of the sum of `steps` products a b + 0 + ..., from d
__global__ void accumulate(uint32_t a, uint32_t b, int steps, float* d) {
  const bool first = lane_of_thread() == 0;
  const uint32_t fragment_a[4] = {first ? a : 0}, fragment_b[2] = {first ? b : 0};
  float fragment_d[4] = {first ? *d : 0};
  for (int i = 0; i < steps; ++i) mma<float>(fragment_d, fragment_a, fragment_b);
  if (first) *d = fragment_d[0];
}
float accumulated(uint32_t a, float b, int steps, float d) {
  (void)launch(accumulate, dim3(1), dim3(32), 0, nullptr, a, std::bit_cast<uint32_t>(b), steps, &d);
  return d;
}
bool rounding_is_right() {
  const auto bits = [](float x) { return std::bit_cast<uint32_t>(x); };
  bool right = accumulated(bits(1 + 0x1.ffcp-11f), 1, 1, 0) == 1;                // cut to 10 bits
  right = right && accumulated(to_tf32(1 + 0x1p-11f), 1, 1, 0) == 1 + 0x1p-10f;  // halves away from zero
  right = right && accumulated(to_tf32(-1 - 0x1.ffcp-12f), 1, 1, 0) == -1;       // else to nearest
  right = right && std::isnan(std::bit_cast<float>(to_tf32(NAN))) && to_tf32(INFINITY) == bits(INFINITY);
  right = right && accumulated(bits(1), 0x1.8p-24f, 1, 1) == 1;  // sums are cut towards zero
  right = right && accumulated(bits(1), -0x1p-24f, 1, 1) == 1 - 0x1p-24f;
  const double sum = accumulated(bits(1 + 0x1p-10f), 1 + 0x1p-10f, 5000, 1), exact = 1 + 5000 * (1 + 0x1p-10) * (1 + 0x1p-10);
  return right && sum < exact && sum > exact * (1 - 5000 * 0x1p-22);
}

enum class CopyFault { none, missing_wait, short_wait, missing_commit, missing_barrier, beyond_the_end, misaligned, too_many };

// out[j] = sum over rows of x (rows, n), whose rows come through a pipeline of kStages rows in shared memory, kTogether elements at a time
template <CopyFault fault>
__global__ void sum_columns(const float* x, int rows, int n, int stride, float* out) {
  constexpr int kStages = 3, kTogether = 4, kWidth = 64 * kTogether;
  MFAC_SHARED(float, stages, kStages* kWidth);
  const int thread = static_cast<int>(threadIdx.x), column = thread * kTogether, valid = max(0, min(kTogether, n - column));
  const auto start = [&](int row) {
    const int wrong = fault == CopyFault::misaligned ? 1 : fault == CopyFault::beyond_the_end ? kTogether : 0;
    const int many = fault == CopyFault::too_many ? kTogether + 1 : valid;
    if (row < rows)
      copy_async<kTogether>(stages + (row % kStages * kWidth + column + wrong), x + row * stride + (valid ? column : 0), many);
    if (fault != CopyFault::missing_commit) commit_copies();
  };
  for (int row = 0; row < kStages - 1; ++row) start(row);
  float sum[kTogether] = {};
  for (int row = 0; row < rows; ++row) {
    if (fault != CopyFault::missing_wait) wait_for_copies<kStages - 2 + (fault == CopyFault::short_wait)>();
    if (fault != CopyFault::missing_barrier) __syncthreads();  // the row is there for all, and its predecessor has been read by all
    // A neighbour's elements: the barrier matters.
    for (int i = 0; i < kTogether; ++i) sum[i] += stages[row % kStages * kWidth + (column + kTogether) % kWidth + i];
    start(row + kStages - 1);
  }
  for (int i = 0; i < kTogether; ++i) out[(column + kTogether) % kWidth + i] = sum[i];
}
template <CopyFault fault>
bool columns_are_right() {
  constexpr int kRows = 8, kColumns = 205, kStride = 208, kWidth = 256;
  std::vector<float> x(kRows * kStride, NAN), out(kWidth, NAN), expected(kWidth);
  for (int row = 0; row < kRows; ++row)
    for (int column = 0; column < kColumns; ++column)
      expected[column] += x[row * kStride + column] = static_cast<float>(row * 7 % 5 + column);
  (void)launch(sum_columns<fault>, dim3(1), dim3(64), 0, nullptr, x.data(), kRows, kColumns, kStride, out.data());
  return out == expected;  // zeros past the end
}

}  // namespace

int main(int, char** argv) {
  return run(argv, {
                       {"tf32", product_is_right<float>},
                       {"bf16", product_is_right<bf16>},
                       {"fp16", product_is_right<fp16>},
                       {"rounding", rounding_is_right},
                       {"absent_lane", product_is_right<float, Fault::absent_lane>},
                       {"returned_lane", product_is_right<float, Fault::returned_lane>},
                       {"load_x1", load_is_right<false, 1>},
                       {"load_x2", load_is_right<false, 2>},
                       {"load_x4", load_is_right<false, 4>},
                       {"load_x1_transposed", load_is_right<true, 1>},
                       {"load_x2_transposed", load_is_right<true, 2>},
                       {"load_x4_transposed", load_is_right<true, 4>},
                       {"load_wrong_rows", load_is_right<false, 4, 16>},
                       {"load_beyond_the_end", runs<load_beyond_the_end>},
                       {"load_misaligned", runs<load_misaligned>},
                       {"loaded_tf32", product_of_loaded_is_right<float>},
                       {"loaded_bf16", product_of_loaded_is_right<bf16>},
                       {"loaded_fp16_transposed_a", product_of_loaded_is_right<fp16, true, false>},
                       {"loaded_bf16_transposed_b", product_of_loaded_is_right<bf16, false, true>},
                       {"loaded_fp16_transposed_both", product_of_loaded_is_right<fp16, true, true>},
                       {"copies", columns_are_right<CopyFault::none>},
                       {"copies_missing_wait", columns_are_right<CopyFault::missing_wait>},
                       {"copies_short_wait", columns_are_right<CopyFault::short_wait>},
                       {"copies_missing_commit", columns_are_right<CopyFault::missing_commit>},
                       {"copies_missing_barrier", columns_are_right<CopyFault::missing_barrier>},
                       {"copies_beyond_the_end", columns_are_right<CopyFault::beyond_the_end>},
                       {"copies_misaligned", columns_are_right<CopyFault::misaligned>},
                       {"copies_too_many", columns_are_right<CopyFault::too_many>},
                   });
}

// Sums rows of a matrix under the SIMT shim, rightly or with a fault planted.
#include <vector>

#include "common/cuda/launch.h"
#include "program.h"

using namespace mfac_kernels;

namespace {

enum class Fault {
  none,
  missing_barrier,
  ragged_end,
  unwritten_output,
  wrong_mask,
  shared_read,
  shared_write,
  shared_size,
  divergent_barrier
};

constexpr int kThreads = 128, kWarps = kThreads / kWarpSize;

// out[row] = sum of x[row, :n], a block per row
template <Fault fault>
__global__ void sum_rows(const float* x, int64_t n, int64_t stride, float* out) {
  MFAC_SHARED(float, sums, fault == Fault::shared_size ? 5000 : kWarps);
  MFAC_DYNAMIC_SHARED(float, first);
  const int thread = static_cast<int>(threadIdx.x);
  const float* row = x + blockIdx.x * stride;
  float sum = 0;
  for (int64_t i = thread; i < n + (fault == Fault::ragged_end); i += kThreads) sum += row[i];
  if (fault == Fault::divergent_barrier && thread < 40) __syncthreads();
  if (fault == Fault::wrong_mask) sum += 0 * __shfl_xor_sync(0xffffu, sum, 1);
  sum = warp_sum(sum);
  if (lane_of_thread() == 0) sums[warp_of_thread()] = sum;
  if (thread == 0) *(&first[0] + (fault == Fault::shared_write)) = sum;  // a raw pointer, whose bounds nobody checks at the access
  if (fault != Fault::missing_barrier) __syncthreads();
  if (thread > 0) return;
  sum = first[0];
  for (int w = 1; w < kWarps + (fault == Fault::shared_read); ++w) sum += sums[w];
  if (fault != Fault::unwritten_output || blockIdx.x > 0) out[blockIdx.x] = sum;
}

template <Fault fault>
bool is_right() {
  constexpr int64_t kRows = 3, kColumns = 301, kStride = 302;
  std::vector<float> x(kRows * kStride, 1e9f), out(kRows, NAN);
  for (int64_t r = 0; r < kRows; ++r)
    for (int64_t c = 0; c < kColumns; ++c) x[r * kStride + c] = static_cast<float>(r + c);
  (void)launch(sum_rows<fault>, dim3(kRows), dim3(kThreads), fault == Fault::shared_size ? kDynamicWithoutAsking : sizeof(float), nullptr,
               x.data(), kColumns, kStride, out.data());
  for (int64_t r = 0; r < kRows; ++r)
    if (out[r] != static_cast<float>(r * kColumns + kColumns * (kColumns - 1) / 2)) return false;
  return true;
}

}  // namespace

int main(int, char** argv) {
  return run(argv, {{"none", is_right<Fault::none>},
                    {"missing_barrier", is_right<Fault::missing_barrier>},
                    {"ragged_end", is_right<Fault::ragged_end>},
                    {"unwritten_output", is_right<Fault::unwritten_output>},
                    {"wrong_mask", is_right<Fault::wrong_mask>},
                    {"shared_read", is_right<Fault::shared_read>},
                    {"shared_write", is_right<Fault::shared_write>},
                    {"shared_size", is_right<Fault::shared_size>},
                    {"divergent_barrier", is_right<Fault::divergent_barrier>}});
}

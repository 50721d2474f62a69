// The compressed form of a stride-1 convolution's factor (lags/form.h): one C x C sum, a slot, for the pairs of kernel offsets that are the
// same sum.
//
//   state[slot(o, o2), c, c2] <- beta state + alpha sum_r P[r, (c, o)] P[r, (c2, o2)]         expand:  factor[(c, o), (c2, o2)] = its slot
//
// Floor: as for the factor (kronecker/cuda/tensor_kernels.cu, fma_kernels.cu), of 29 blocks of C x C in place of 45 for 3 x 3 kernels with
// padding 1; the state, 29 C^2, read and written. The expansion reads 29 C^2 and writes 81 C^2 numbers: 15 us for C = 256 on an H200.
// Expected: of the sums what those kernels reach of it, with C a multiple of the tile (else tiles straddle blocks, and fewer can be left
// out); 60 % of the copy bandwidth for the expansion, whose reads are c2 by c2 at K places.
//
// The sums are those of patches, once per slot: products of all patches with columns ordered by kernel offsets, of which only tiles that
// hold a slot's first pair are made. So they cost what the arithmetic does, on tensor cores or not, with nothing packed: for the sums of
// pieces that lags/form.h describes, each shared by several slots, a third of it would do, in many small products.
#include <algorithm>
#include <utility>
#include <vector>

#include "kronecker/cuda/products.cuh"
#include "lags/cuda/lags_kernels.h"

namespace mfac_kernels {
namespace {

constexpr int kThreads = 256;
constexpr int kTable = 512;  // entries of a table among a kernel's arguments

// The first pairs of offsets of slots [first, first + count)
struct SlotPairs {
  int64_t first, count;
  int16_t low[kTable], high[kTable];
};

struct LagUpdate {
  OffsetSums from;
  DeviceLags state;
  int64_t slots, offsets;
  double beta, alpha;
  int32_t* refused;
};

template <class A>
__device__ __forceinline__ void accumulate(A& entry, double beta, double alpha, double value) {
  const double before = beta == 0 ? 0 : beta * static_cast<double>(entry);
  entry = static_cast<A>(before + alpha * value);
}

// Entries [begin, end) of each group's state; blockIdx.y: groups
template <class A>
__global__ void __launch_bounds__(kThreads) state_kernel(const LagUpdate u, const SlotPairs pairs, int64_t begin, int64_t end) {
  if (u.from.flags) {
    int found = threadIdx.x < kFlagged ? u.from.flags[threadIdx.x] : 0;
    found = __syncthreads_or(found);
    if (found) {
      if (blockIdx.x == 0 && blockIdx.y == 0 && threadIdx.x == 0) *u.refused = 1;
      return;
    }
  }
  const int64_t e = begin + int64_t(blockIdx.x) * kThreads + threadIdx.x, group = blockIdx.y;
  if (e >= end) return;
  const int64_t channels = u.state.channels, padded = u.from.padded_channels, square = channels * channels;
  int64_t row = u.offsets * padded, column = row;  // of the bias
  if (e < u.slots * square) {
    const int64_t slot = e / square - pairs.first, within = e % square;
    row = pairs.low[slot] * padded + within / channels;
    column = pairs.high[slot] * padded + within % channels;
  } else if (e < u.state.size - 1) {
    const int64_t within = e - u.slots * square;
    row = within / channels * padded + within % channels;
  }
  const A* from = static_cast<const A*>(u.from.sums) + sum_index(u.from.cut, group, row, column);
  double sum = 0;
#pragma unroll 4
  for (int64_t run = 0; run < u.from.cut.splits; ++run) sum += static_cast<double>(from[run * u.from.cut.sums_of_run()]);
  accumulate(static_cast<A*>(u.state.data)[group * u.state.size + e], u.beta, u.alpha, sum);
}

// Where the blocks of one offset with each other offset are: the slot, or the complement of one that is read transposed
struct Places {
  int16_t slot[kTable];
};

struct Expansion {
  Factor factor;
  DeviceLags state;
  int64_t slots, offsets, offset;  // offset = offsets: the row of the bias and the empty ones after it
  double beta, alpha;
};

// blockIdx.x: columns of a block; blockIdx.y and z: rows of this offset, and groups
template <class A>
__global__ void __launch_bounds__(kThreads) expand_kernel(const Expansion x, const Places places) {
  const Factor& factor = x.factor;
  const int64_t channels = x.state.channels, group = blockIdx.z, patch = channels * x.offsets, square = channels * channels;
  const A* const state = static_cast<const A*>(x.state.data) + group * x.state.size;
  const A* const bias_sums = state + x.slots * square;
  const int64_t all_rows = factor.groups > 1 ? factor.size : factor.blocks * factor.size;
  const int64_t local = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (local >= factor.size) return;
  for (int64_t r = blockIdx.y;; r += gridDim.y) {
    const int64_t row = x.offset < x.offsets ? r * x.offsets + x.offset : patch + r;
    if (row >= all_rows || (x.offset < x.offsets && r >= channels)) return;
    const int64_t column = row / factor.size * factor.size + local;  // a group is one block
    A& entry = static_cast<A*>(factor.data)[(group * all_rows + row) * factor.size + local];
    if (row >= factor.features || column >= factor.features) {
      entry = 0;
      continue;
    }
    double value;
    if (row < patch && column < patch) {
      const int slot = places.slot[column % x.offsets];
      const int64_t other = column / x.offsets;
      value = static_cast<double>(slot >= 0 ? state[slot * square + r * channels + other] : state[~slot * square + other * channels + r]);
    } else {
      const int64_t feature = min(row, column);  // of the bias with it
      value = static_cast<double>(bias_sums[feature < patch ? feature % x.offsets * channels + feature / x.offsets : patch]);
    }
    accumulate(entry, x.beta, x.alpha, value);
  }
}

// The first pair of offsets (low <= high) of each slot
std::vector<std::pair<int64_t, int64_t>> pairs_of(const LagForm& form) {
  std::vector<std::pair<int64_t, int64_t>> pairs(form.slots(), {-1, -1});
  for (int64_t o = 0; o < form.offsets(); ++o)
    for (int64_t o2 = o; o2 < form.offsets(); ++o2) {
      auto& pair = pairs[form.place(o, o2).slot];
      if (pair.first < 0) pair = {o, o2};
    }
  return pairs;
}

template <class A>
cudaError_t launch_state(const LagUpdate& u, const std::vector<std::pair<int64_t, int64_t>>& pairs, cudaStream_t stream) {
  const int64_t square = u.state.channels * u.state.channels;
  for (int64_t first = 0; first < u.slots; first += kTable) {
    SlotPairs table = {first, std::min<int64_t>(kTable, u.slots - first), {}, {}};
    for (int64_t s = 0; s < table.count; ++s) {
      table.low[s] = static_cast<int16_t>(pairs[first + s].first);
      table.high[s] = static_cast<int16_t>(pairs[first + s].second);
    }
    const bool last = first + table.count == u.slots;
    const int64_t begin = first * square, end = last ? u.state.size : (first + table.count) * square;
    const dim3 grid(static_cast<unsigned>(divide_up(end - begin, kThreads)), static_cast<unsigned>(u.state.groups));
    const cudaError_t error = launch(state_kernel<A>, grid, dim3(kThreads), 0, stream, u, table, begin, end);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

template <class A>
cudaError_t launch_expand(Expansion x, const LagForm& form, cudaStream_t stream) {
  const int64_t all_rows = x.factor.groups > 1 ? x.factor.size : x.factor.blocks * x.factor.size;
  for (x.offset = 0; x.offset <= x.offsets; ++x.offset) {
    const int64_t rows = x.offset < x.offsets ? x.state.channels : all_rows - x.state.channels * x.offsets;
    if (rows == 0) continue;
    Places places = {};
    for (int64_t o = 0; o < x.offsets && x.offset < x.offsets; ++o) {
      const auto [slot, transposed] = form.place(x.offset, o);
      places.slot[o] = static_cast<int16_t>(transposed ? ~slot : slot);
    }
    const dim3 grid(static_cast<unsigned>(divide_up(x.factor.size, kThreads)), static_cast<unsigned>(std::min<int64_t>(rows, 65535)),
                    static_cast<unsigned>(x.factor.groups));
    const cudaError_t error = launch(expand_kernel<A>, grid, dim3(kThreads), 0, stream, x, places);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace

int64_t lags_workspace(const FactorRows& rows, const Factor& like) { return offset_workspace(rows, like); }

cudaError_t accumulate_lags(const FactorRows& rows, const Factor& like, const LagForm& form, const DeviceLags& state, double beta,
                            double alpha, int32_t* refused, void* workspace, cudaStream_t stream) {
  if (like.features == 0 || state.groups == 0) return cudaSuccess;
  const auto pairs = pairs_of(form);
  uint64_t chosen[Products::kChoices] = {};
  const bool choose = form.offsets() <= Products::kChoices;
  if (choose)
    for (const auto& [low, high] : pairs) chosen[high] |= uint64_t(1) << low;
  LagUpdate update = {{}, state, form.slots(), form.offsets(), beta, alpha, refused};
  const cudaError_t error = offset_products(rows, like, choose ? chosen : nullptr, refused != nullptr, workspace, &update.from, stream);
  if (error != cudaSuccess) return error;
  return like.dtype == DType::f64 ? launch_state<double>(update, pairs, stream) : launch_state<float>(update, pairs, stream);
}

cudaError_t expand_lags(const LagForm& form, const DeviceLags& state, const Factor& factor, double beta, double alpha,
                        cudaStream_t stream) {
  if (factor.size == 0 || state.groups == 0) return cudaSuccess;
  const Expansion expansion = {factor, state, form.slots(), form.offsets(), 0, beta, alpha};
  return factor.dtype == DType::f64 ? launch_expand<double>(expansion, form, stream) : launch_expand<float>(expansion, form, stream);
}

}  // namespace mfac_kernels

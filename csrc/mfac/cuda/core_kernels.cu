// The m x m core of a sliding window on the device: what mfac/cpu/core_impl.h does, on every SM, no number of it read by the host.
//
//   insert     begin; the oldest leaves (core_drop.cuh: residual of p, p, rotations, rotate); the newest is appended
//   append     l = L^-1 s and x = L^-T l in six passes (core_passes.cuh);   L_nn = sqrt(s_n + shift - |l|^2);
//              row n of L is l, row n of W is -x / L_nn;   K^-1 e_n = -x / L_nn^2, and 1 / L_nn^2 at n
//   solve      the six passes
//   refactor   appends in the order of age
//
// A launch ends where all of it must be there before anything goes on: eleven for an insert, six for a solve, six m for a refactorisation.
//
// Floor: m^2 doubles read and written by the rotations and read four times by the passes, 48 MB at m = 1024 out of L2: 10 us on an H200.
// Expected: 2 to 3 us for each launch, which is the latency of a chain of loads and of the launch, about 30 us. One SM, by substitution,
// took 903 us there. per_gradient while the window fills appends every gradient again, O(m^3), in one block that loops over the passes:
// how many there are is known to the device alone.
#include "mfac/cuda/core_drop.cuh"
#include "mfac/cuda/core_kernels.h"
#include "mfac/cuda/seen.cuh"

namespace mfac_kernels {
namespace {

// What an insert or a refactorisation works on. work: kCoreWork vectors of m and the flag of a refusal.
struct Core {
  const double* gram;
  double* factor;
  const int64_t* state;
  int64_t m;
  double shift;
  bool per_gradient;
  double* work;
  double* coefficients;  // null: not wanted

  __device__ Ring ring() const { return ring_of(m, seen_of(state), shift, per_gradient); }
  __device__ double* vector(int i) const { return work + i * m; }
  __device__ Rotations rotations() const { return {vector(3), vector(4), vector(5), vector(6)}; }
  __device__ double& refused() const { return work[kCoreWork * m]; }
};

constexpr int kSerialThreads = 1024;  // of kernels of one block, a gradient each
constexpr int64_t kNewest = -1;

// One gradient to append: to `older` by the row of its slot in the Gram matrix.
struct Append {
  Ring ring;
  Span older;  // count < 0: nothing to do
  int64_t slot;
  SolveVectors vectors;
};

// age: position of the gradient in the ring, or kNewest
__device__ __forceinline__ Append append_of(const Core& core, int64_t age) {
  const Ring ring = core.ring();
  const bool skip = age == kNewest ? core.refused() != 0 : age >= ring.filled;
  const int64_t position = age == kNewest ? ring.filled - 1 : age, slot = skip ? 0 : ring.slots(position);
  return {ring, {ring.slots, skip ? -1 : position}, slot, {core.gram + slot * core.m, core.vector(0), core.vector(1), core.vector(2)}};
}

// The newest row of L and W from l = y and x = L^-T l, whose last pass this is.
__device__ __forceinline__ void append(const Core& core, const Append& a, Shared<double> sums) {
  const int64_t m = core.m;
  const SolveVectors& v = a.vectors;
  double square = 0;
  for (int64_t position = threadIdx.x; position < a.older.count; position += kCoreThreads) {
    const double l = v.y[a.older.slots(position)];
    square += l * l;
  }
  square = block_sum(square, sums);
  __syncthreads();
  // K - shift I is positive semidefinite: no pivot is below shift, nor below the rounding of the sum it comes from.
  const double whole = v.b[a.slot] + a.ring.shift, least = max(a.ring.shift, static_cast<double>(m) * 0x1p-52 * whole);
  const double pivot = sqrt(max(whole - square, least));
  column_products<Half::inverse>(core.factor, a.older, v.r, sums, [&](int64_t p, double sum) {
    const double w = -(v.x[p] + sum) / pivot;
    core.factor[a.slot * m + p] = w;
    core.factor[p * m + a.slot] = v.y[p];
    if (core.coefficients != nullptr) core.coefficients[p] = w / pivot;
  });
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    core.factor[a.slot * m + a.slot] = pivot;
    if (core.coefficients != nullptr) core.coefficients[a.slot] = 1 / pivot / pivot;
  }
}

// Counts the gradient or refuses it, stores its row of the Gram matrix, and takes p of the one it replaces from W. One block.
__global__ void __launch_bounds__(kSerialThreads, 1) begin_kernel(Core core, double* gram, int64_t* state, const double* dots) {
  const int64_t m = core.m;
  int refused = 0;
  for (int64_t p = threadIdx.x; p < m; p += kSerialThreads) {
    refused |= !isfinite(dots[p]);
    core.coefficients[p] = 0;
  }
  refused = __syncthreads_or(refused);
  const int64_t seen = seen_of(state), slot = seen % m;
  __syncthreads();  // until every thread has read the state
  if (threadIdx.x == 0) {
    ++state[refused ? 1 : 0];
    core.refused() = refused;
  }
  if (refused) return;
  const Rotations rotations = core.rotations();
  for (int64_t p = threadIdx.x; p < m; p += kSerialThreads) {
    gram[slot * m + p] = dots[p];
    if (seen >= m) rotations.p[p] = -core.factor[p * m + slot] * core.factor[slot * m + slot];
  }
}

// The gradients that stay where one is replaced; count < 0: none is.
__device__ __forceinline__ Span staying(const Core& core, const Append& a) {
  return {a.older.slots, seen_of(core.state) > core.m ? a.older.count : -1};
}

template <Drop step>
__global__ void __launch_bounds__(kCoreThreads, 1) drop_kernel(Core core) {
  MFAC_SHARED(double, sums, kPartSums);
  MFAC_SHARED(double, more_sums, kPartSums);
  const Append a = append_of(core, kNewest);
  const Span span = staying(core, a);
  if (span.count < 0) return;
  const Rotations rotations = core.rotations();
  const double* v = core.factor + a.slot * core.m;
  double* residual = a.vectors.r;
  if constexpr (step == Drop::residual)
    column_products<Half::factor>(core.factor, span, rotations.p, sums, [&](int64_t p, double sum) { residual[p] = v[p] - sum; });
  if constexpr (step == Drop::refine)
    row_products<Half::inverse>(core.factor, span, residual, [&](int64_t p, double sum) { rotations.p[p] += sum; });
  if constexpr (step == Drop::rotate) rotate(core.factor, span, v, rotations, sums, more_sums);
}

__global__ void __launch_bounds__(kSerialThreads, 1) find_rotations_kernel(Core core) {
  MFAC_SHARED(double, scratch, kWarpSize);
  const Span span = staying(core, append_of(core, kNewest));
  if (span.count >= 0) find_rotations(span, core.rotations(), scratch);
}

template <Pass pass>
__global__ void __launch_bounds__(kCoreThreads, 1) append_kernel(Core core, int64_t age) {
  MFAC_SHARED(double, sums, kPartSums);
  const Append a = append_of(core, age);
  if (a.older.count < 0) return;
  if constexpr (pass == Pass::back_refined)
    append(core, a, sums);
  else
    solve_pass<pass>(core.factor, a.older, a.vectors, sums);
}

template <Pass pass>
__global__ void __launch_bounds__(kCoreThreads, 1) solve_kernel(Core core, const double* b, double* work, double* x, int64_t vectors) {
  MFAC_SHARED(double, sums, kPartSums);
  const int64_t m = core.m;
  const Ring ring = core.ring();
  for (int64_t i = blockIdx.y; i < vectors; i += gridDim.y) {
    const SolveVectors v = {b + i * m, work + 2 * i * m, work + (2 * i + 1) * m, x + i * m};
    solve_pass<pass>(core.factor, {ring.slots, ring.filled}, v, sums);
    if (pass != Pass::back_refined) continue;
    const int64_t first = ring.filled + int64_t(blockIdx.x) * kCoreThreads + threadIdx.x, step = int64_t(gridDim.x) * kCoreThreads;
    for (int64_t position = first; position < m; position += step) v.x[ring.slots(position)] = v.b[ring.slots(position)] / ring.shift;
  }
}

// The older gradients of a window that fills, under a shift that has grown. One block.
__global__ void __launch_bounds__(kCoreThreads, 1) refill_kernel(Core core) {
  MFAC_SHARED(double, sums, kPartSums);
  if (core.refused() != 0 || seen_of(core.state) > core.m) return;
  core.coefficients = nullptr;
  const int64_t older = core.ring().filled - 1;
  for (int64_t age = 0; age < older; ++age) {
    const Append a = append_of(core, age);
    const auto pass = [&]<Pass p>() {
      solve_pass<p>(core.factor, a.older, a.vectors, sums);
      __syncthreads();
    };
    pass.template operator()<Pass::forward>();
    pass.template operator()<Pass::forward_residual>();
    pass.template operator()<Pass::forward_refined>();
    pass.template operator()<Pass::back>();
    pass.template operator()<Pass::back_residual>();
    append(core, a, sums);
    __syncthreads();
  }
}

// Launches until one fails.
class Launches {
 public:
  explicit Launches(cudaStream_t stream) : stream_(stream) {}
  template <class... Parameters, class... Arguments>
  void operator()(void (*kernel)(Parameters...), dim3 grid, int threads, const Arguments&... arguments) {
    if (error_ == cudaSuccess) error_ = launch(kernel, grid, dim3(threads), 0, stream_, arguments...);
  }
  cudaError_t error() const { return error_; }

 private:
  cudaStream_t stream_;
  cudaError_t error_ = cudaSuccess;
};

unsigned blocks_for(int64_t m) { return static_cast<unsigned>(divide_up(m, kColumns)); }

template <class Body>
void for_each_pass(const Body& body) {
  body.template operator()<Pass::forward>();
  body.template operator()<Pass::forward_residual>();
  body.template operator()<Pass::forward_refined>();
  body.template operator()<Pass::back>();
  body.template operator()<Pass::back_residual>();
  body.template operator()<Pass::back_refined>();
}

void launch_append(Launches& run, const Core& core, int64_t age) {
  for_each_pass([&]<Pass pass> { run(append_kernel<pass>, dim3(blocks_for(core.m)), kCoreThreads, core, age); });
}

}  // namespace

cudaError_t core_insert(double* gram, double* factor, int64_t* state, const double* dots, int64_t m, double shift, bool per_gradient,
                        double* work, double* coefficients, cudaStream_t stream) {
  const Core core = {gram, factor, state, m, shift, per_gradient, work, coefficients};
  const dim3 grid(blocks_for(m));
  Launches run(stream);
  run(begin_kernel, dim3(1), kSerialThreads, core, gram, state, dots);
  if (per_gradient) run(refill_kernel, dim3(1), kCoreThreads, core);
  run(drop_kernel<Drop::residual>, grid, kCoreThreads, core);
  run(drop_kernel<Drop::refine>, grid, kCoreThreads, core);
  run(find_rotations_kernel, dim3(1), kSerialThreads, core);
  run(drop_kernel<Drop::rotate>, grid, kCoreThreads, core);
  launch_append(run, core, kNewest);
  return run.error();
}

cudaError_t core_solve(const double* factor, const int64_t* state, int64_t m, double shift, bool per_gradient, const double* b,
                       double* work, double* x, int64_t vectors, cudaStream_t stream) {
  if (vectors == 0) return cudaSuccess;
  // Solves only read the factor.
  const Core core = {nullptr, const_cast<double*>(factor), state, m, shift, per_gradient, nullptr, nullptr};
  constexpr int64_t kMostRows = 65535;  // of a grid
  const dim3 grid(blocks_for(m), static_cast<unsigned>(vectors < kMostRows ? vectors : kMostRows));
  Launches run(stream);
  for_each_pass([&]<Pass pass> { run(solve_kernel<pass>, grid, kCoreThreads, core, b, work, x, vectors); });
  return run.error();
}

cudaError_t core_refactor(const double* gram, double* factor, const int64_t* state, int64_t m, double shift, bool per_gradient,
                          double* work, cudaStream_t stream) {
  const Core core = {gram, factor, state, m, shift, per_gradient, work, nullptr};
  Launches run(stream);
  for (int64_t age = 0; age < m; ++age) launch_append(run, core, age);
  return run.error();
}

}  // namespace mfac_kernels

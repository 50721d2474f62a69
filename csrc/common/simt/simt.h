// CUDA's words for a C++ compiler: kernels run on the CPU, one fiber per CUDA thread, the blocks of a grid one after the other.
//
// A fiber runs until it meets a barrier, a shuffle or a vote, so a kernel is executed in an order that a GPU allows. What a GPU leaves
// open is made visible:
//   - the order of threads and of blocks is forward, reverse or random (MFAC_KERNELS_SIMT_ORDER): a result that depends on it shows a race;
//   - shared memory is filled with NaN before each block, bounds are checked at every access through Shared<T>, guard bytes around each
//     array are checked when a block ends;
//   - a barrier or a shuffle that can never complete, and one that threads reach at different lines or with different masks, is an Error
//     that names the block, the thread and the line, as is a shuffle that reads from a lane outside its mask, and an operation of whole
//     warps (mma.cuh) that some lanes of the warp do not reach;
//   - an asynchronous copy (async_copy.cuh) lands at the wait that covers it, and not before.
// It cannot see races between two barriers that every order hides, out-of-bounds global memory, occupancy or speed.
#pragma once
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <source_location>
#include <stdexcept>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };  // what goes wrong here is thrown, with more to say than a code
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

namespace mfac_kernels::simt {

using Location = std::source_location;

constexpr unsigned kWarpSize = 32;
constexpr unsigned kMaxThreads = 1024;

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

enum class Order { forward, reverse, random };
Order order();  // the one in use; at start that of MFAC_KERNELS_SIMT_ORDER
void set_order(Order);

// Runs body once per thread of the grid. Throws what a thread throws, and Error. most_shared: bytes, of static and dynamic arrays together.
void launch(dim3 grid, dim3 block, size_t dynamic_shared, size_t most_shared, const std::function<void()>& body);

// The thread that is running
const uint3& thread_index();
const uint3& block_index();
const dim3& block_size();
const dim3& grid_size();

[[noreturn]] void fail(const char* what, Location where);

// What the lanes of a warp do together: each gives a value, and gets that of lane `source` or, from a vote, the mask of non-zero values.
enum class Collective { sync, shuffle, vote, whole_warp };
uint64_t meet_warp(Collective, unsigned mask, uint64_t value, unsigned source, Location where);
// What all 32 lanes do together: `work` is called once, with the `data` of each.
using WarpWork = void (*)(void* const* lanes);
void meet_whole_warp(WarpWork work, void* data, Location where);

// `bytes` from global to shared memory, zeros after the first `valid` of them: NaN until wait_for_copies lands the groups that this thread
// has committed, all but the newest `pending`.
void copy_async(void* to, const void* from, size_t bytes, size_t valid, Location where);
void commit_copies();
void wait_for_copies(int64_t pending);

// Waits for the block; returns how many of its threads gave a true predicate.
int meet_block(bool predicate, Location where);
unsigned lane();

// An array in shared memory: a pointer that knows its bounds.
template <class T>
class Shared {
 public:
  Shared(T* data, int64_t size) : begin_(data), end_(data + size), at_(data) {}
  T& operator[](int64_t i) const { return *checked(at_ + i); }
  T& operator*() const { return *checked(at_); }
  Shared operator+(int64_t n) const {
    Shared moved = *this;
    moved.at_ += n;
    return moved;
  }
  // n elements that one instruction reads or writes
  T* together(int64_t n, Location where) const {
    if (at_ < begin_ || at_ + n > end_) fail("shared memory accessed out of bounds", where);
    if (reinterpret_cast<uintptr_t>(at_) % (n * sizeof(T)) != 0)
      fail("shared memory accessed at an address that is no multiple of the size", where);
    return at_;
  }

 private:
  T* checked(T* p) const {
    if (p < begin_ || p >= end_) [[unlikely]]
      fail("shared memory accessed out of bounds", Location::current());
    return p;
  }
  T *begin_, *end_, *at_;
};

void* static_shared(const void* key, size_t bytes);  // the same for every thread of a block; key: one per array
void* dynamic_shared(size_t* bytes);

template <class T>
Shared<T> shared_array(const void* key, int64_t count) {
  return {static_cast<T*>(static_shared(key, count * sizeof(T))), count};
}
template <class T>
Shared<T> dynamic_array() {
  size_t bytes;
  void* data = dynamic_shared(&bytes);
  return {static_cast<T*>(data), static_cast<int64_t>(bytes / sizeof(T))};
}

template <class T>
T shuffle(unsigned mask, T value, unsigned source, Location where) {
  static_assert(sizeof(T) <= sizeof(uint64_t) && std::is_trivially_copyable_v<T>);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = meet_warp(Collective::shuffle, mask, bits, source, where);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace mfac_kernels::simt

#define threadIdx (::mfac_kernels::simt::thread_index())
#define blockIdx (::mfac_kernels::simt::block_index())
#define blockDim (::mfac_kernels::simt::block_size())
#define gridDim (::mfac_kernels::simt::grid_size())

inline void __syncthreads(std::source_location where = std::source_location::current()) { mfac_kernels::simt::meet_block(false, where); }
inline int __syncthreads_or(int predicate, std::source_location where = std::source_location::current()) {
  return mfac_kernels::simt::meet_block(predicate != 0, where) != 0;
}
inline int __syncthreads_count(int predicate, std::source_location where = std::source_location::current()) {
  return mfac_kernels::simt::meet_block(predicate != 0, where);
}
inline void __syncwarp(unsigned mask = ~0u, std::source_location where = std::source_location::current()) {
  mfac_kernels::simt::meet_warp(mfac_kernels::simt::Collective::sync, mask, 0, 0, where);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, std::source_location where = std::source_location::current()) {
  return static_cast<unsigned>(mfac_kernels::simt::meet_warp(mfac_kernels::simt::Collective::vote, mask, predicate != 0, 0, where));
}
inline int __any_sync(unsigned mask, int predicate, std::source_location where = std::source_location::current()) {
  return __ballot_sync(mask, predicate, where) != 0;
}
inline int __all_sync(unsigned mask, int predicate, std::source_location where = std::source_location::current()) {
  return __ballot_sync(mask, !predicate, where) == 0;
}
// A source outside the lane's segment of `width` lanes is the lane itself.
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, std::source_location where = std::source_location::current()) {
  const int first = static_cast<int>(mfac_kernels::simt::lane()) & ~(width - 1);
  return mfac_kernels::simt::shuffle(mask, value, first | (source & (width - 1)), where);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, std::source_location where = std::source_location::current()) {
  const int lane = static_cast<int>(mfac_kernels::simt::lane()), source = lane ^ bits;
  return mfac_kernels::simt::shuffle(mask, value, source < (lane | (width - 1)) + 1 ? source : lane, where);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned n, int width = 32, std::source_location where = std::source_location::current()) {
  const int lane = static_cast<int>(mfac_kernels::simt::lane()), source = lane + static_cast<int>(n);
  return mfac_kernels::simt::shuffle(mask, value, source <= (lane | (width - 1)) ? source : lane, where);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned n, int width = 32, std::source_location where = std::source_location::current()) {
  const int lane = static_cast<int>(mfac_kernels::simt::lane()), source = lane - static_cast<int>(n);
  return mfac_kernels::simt::shuffle(mask, value, source >= (lane & ~(width - 1)) ? source : lane, where);
}

template <class T>
T __ldg(const T* p) {
  return *p;
}
// Blocks run one after the other and fibers give way only where they say so: a plain addition is atomic.
template <class T>
T atomicAdd(T* p, std::type_identity_t<T> value) {
  const T before = *p;
  *p = before + value;
  return before;
}
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline double rsqrt(double x) { return 1 / std::sqrt(x); }
inline float __uint_as_float(unsigned bits) { return std::bit_cast<float>(bits); }
inline double __hiloint2double(int high, int low) {
  return std::bit_cast<double>(static_cast<uint64_t>(static_cast<unsigned>(high)) << 32 | static_cast<unsigned>(low));
}
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }

// CUDA's overloads, unqualified
using std::isfinite;
using std::max;
using std::memcpy;
using std::min;

// Independent tasks of unequal size, dealt to threads as these become free, and a workspace for each thread. Which thread runs a task
// never changes its result.
#pragma once
#include <atomic>
#include <cstddef>
#include <memory>
#include <new>

#include "common/parallel.h"

namespace mfac_kernels {

template <class Body>
void for_each_task(int64_t count, const Body& body) {
  std::atomic<int64_t> next{0};
  parallel_for(0, count, 1, [&](int64_t, int64_t) {
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < count;) body(task);
  });
}

// This thread's workspace: at least `bytes`, aligned to cache lines, kept from call to call.
inline void* scratch(size_t bytes) {
  constexpr auto kAlignment = std::align_val_t(64);
  struct Free {
    void operator()(void* p) const { ::operator delete(p, kAlignment); }
  };
  thread_local std::unique_ptr<void, Free> buffer;
  thread_local size_t size = 0;
  if (size < bytes) {
    buffer.reset();
    buffer.reset(::operator new(bytes, kAlignment));
    size = bytes;
  }
  return buffer.get();
}

}  // namespace mfac_kernels

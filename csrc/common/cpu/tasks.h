// Independent tasks of unequal size, dealt to threads as these become free, and a workspace for each thread. Which thread runs a task
// never changes its result.
#pragma once
#include <atomic>
#include <cstddef>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#include "common/cpu/parallel.h"

namespace mfac_kernels {

template <class Body>
void for_each_task(int64_t count, const Body& body) {
  if (count == 1) return body(int64_t(0));
  std::atomic<int64_t> next{0};
  parallel_for(0, count, 1, [&](int64_t, int64_t) {
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < count;) body(task);
  });
}

struct FreeAligned {
  static constexpr auto kAlignment = std::align_val_t(64);  // a line of the cache
  void operator()(void* p) const { ::operator delete(p, kAlignment); }
};
using AlignedBytes = std::unique_ptr<void, FreeAligned>;
inline AlignedBytes aligned_bytes(size_t bytes) { return AlignedBytes(::operator new(bytes, FreeAligned::kAlignment)); }

// This thread's workspace: at least `bytes`, aligned to cache lines, kept from call to call.
inline void* scratch(size_t bytes) {
  thread_local AlignedBytes buffer;
  thread_local size_t size = 0;
  if (size < bytes) {
    buffer.reset();
    buffer = aligned_bytes(bytes);
    size = bytes;
  }
  return buffer.get();
}

// Memory that the threads of one call share. The calling thread keeps a few megabytes of it from call to call: the first touch of fresh
// pages, which the allocator hands back to the system between the layers of a network, takes longer than the arithmetic on them.
class Workspace {
 public:
  explicit Workspace(size_t bytes) {
    auto& kept = kept_buffers();
    auto found = kept.end();  // the smallest that is large enough
    for (auto buffer = kept.begin(); buffer != kept.end(); ++buffer)
      if (buffer->size >= bytes && (found == kept.end() || buffer->size < found->size)) found = buffer;
    if (found == kept.end()) {
      if (kept.size() == kMostKept) kept.erase(kept.begin());
      buffer_ = {aligned_bytes(bytes), bytes};
    } else {
      buffer_ = std::move(*found);
      kept.erase(found);
    }
  }
  ~Workspace() {
    auto& kept = kept_buffers();
    size_t total = buffer_.size;
    for (const Buffer& buffer : kept) total += buffer.size;
    if (kept.size() < kMostKept && total <= kMostBytes) kept.push_back(std::move(buffer_));
  }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  char* data() const { return static_cast<char*>(buffer_.data.get()); }

 private:
  static constexpr size_t kMostKept = 2, kMostBytes = 64 << 20;

  struct Buffer {
    AlignedBytes data;
    size_t size = 0;
  };
  static std::vector<Buffer>& kept_buffers() {
    thread_local std::vector<Buffer> buffers;
    return buffers;
  }

  Buffer buffer_;
};

}  // namespace mfac_kernels

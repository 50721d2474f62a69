// The machinery of simt.h: threads as fibers, barriers, shared memory.
#include "common/simt/simt.h"

#include <algorithm>
#include <cstdlib>
#include <exception>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <sstream>
#include <string>
#include <string_view>
#include <vector>

#include "common/simt/fibers.h"

namespace mfac_kernels::simt {
namespace {

// ---- shared memory ---------------------------------------------------------------------------------------------------------------

// Poisoned with NaN, between guard bytes.
class Arena {
 public:
  explicit Arena(size_t bytes) : bytes_(bytes), memory_(new (std::align_val_t(kGuard)) unsigned char[bytes + 2 * kGuard]) {
    std::memset(memory_.get(), kGuardByte, bytes + 2 * kGuard);
    std::memset(data(), 0xff, bytes);
  }
  unsigned char* data() const { return memory_.get() + kGuard; }
  size_t bytes() const { return bytes_; }
  bool intact() const {
    const auto is_guard = [](unsigned char byte) { return byte == kGuardByte; };
    return std::all_of(memory_.get(), data(), is_guard) && std::all_of(data() + bytes_, data() + bytes_ + kGuard, is_guard);
  }

 private:
  static constexpr size_t kGuard = 128;
  static constexpr unsigned char kGuardByte = 0xa5;
  struct Free {
    void operator()(unsigned char* p) const { ::operator delete[](p, std::align_val_t(kGuard)); }
  };
  size_t bytes_;
  std::unique_ptr<unsigned char, Free> memory_;
};

// ---- a block -----------------------------------------------------------------------------------------------------------------------

enum class State { ready, at_block_barrier, at_warp_barrier, done };

struct Copy {
  void* to;
  const void* from;
  size_t bytes, valid;
  int64_t group;
};

struct Thread {
  Context context;
  uint3 index;
  State state;
  Location where;  // of the barrier it waits at
  // what it brought to its warp, and what it takes away
  Collective collective;
  unsigned mask, source;
  uint64_t value, result;
  WarpWork work;
  void* data;
  // asynchronous copies, oldest first, and how many groups of them are closed
  std::vector<Copy> copies;
  int64_t groups;
};

struct Block {
  uint3 index;
  dim3 size, grid;
  std::vector<Thread> threads;
  std::vector<unsigned> live_lanes;  // of each warp
  unsigned live = 0, arrived = 0;
  int predicates = 0, predicates_of_last_barrier = 0;
  std::unique_ptr<Arena> dynamic;
  std::map<const void*, Arena> arrays;
  size_t most_shared = 0;
  const std::function<void()>* body = nullptr;
  Thread* current = nullptr;
  Context scheduler;
  std::exception_ptr thrown;
};

thread_local Block* running = nullptr;

std::string text(const uint3& i) {
  std::ostringstream out;
  out << '(' << i.x << ", " << i.y << ", " << i.z << ')';
  return out.str();
}

std::string describe(const Block& block, const Thread& thread, std::string_view what, Location where) {
  std::ostringstream out;
  out << what << ": block " << text(block.index) << ", thread " << text(thread.index) << ", " << where.file_name() << ':' << where.line()
      << " in " << where.function_name();
  return out.str();
}

unsigned number_of(const Thread& thread) { return static_cast<unsigned>(&thread - running->threads.data()); }

void give_way() { switch_context(&running->current->context, &running->scheduler); }

void open_block_barrier() {
  for (Thread& thread : running->threads)
    if (thread.state == State::at_block_barrier) thread.state = State::ready;
  running->predicates_of_last_barrier = running->predicates;
  running->arrived = 0;
  running->predicates = 0;
}

// Completes the collective of `mask` if all its lanes that still run have come. Results are dealt out at once: a lane may be well past
// here before another one runs.
bool complete_collective(Thread* lanes, unsigned mask, unsigned live) {
  const unsigned wanted = mask & live;
  for (unsigned l = 0; l < kWarpSize; ++l) {
    if (!(wanted >> l & 1)) continue;
    if (!(lanes[l].state == State::at_warp_barrier && lanes[l].mask == mask)) return false;
    if (lanes[l].collective == Collective::whole_warp && live != ~0u)
      throw Error(
          describe(*running, lanes[l], "an operation of the whole warp, of which lanes have returned or do not exist", lanes[l].where));
  }
  if (lanes[std::countr_zero(wanted)].collective == Collective::whole_warp) {
    void* data[kWarpSize];
    for (unsigned l = 0; l < kWarpSize; ++l) {
      data[l] = lanes[l].data;
      lanes[l].state = State::ready;
    }
    lanes[0].work(data);
    return true;
  }
  uint64_t ballot = 0;
  for (unsigned l = 0; l < kWarpSize; ++l)
    if (wanted >> l & 1) ballot |= uint64_t(lanes[l].value != 0) << l;
  for (unsigned l = 0; l < kWarpSize; ++l) {
    if (!(wanted >> l & 1)) continue;
    Thread& thread = lanes[l];
    if (thread.collective == Collective::shuffle && !(wanted >> thread.source & 1))
      throw Error(describe(*running, thread, "shuffle reads from lane " + std::to_string(thread.source) + ", which takes no part in it",
                           thread.where));
    thread.result = thread.collective == Collective::shuffle ? lanes[thread.source].value : ballot;
    thread.state = State::ready;
  }
  return true;
}

void leave() {
  Thread& thread = *running->current;
  thread.state = State::done;
  const unsigned number = number_of(thread), warp = number / kWarpSize;
  running->live_lanes[warp] &= ~(1u << number % kWarpSize);
  // Threads that have returned are no longer waited for.
  if (--running->live > 0 && running->arrived == running->live) open_block_barrier();
  Thread* lanes = &running->threads[warp * kWarpSize];
  for (unsigned l = 0; l < kWarpSize; ++l)
    if (running->live_lanes[warp] >> l & 1 && lanes[l].state == State::at_warp_barrier)
      complete_collective(lanes, lanes[l].mask, running->live_lanes[warp]);
}

void run_thread() {
  try {
    (*running->body)();
    leave();
  } catch (...) {
    running->thrown = std::current_exception();
  }
  give_way();
  std::abort();  // a finished fiber is never resumed
}

std::string stuck() {
  std::ostringstream out;
  out << "deadlock in block " << text(running->index) << ": not every thread that must arrive can.";
  unsigned listed = 0, waiting = 0;
  std::string last;
  for (const Thread& thread : running->threads) {
    if (thread.state == State::done) continue;
    ++waiting;
    std::ostringstream place;
    place << (thread.state == State::at_block_barrier ? "__syncthreads" : "a warp operation") << ", " << thread.where.file_name() << ':'
          << thread.where.line();
    if (thread.state == State::at_warp_barrier) place << ", mask 0x" << std::hex << thread.mask;
    if (place.str() == last || listed == 4) continue;
    last = place.str();
    ++listed;
    out << " Thread " << text(thread.index) << " waits at " << last << '.';
  }
  out << ' ' << waiting << " of " << running->threads.size()
      << " threads wait, the others have returned. Look for a barrier inside a branch, or a mask that names lanes which do not come.";
  return out.str();
}

void run_block(Block& block, const Stacks& stacks, std::mt19937_64& random) {
  const unsigned count = block.size.x * block.size.y * block.size.z;
  // Whole warps are kept; lanes that the block does not have are done from the start.
  block.threads.assign((count + kWarpSize - 1) / kWarpSize * kWarpSize, Thread{});
  block.live_lanes.assign(block.threads.size() / kWarpSize, 0);
  block.live = count;
  block.arrived = 0;
  block.predicates = 0;
  block.thrown = nullptr;
  block.arrays.clear();
  block.dynamic = std::make_unique<Arena>(block.dynamic->bytes());
  for (Thread& thread : block.threads) thread.state = State::done;
  std::vector<unsigned> sequence(count);
  std::iota(sequence.begin(), sequence.end(), 0u);
  for (unsigned t : sequence) {
    Thread& thread = block.threads[t];
    thread.index = {t % block.size.x, t / block.size.x % block.size.y, t / (block.size.x * block.size.y)};
    thread.state = State::ready;
    block.live_lanes[t / kWarpSize] |= 1u << t % kWarpSize;
    make_context(&thread.context, stacks.at(t), run_thread);
  }
  if (order() == Order::reverse) std::reverse(sequence.begin(), sequence.end());
  while (block.live > 0) {
    if (order() == Order::random) std::shuffle(sequence.begin(), sequence.end(), random);
    bool moved = false;
    for (unsigned t : sequence) {
      Thread& thread = block.threads[t];
      if (thread.state != State::ready) continue;
      moved = true;
      block.current = &thread;
      switch_context(&block.scheduler, &thread.context);
      if (block.thrown) std::rethrow_exception(block.thrown);
    }
    if (!moved) throw Error(stuck());
  }
  const auto check = [&](const Arena& arena) {
    if (!arena.intact()) throw Error("shared memory written out of bounds: block " + text(block.index));
  };
  check(*block.dynamic);
  size_t bytes = block.dynamic->bytes();
  for (const auto& [key, arena] : block.arrays) check(arena), bytes += arena.bytes();
  if (bytes > block.most_shared)
    throw Error("launch: expected at most " + std::to_string(block.most_shared) + " bytes of shared memory, got " + std::to_string(bytes));
}

Order requested_order() {
  const char* value = std::getenv("MFAC_KERNELS_SIMT_ORDER");
  const std::string_view name = value ? value : "forward";
  if (name == "forward") return Order::forward;
  if (name == "reverse") return Order::reverse;
  if (name == "random") return Order::random;
  throw Error("MFAC_KERNELS_SIMT_ORDER: expected forward, reverse or random, got " + std::string(name));
}

Order& current_order() {
  static Order current = requested_order();
  return current;
}

}  // namespace

Order order() { return current_order(); }
void set_order(Order order) { current_order() = order; }

void launch(dim3 grid, dim3 block_size, size_t dynamic_shared, size_t most_shared, const std::function<void()>& body) {
  const uint64_t threads = uint64_t(block_size.x) * block_size.y * block_size.z;
  if (threads == 0 || threads > kMaxThreads)
    throw Error("launch: expected 1 to " + std::to_string(kMaxThreads) + " threads in a block, got " + std::to_string(threads));
  if (grid.y > 65535 || grid.z > 65535) throw Error("launch: expected at most 65535 blocks in y and z");
  thread_local const Stacks stacks;
  Block block;
  block.size = block_size;
  block.grid = grid;
  block.body = &body;
  block.dynamic = std::make_unique<Arena>(dynamic_shared);
  block.most_shared = most_shared;

  const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
  std::mt19937_64 random(blocks);
  std::vector<uint64_t> sequence(blocks);
  std::iota(sequence.begin(), sequence.end(), uint64_t(0));
  if (order() == Order::reverse) std::reverse(sequence.begin(), sequence.end());
  if (order() == Order::random) std::shuffle(sequence.begin(), sequence.end(), random);

  struct Running {
    explicit Running(Block* block) { running = block; }
    ~Running() { running = nullptr; }
  } guard(&block);
  for (uint64_t b : sequence) {
    block.index = {unsigned(b % grid.x), unsigned(b / grid.x % grid.y), unsigned(b / (uint64_t(grid.x) * grid.y))};
    run_block(block, stacks, random);
  }
}

const uint3& thread_index() { return running->current->index; }
const uint3& block_index() { return running->index; }
const dim3& block_size() { return running->size; }
const dim3& grid_size() { return running->grid; }
unsigned lane() { return number_of(*running->current) % kWarpSize; }

void fail(const char* what, Location where) { throw Error(describe(*running, *running->current, what, where)); }

uint64_t meet_warp(Collective collective, unsigned mask, uint64_t value, unsigned source, Location where) {
  Thread& self = *running->current;
  const unsigned number = number_of(self), warp = number / kWarpSize;
  if (!(mask >> number % kWarpSize & 1)) fail("warp operation whose mask leaves out the lane that calls it", where);
  Thread* lanes = &running->threads[warp * kWarpSize];
  for (unsigned l = 0; l < kWarpSize; ++l) {
    const Thread& other = lanes[l];
    if (!(mask >> l & 1) || other.state != State::at_warp_barrier) continue;
    if (other.mask != mask) fail("warp operation that lanes reach with different masks", where);
    if (other.collective != collective || other.where.line() != where.line() || other.where.column() != where.column())
      fail("lanes of one mask wait at different warp operations", where);
  }
  self.collective = collective;
  self.mask = mask;
  self.value = value;
  self.source = source;
  self.where = where;
  self.state = State::at_warp_barrier;
  if (!complete_collective(lanes, mask, running->live_lanes[warp])) give_way();
  return self.result;
}

void meet_whole_warp(WarpWork work, void* data, Location where) {
  Thread& self = *running->current;
  self.work = work;
  self.data = data;
  meet_warp(Collective::whole_warp, ~0u, 0, 0, where);
}

void copy_async(void* to, const void* from, size_t bytes, size_t valid, Location where) {
  if (valid > bytes) fail("an asynchronous copy of more bytes than its size", where);
  if (reinterpret_cast<uintptr_t>(from) % bytes != 0) fail("an asynchronous copy from an address that is no multiple of its size", where);
  std::memset(to, 0xff, bytes);
  Thread& self = *running->current;
  self.copies.push_back({to, from, bytes, valid, self.groups});
}

void commit_copies() { ++running->current->groups; }

void wait_for_copies(int64_t pending) {
  Thread& self = *running->current;
  const auto first_left = std::ranges::find_if(self.copies, [&](const Copy& copy) { return copy.group >= self.groups - pending; });
  for (const Copy& copy : std::ranges::subrange(self.copies.begin(), first_left)) {
    std::memset(copy.to, 0, copy.bytes);
    if (copy.valid > 0) std::memcpy(copy.to, copy.from, copy.valid);
  }
  self.copies.erase(self.copies.begin(), first_left);
}

int meet_block(bool predicate, Location where) {
  Thread& self = *running->current;
  if (running->arrived > 0) {
    for (const Thread& other : running->threads)
      if (other.state == State::at_block_barrier) {
        if (other.where.line() != where.line()) fail("__syncthreads that threads reach at different lines", where);
        break;
      }
  }
  self.where = where;
  self.state = State::at_block_barrier;
  running->predicates += predicate;
  if (++running->arrived == running->live)
    open_block_barrier();
  else
    give_way();
  // The next barrier cannot open before this thread arrives there: the count is still that of this one.
  return running->predicates_of_last_barrier;
}

void* static_shared(const void* key, size_t bytes) { return running->arrays.try_emplace(key, bytes).first->second.data(); }

void* dynamic_shared(size_t* bytes) {
  *bytes = running->dynamic->bytes();
  return running->dynamic->data();
}

}  // namespace mfac_kernels::simt

// Fibers of the interpreter: a stack each, and a switch between them. Included by simt.cpp alone.
#pragma once
#include <sys/mman.h>

#include <new>

#include "common/simt/simt.h"

#if !defined(__x86_64__) && !defined(MFAC_KERNELS_SIMT_UCONTEXT)
#define MFAC_KERNELS_SIMT_UCONTEXT  // the portable switch; slower, as it saves the signal mask with a system call
#endif
#if defined(MFAC_KERNELS_SIMT_UCONTEXT)
#include <ucontext.h>
#endif

namespace mfac_kernels::simt {
namespace {

constexpr size_t kStackBytes = 64 << 10;

#if !defined(MFAC_KERNELS_SIMT_UCONTEXT)

using Context = void*;  // a stack pointer; what calls preserve is on the stack

extern "C" void mfac_kernels_simt_switch(Context* save, Context to);
asm(R"(
.text
.local mfac_kernels_simt_switch
.type mfac_kernels_simt_switch,@function
mfac_kernels_simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size mfac_kernels_simt_switch, .-mfac_kernels_simt_switch
)");

void switch_context(Context* save, Context* to) { mfac_kernels_simt_switch(save, *to); }

void make_context(Context* context, char* stack, void (*entry)()) {
  constexpr int kSavedRegisters = 6;
  // entry finds the stack as after a call: 16 bytes aligned, then a return address (which is never used).
  auto** top = reinterpret_cast<void**>(stack + kStackBytes) - 1;
  *top = nullptr;
  *--top = reinterpret_cast<void*>(entry);
  *context = top - kSavedRegisters;
}

#else

using Context = ucontext_t;

void switch_context(Context* save, Context* to) { swapcontext(save, to); }

void make_context(Context* context, char* stack, void (*entry)()) {
  getcontext(context);
  context->uc_stack.ss_sp = stack;
  context->uc_stack.ss_size = kStackBytes;
  context->uc_link = nullptr;
  makecontext(context, entry, 0);
}

#endif

// Memory is taken page by page as the stacks are used, once per OS thread.
class Stacks {
 public:
  Stacks() : memory_(mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)) {
    if (memory_ == MAP_FAILED) throw std::bad_alloc();
  }
  Stacks(const Stacks&) = delete;
  ~Stacks() { munmap(memory_, kBytes); }
  char* at(unsigned thread) const { return static_cast<char*>(memory_) + thread * kStackBytes; }

 private:
  static constexpr size_t kBytes = kMaxThreads * kStackBytes;
  void* memory_;
};

}  // namespace
}  // namespace mfac_kernels::simt

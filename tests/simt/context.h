// Switches between stacks without a system call, which makes one fiber per CUDA thread affordable.  Hand-written for
// x86-64 and AArch64, ucontext elsewhere.  AddressSanitizer is told of every switch.
#pragma once
#include <stddef.h>
#include <stdint.h>

#if defined(__SANITIZE_ADDRESS__)
#define SIMT_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define SIMT_ASAN 1
#endif
#endif
#if !defined(SIMT_ASAN)
#define SIMT_ASAN 0
#endif
#if SIMT_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if !defined(__x86_64__) && !defined(__aarch64__)
#define SIMT_UCONTEXT 1
#include <ucontext.h>
#else
#define SIMT_UCONTEXT 0
// Pushes the callee-saved registers, stores the stack pointer in *save, and continues where `load` was stored.
extern "C" void simt_switch(void** save, void* load);
#endif

namespace simt {

class Context {
 public:
  // The next switch to this context calls entry(), which never returns, at the top of the stack [low, low + bytes).
  void start(char* low, size_t bytes, void (*entry)()) {
    low_ = low;
    bytes_ = bytes;
#if SIMT_ASAN
    fake_stack_ = nullptr;
    __asan_unpoison_memory_region(low, bytes);  // an abandoned fiber leaves the red zones of its locals behind
#endif
#if SIMT_UCONTEXT
    getcontext(&context_);
    context_.uc_stack.ss_sp = low;
    context_.uc_stack.ss_size = bytes;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
#else
    void** top = reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(low) + bytes) & ~uintptr_t(15));
#if defined(__x86_64__)
    constexpr int kSlots = 8, kEntry = 6;  // r15 r14 r13 r12 rbx rbp, the entry, and no caller
#else
    constexpr int kSlots = 20, kEntry = 11;  // x19 .. x28, x29, x30 = the entry, d8 .. d15
#endif
    stack_pointer_ = top - kSlots;
    for (int i = 0; i < kSlots; ++i) top[i - kSlots] = nullptr;
    top[kEntry - kSlots] = reinterpret_cast<void*>(entry);
#endif
  }

  // Suspends *this and continues in `to`; returns when another context switches back.
  void switch_to(Context& to) {
#if SIMT_ASAN
    __sanitizer_start_switch_fiber(&fake_stack_, to.low_, to.bytes_);
    arriving_from() = this;
#endif
#if SIMT_UCONTEXT
    swapcontext(&context_, &to.context_);
#else
    simt_switch(&stack_pointer_, to.stack_pointer_);
#endif
    arrived();
  }

  // Call it first in an entry, and after every switch.
  void arrived() {
#if SIMT_ASAN
    const void* low;
    size_t bytes;
    __sanitizer_finish_switch_fiber(fake_stack_, &low, &bytes);
    if (!arriving_from()->low_) {  // the thread's own stack, whose place only the sanitizer knows
      arriving_from()->low_ = static_cast<char*>(const_cast<void*>(low));
      arriving_from()->bytes_ = bytes;
    }
#endif
  }

 private:
#if SIMT_ASAN
  static Context*& arriving_from() {
    static Context* from = nullptr;
    return from;
  }
  void* fake_stack_ = nullptr;
#endif
#if SIMT_UCONTEXT
  ucontext_t context_;
#else
  void* stack_pointer_ = nullptr;
#endif
  char* low_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace simt

// A stack of its own for every thread of a block, and the switch from one to another without a system call.
#pragma once

#include <cstddef>

#if !defined(__x86_64__) || defined(SFR_SIMT_PORTABLE)
#include <setjmp.h>
#define SIMT_SETJMP 1
#elif !defined(__SANITIZE_ADDRESS__)
#define SIMT_INLINE_SWITCH 1
#endif

namespace simt {

struct Fiber {
#ifdef SIMT_SETJMP
  jmp_buf state;
#else
  void* registers[3] = {};  // rsp, rbp and where to go on, while another fiber runs
#endif
  char* stack = nullptr;  // none: the stack of the thread that launched
  size_t bytes = 0;
  void* fake_stack = nullptr;  // AddressSanitizer's
};

#ifndef SIMT_SETJMP
// The compiler takes every register but these three for overwritten, so it keeps what it needs on the stack that is
// left. A jump and no return: the processor predicts returns from calls that it saw, and there was none here.
inline __attribute__((always_inline)) void switch_registers(void** from, void** to) {
  asm volatile(
      "leaq 1f(%%rip), %%rax\n\t"
      "movq %%rsp, (%0)\n\t"
      "movq %%rbp, 8(%0)\n\t"
      "movq %%rax, 16(%0)\n\t"
      "movq (%1), %%rsp\n\t"
      "movq 8(%1), %%rbp\n\t"
      "jmp *16(%1)\n"
      "1:"
      : "+D"(from), "+S"(to)
      :
      : "rax", "rbx", "rcx", "rdx", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "xmm0", "xmm1", "xmm2",
        "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15",
        "memory", "cc");
}
#endif

// Gives the fiber a stack if it has none; the next switch to it calls `entry`, which must not return. What the fiber
// did before is forgotten. `index` staggers the stacks so that they do not all want the same lines of the cache.
void prepare(Fiber& fiber, void (*entry)(), size_t index);

// Leaves `from`; comes back when somebody switches to it.
#ifdef SIMT_INLINE_SWITCH
inline void switch_fiber(Fiber& from, Fiber& to) {
  switch_registers(from.registers, to.registers);
}
#else
void switch_fiber(Fiber& from, Fiber& to);
#endif

}  // namespace simt

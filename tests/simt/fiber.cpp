#undef _FORTIFY_SOURCE  // its longjmp takes another stack for a mistake

#include "fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <new>

#ifdef SIMT_SETJMP
#include <ucontext.h>
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace simt {
namespace {

#ifdef __SANITIZE_ADDRESS__
constexpr size_t stack_bytes = 256 * 1024;  // frames are padded
Fiber* left;                                // the fiber that a switch is leaving

void leaving(Fiber& from, const Fiber& to) {
  left = &from;
  __sanitizer_start_switch_fiber(&from.fake_stack, to.stack, to.bytes);
}
// The launching thread's stack becomes known when it is left.
void arrived(const Fiber& self) {
  const void* stack;
  size_t bytes;
  __sanitizer_finish_switch_fiber(self.fake_stack, &stack, &bytes);
  left->stack = static_cast<char*>(const_cast<void*>(stack)), left->bytes = bytes;
}
void forget_frames(const Fiber& fiber) {
  __asan_unpoison_memory_region(fiber.stack, fiber.bytes);
}
#else
constexpr size_t stack_bytes = 64 * 1024;
[[maybe_unused]] void leaving(const Fiber&, const Fiber&) {}
void arrived(const Fiber&) {}
void forget_frames(const Fiber&) {}
#endif

// Above an unreadable page: an overflow is a crash and not a riddle.
char* new_stack() {
  const size_t page = size_t(sysconf(_SC_PAGESIZE));
  void* memory = mmap(nullptr, page + stack_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  mprotect(memory, page, PROT_NONE);
  return static_cast<char*>(memory) + page;
}

// Lines of 64 bytes, 3 apart: 32 lanes at the same depth lie in different sets of a cache.
char* start_of_stack(const Fiber& fiber, size_t index) {
  return fiber.stack + fiber.bytes - (index % 64) * 192;
}

void (*main_of_fiber)();

#ifdef SIMT_SETJMP
Fiber* starting;
ucontext_t starter;

void first_entry() {
  Fiber& self = *starting;
  if (_setjmp(self.state) == 0) setcontext(&starter);
  arrived(self);
  main_of_fiber();
}

void start_at(Fiber& fiber, char* top) {
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = fiber.stack;
  context.uc_stack.ss_size = size_t(top - fiber.stack);
  context.uc_link = nullptr;
  makecontext(&context, first_entry, 0);
  starting = &fiber;
  swapcontext(&starter, &context);
}
#else
void first_entry() {
  arrived(Fiber());
  main_of_fiber();
}

void start_at(Fiber& fiber, char* top) {
  fiber.registers[0] = top - 8;  // as a call leaves it
  fiber.registers[1] = nullptr;
  fiber.registers[2] = reinterpret_cast<void*>(first_entry);
}
#endif

}  // namespace

void prepare(Fiber& fiber, void (*entry)(), size_t index) {
  if (!fiber.stack) fiber.stack = new_stack(), fiber.bytes = stack_bytes;
  forget_frames(fiber);
  main_of_fiber = entry;
  start_at(fiber, start_of_stack(fiber, index));
}

#ifndef SIMT_INLINE_SWITCH
void switch_fiber(Fiber& from, Fiber& to) {
  leaving(from, to);
#ifdef SIMT_SETJMP
  if (_setjmp(from.state) == 0) _longjmp(to.state, 1);
#else
  switch_registers(from.registers, to.registers);
#endif
  arrived(from);
}
#endif

}  // namespace simt

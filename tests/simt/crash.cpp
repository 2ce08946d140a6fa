#include "crash.h"

#include <ucontext.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>

#include "scheduler.h"
#include "symbols.h"

namespace simt {

#if defined(__x86_64__) && !defined(__SANITIZE_ADDRESS__)

namespace {

const int alarm_signal = SIGRTMIN + 5;

struct sigaction before;
int cause;
uintptr_t address, code;

// On the stack of the thread that was interrupted.
void leave() {
  const std::string line = " (" + line_of(reinterpret_cast<const void*>(code + 1)) + ")";
  if (cause == alarm_signal) fail("was running when the launch had taken too long" + line);
  if (uintptr_t(running->fiber.stack) - address < 4096) fail("has no stack left" + line);
  char where[32];
  std::snprintf(where, sizeof(where), "%#zx", size_t(address));
  fail("reads or writes memory at " + std::string(where) + ", which is not there" + line);
}

// Runs on a stack of its own and is gone at once: the thread goes on in leave(), at the start of its stack, since a
// full one may be the reason.
void caught(int signal, siginfo_t* info, void* context) {
  if (!running) {
    // Not ours: it happens again. The alarm comes again too.
    if (signal != alarm_signal) sigaction(SIGSEGV, &before, nullptr);
    return;
  }
  auto& registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  cause = signal, address = uintptr_t(info->si_addr), code = uintptr_t(registers[REG_RIP]);
  registers[REG_RIP] = greg_t(uintptr_t(leave));
  registers[REG_RSP] = greg_t(uintptr_t(running->fiber.stack) + running->fiber.bytes - 8);
}

}  // namespace

CrashGuard::CrashGuard() {
  static thread_local char memory[64 * 1024];
  stack_t stack = {};
  sigaltstack(nullptr, &stack);
  if (stack.ss_flags & SS_DISABLE) {
    stack.ss_sp = memory, stack.ss_size = sizeof(memory), stack.ss_flags = 0;
    sigaltstack(&stack, nullptr);
  }
  struct sigaction action = {};
  action.sa_sigaction = caught;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_RESTART;
  sigaction(SIGSEGV, &action, &segv_);
  sigaction(SIGBUS, &action, &bus_);
  sigaction(alarm_signal, &action, &alarm_);
  before = segv_;

  const char* text = std::getenv("SFR_SIMT_SECONDS");
  sigevent event = {};
  event.sigev_notify = SIGEV_THREAD_ID;
  event.sigev_signo = alarm_signal;
  event._sigev_un._tid = gettid();
  timer_create(CLOCK_THREAD_CPUTIME_ID, &event, &timer_);
  itimerspec when = {};
  when.it_value.tv_sec = text && *text ? std::atoi(text) : 300;
  when.it_interval.tv_sec = 1;
  timer_settime(timer_, 0, &when, nullptr);
}

CrashGuard::~CrashGuard() {
  timer_delete(timer_);
  sigaction(SIGSEGV, &segv_, nullptr);
  sigaction(SIGBUS, &bus_, nullptr);
  sigaction(alarm_signal, &alarm_, nullptr);
}

#else

CrashGuard::CrashGuard() {}
CrashGuard::~CrashGuard() {}

#endif

}  // namespace simt

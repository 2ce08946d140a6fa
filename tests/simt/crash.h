// A kernel that touches memory that is not there, or that does not end: an error like any other, instead of the end of
// the process, or of nothing.
#pragma once

#include <signal.h>
#include <time.h>

namespace simt {

// While it lives, a segmentation fault within a thread of a launch ends the launch, and so do SFR_SIMT_SECONDS (300) of
// processor time. Only on x86-64; AddressSanitizer has its own way.
class CrashGuard {
 public:
  CrashGuard();
  ~CrashGuard();
  CrashGuard(const CrashGuard&) = delete;
  CrashGuard& operator=(const CrashGuard&) = delete;

 private:
  struct sigaction segv_, bus_, alarm_;
  timer_t timer_;
};

}  // namespace simt

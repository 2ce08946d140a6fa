#include "threads.h"

#include <sched.h>
#include <time.h>

#include <cstdio>
#include <cstdlib>
#include <thread>

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <climits>
#endif

namespace sfr::cpu::SFR_ISA {
namespace {

Nanoseconds read(clockid_t clock) {
  timespec time;
  clock_gettime(clock, &time);
  return Nanoseconds(time.tv_sec) * 1000000000 + time.tv_nsec;
}

// How many processors' worth of time the control group may use, rounded up.
int64_t quota() {
  constexpr int64_t all = INT32_MAX;
  double limit = -1, period = 1;
  if (FILE* file = std::fopen("/sys/fs/cgroup/cpu.max", "r")) {
    if (std::fscanf(file, "%lf %lf", &limit, &period) != 2) limit = -1;  // "max": none
    std::fclose(file);
  } else if (FILE* file = std::fopen("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "r")) {
    if (std::fscanf(file, "%lf", &limit) != 1) limit = -1;
    std::fclose(file);
    period = 1e5;
    if (FILE* file = std::fopen("/sys/fs/cgroup/cpu/cpu.cfs_period_us", "r")) {
      if (std::fscanf(file, "%lf", &period) != 1) limit = -1;
      std::fclose(file);
    }
  }
  if (!(limit > 0 && period > 0)) return all;
  const double processors = __builtin_ceil(limit / period);
  return processors < double(all) ? int64_t(processors) : all;
}

// SFR_EXT_PROCESSORS counts instead, where it is set.
int64_t processors() {
  static const int64_t told = std::getenv("SFR_EXT_PROCESSORS") ? std::atoi(std::getenv("SFR_EXT_PROCESSORS")) : 0;
  if (told > 0) return told;
  static const int64_t most = quota();
  int64_t count = 0;
#if defined(__linux__)
  cpu_set_t mine;
  if (sched_getaffinity(0, sizeof mine, &mine) == 0) count = CPU_COUNT(&mine);
#endif
  if (count <= 0) count = int64_t(std::thread::hardware_concurrency());
  if (count <= 0) return most;  // unknown
  return count < most ? count : most;
}

// How often in a row waiting was in vain, how long it was the last time, and until when that counts. Relaxed: that a
// call in another thread misses a change costs little.
std::atomic<int> in_vain{0};
std::atomic<Nanoseconds> last_wait{0}, wary_until{0};

}  // namespace

Nanoseconds now() {
  return read(CLOCK_MONOTONIC);
}

Nanoseconds spent_by_this_thread() {
  return read(CLOCK_THREAD_CPUTIME_ID);
}

int64_t threads_to_use(int64_t wanted, double nanoseconds) {
  if (wanted <= 1) return 1;
  const Nanoseconds until = wary_until.load(std::memory_order_relaxed);
  if (until > 0 && nanoseconds < 8.0 * double(last_wait.load(std::memory_order_relaxed)) && now() < until) return 1;
  const int64_t most = processors();
  return wanted < most ? wanted : most;
}

void judge(Nanoseconds waited, Nanoseconds gained) {
  constexpr Nanoseconds unavoidable = 100000, longest = 1000000000;
  constexpr int most = 5;
  const int times = in_vain.load(std::memory_order_relaxed);
  if (waited <= gained + unavoidable) {
    if (times > 0) in_vain.store(times - 1, std::memory_order_relaxed);
    return;
  }
  // Until the loss is small beside what came after: 4 times the wait, then 16 times, ...
  const Nanoseconds wary = waited << (2 * (times + 1));
  if (times < most) in_vain.store(times + 1, std::memory_order_relaxed);
  last_wait.store(waited, std::memory_order_relaxed);
  wary_until.store(now() + (wary < longest ? wary : longest), std::memory_order_relaxed);
}

void Bell::wake() {
  asleep_.store(0, std::memory_order_relaxed);
  rings_.fetch_add(1, std::memory_order_release);
#if defined(__linux__)
  syscall(SYS_futex, &rings_, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
#endif
}

void Bell::sleep(uint32_t heard) {
#if defined(__linux__)
  syscall(SYS_futex, &rings_, FUTEX_WAIT_PRIVATE, heard, nullptr, nullptr, 0);
#else
  (void)heard;
  sched_yield();
#endif
}

}  // namespace sfr::cpu::SFR_ISA

// Which threads are worth waking, and how they wait for each other, on a machine that others use as well.
#pragma once

#include <atomic>
#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace sfr::cpu::SFR_ISA {

using Nanoseconds = int64_t;

Nanoseconds now();
Nanoseconds spent_by_this_thread();  // on a processor

// Threads to work with out of `wanted`, on what takes one of them `nanoseconds`: no more than there are processors for
// this process; and one alone where that is not long beside what was waited in vain a while ago (judge()).
int64_t threads_to_use(int64_t wanted, double nanoseconds);

// After a call with several threads: how long the one that called waited for the others, and how long they worked.
void judge(Nanoseconds waited, Nanoseconds gained);

// Until ready() or for some tens of microseconds, with the core held. Says whether it is.
template <class Ready>
bool spin(Ready&& ready) {
  for (int spins = 0; spins < 4096; ++spins) {
    if (ready()) return true;
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    __asm__ volatile("isb");  // takes about as long; yield takes no time on most processors
#endif
  }
  return ready();
}

// Where threads sleep until something has changed.
class Bell {
 public:
  // Whoever made the change rings.
  void ring() {
    std::atomic_thread_fence(std::memory_order_seq_cst);
    if (asleep_.load(std::memory_order_relaxed)) wake();
  }

  // Until ready(), asleep for most of a long wait. Returns how long it slept.
  template <class Ready>
  Nanoseconds wait(Ready&& ready) {
    if (spin(ready)) return 0;
    const Nanoseconds start = now();
    for (;;) {
      // In this order: who takes the mark away rings after that, and is not heard yet.
      const uint32_t heard = rings_.load(std::memory_order_acquire);
      asleep_.store(1, std::memory_order_relaxed);
      std::atomic_thread_fence(std::memory_order_seq_cst);
      if (ready()) return now() - start;
      sleep(heard);
    }
  }

 private:
  void wake();
  void sleep(uint32_t heard);

  std::atomic<uint32_t> rings_{0}, asleep_{0};
};

}  // namespace sfr::cpu::SFR_ISA

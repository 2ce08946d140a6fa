// One thread makes changes and rings after each, another sleeps until the last of them; for tests/test_bell.py, which
// puts calls of delay() between the steps of the one that falls asleep.
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>

#include "threads.h"

void delay() {
  static thread_local unsigned state = 1;
  state = state * 1103515245u + 12345u;
  if ((state >> 16) % 4 == 0) usleep((state >> 18) % 30);
}

int main() {
  constexpr int rounds = 20, changes = 200;
  for (int round = 0; round < rounds; ++round) {
    sfr::cpu::SFR_ISA::Bell bell;
    std::atomic<int> changed{0};
    std::atomic<bool> awake{false};
    std::thread sleeper([&] {
      bell.wait([&] { return changed.load(std::memory_order_acquire) == changes; });
      awake = true;
    });
    for (int i = 0; i < changes; ++i) {
      usleep(unsigned(i * 7919 + round * 31) % 60);
      changed.fetch_add(1, std::memory_order_release);
      bell.ring();
    }
    for (int i = 0; i < 1000 && !awake; ++i) usleep(10000);
    if (!awake) {
      std::fprintf(stderr, "round %d: still asleep ten seconds after the last ring\n", round);
      std::_Exit(1);
    }
    sleeper.join();
  }
}

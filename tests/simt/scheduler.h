// Which thread runs next. One warp runs until all its lanes wait for other warps or have exited, then the next warp; a
// lane runs until it meets the other lanes of its warp. This greedy order, permuted by a seed, makes a missing barrier
// show: the warps are as far apart as the barriers that are there let them be.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "fiber.h"
#include "include/simt.h"
#include "shared_memory.h"

namespace simt {

constexpr int lanes_per_warp = 32, most_threads = 1024;

// A point that all lanes of a warp must reach together.
struct Meeting {
  enum Kind { shuffle, shuffle_xor, matrix, warp, block, named };
  Kind kind = warp;
  int id = 0, count = 0;  // of a barrier
  Site site = {nullptr, 0};
  const void* caller = nullptr;  // knows more than the site: into what it was inlined
};

struct Warp;
struct Block;

// On its way to shared memory.
struct Copy {
  void* to;
  unsigned char bits[16];
  int bytes;
};

// What a switch looks at lies in one line of the cache.
struct alignas(64) Thread {
  uint3 index = {0, 0, 0};
  int lane = 0;
  Warp* warp = nullptr;
  Fiber fiber;
  bool ready = false;  // the fiber waits for a block to run
  // While it waits in arrive_and_wait.
  const unsigned* counter = nullptr;
  unsigned target = 0;
  const void* caller = nullptr;
  std::vector<Copy> copies;
};

// What a lane gives to a matrix instruction.
struct Fragments {
  uint32_t a[4], b[2];
};

struct Warp {
  Block* block = nullptr;
  int number = 0;  // within the block
  Thread* threads = nullptr;
  uint32_t all = 0;       // lanes that there are
  uint32_t runnable = 0;  // lanes that can run
  uint32_t waiting = 0;   // lanes that have come to `meeting`
  uint32_t exited = 0;
  unsigned round = 0;              // meetings so far
  unsigned first = 0, stride = 1;  // lanes run in the order first, first + stride, ... modulo 32
  Meeting meeting;
  uint64_t handed[2][lanes_per_warp] = {};  // by shuffles of even and odd rounds
  Fragments fragments[2][lanes_per_warp] = {};
};

struct Barrier {
  int arrived = 0;     // threads
  uint32_t warps = 0;  // that wait here
  Meeting meeting;     // of the first
};

struct Block {
  uint3 index = {0, 0, 0};
  int place = 0;  // among the blocks that run at the same time
  SharedMemory shared;
  Thread threads[most_threads];
  int size = 0, live = 0;  // threads; those that have not exited
  std::vector<Warp> warps;
  std::vector<int> order;         // of the warps
  std::vector<Thread*> counting;  // threads in arrive_and_wait
  Barrier barriers[16];           // 0: of the whole block
};

struct Launch {
  dim3 grid, block;
  size_t shared = 0;
  bool together = false;  // all blocks at the same time
  const void* kernel = nullptr;
  void (*body)(const void*) = nullptr;
  const void* arguments = nullptr;
};

// Runs a launch to its end; returns what went wrong, or nothing. One launch at a time.
std::string run(const Launch& launch);

extern Thread* running;  // none: the host

// Ends the launch from within one of its threads; the message begins with that thread's name.
[[noreturn]] void fail(const std::string& what);

// Of exp2 and quotients: how far off, and whether what is below float's normal range is 0.
void approximate(int ulps, bool flush, unsigned seed);

// Below 0: every order is the natural one.
void set_seed(long long seed);

}  // namespace simt

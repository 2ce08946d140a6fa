#include "scheduler.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>

#include "counters.h"
#include "crash.h"
#include "messages.h"
#include "race.h"
#include "symbols.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace simt {

unsigned char* block_shared;
Thread* running;

namespace {

class Random {
 public:
  void seed(uint64_t seed) { state_ = (seed + 1) * 0x9e3779b97f4a7c15u; }
  uint64_t operator()() {
    state_ ^= state_ << 13, state_ ^= state_ >> 7, state_ ^= state_ << 17;
    return state_ >> 16;
  }

 private:
  uint64_t state_ = 1;
};

long long seed_from_environment() {
  const char* text = std::getenv("SFR_SIMT_SEED");
  if (!text || !*text) return 0;
  return text == std::string("natural") ? -1 : std::atoll(text);
}

long long seed = seed_from_environment();
Random random_bits;
std::vector<std::unique_ptr<Block>> blocks;  // kept from launch to launch, with the stacks of their threads
Fiber host;                                  // where the launch was made
const Launch* launch;
std::string failure;

// Orders.

void permute(std::vector<int>& order) {
  std::iota(order.begin(), order.end(), 0);
  if (seed < 0) return;
  for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random_bits() % i]);
}

void permute_lanes(Warp& warp) {
  if (seed < 0) return;
  const uint64_t bits = random_bits();
  warp.first = bits & 31, warp.stride = 1 | ((bits >> 5) & 31);
}

Thread* first_lane(const Warp& warp) {
  unsigned lane = warp.first;
  while (!(warp.runnable >> lane & 1)) lane = (lane + warp.stride) & 31;
  return warp.threads + lane;
}

Thread* next_lane(const Warp& warp, const Thread& after) {
  unsigned lane = unsigned(after.lane);
  do lane = (lane + warp.stride) & 31;
  while (!(warp.runnable >> lane & 1));
  return warp.threads + lane;
}

Thread* first_thread(const Block& block) {
  for (const int i : block.order)
    if (block.warps[size_t(i)].runnable) return first_lane(block.warps[size_t(i)]);
  return nullptr;
}

// Lets `next` run, or the host if there is none.
void give_way(Thread& self, Thread* next) {
  if (next == &self) return;
  if (!next) return switch_fiber(self.fiber, host);
  running = next, threadIdx = next->index;
  switch_fiber(self.fiber, next->fiber);
}

// `self` waits or has exited.
inline void stop(Thread& self) {
  Warp& warp = *self.warp;
  warp.runnable &= ~(1u << self.lane);
  give_way(self, warp.runnable ? next_lane(warp, self) : first_thread(*warp.block));
}

void release(Warp& warp) {
  warp.runnable = warp.all, warp.waiting = 0;
  ++warp.round;
  permute_lanes(warp);
}

void release(Block& block, Barrier& barrier) {
  race::warps_meet(block, barrier.warps);
  counters::meeting(barrier.meeting, __builtin_popcount(barrier.warps));
  for (size_t i = 0; i < block.warps.size(); ++i)
    if (barrier.warps >> i & 1) release(block.warps[i]);
  barrier = {};
  permute(block.order);
}

// Errors.

std::string name(const Block& block) {
  return function_name(launch->kernel) + ", block " + text(block.index, gridDim);
}

void fail_stuck(const Block& block, const char* what) {
  failure = name(block) + ": " + what + ": " + situation(block);
}

// Apart, so that the messages take no room on the stacks of the threads that meet without one.
#define SIMT_COLD __attribute__((noinline, cold))

[[noreturn]] SIMT_COLD void fail_here(const std::string& what) {
  Thread& self = *running;
  failure = name(*self.warp->block) + ": " + what;
  for (;;) give_way(self, nullptr);
}

// Meeting points.

[[noreturn]] SIMT_COLD void fail_apart(const Thread& self, const Meeting& meeting) {
  fail_here(text(self) + " comes to " + text(meeting) + " while lanes " + ranges(self.warp->waiting) +
            " of its warp are at " + text(self.warp->meeting));
}

[[noreturn]] SIMT_COLD void fail_at(const Barrier& barrier, int warp, const Meeting& meeting) {
  fail_here("warp " + std::to_string(warp) + " comes to " + text(meeting) + ", warps " + ranges(barrier.warps) +
            " wait for " + std::to_string(barrier.meeting.count) + " threads at " + text(barrier.meeting));
}

[[noreturn]] SIMT_COLD void fail_named(const Meeting& meeting) {
  fail("calls " + text(meeting) + "; barriers are numbered from 1 to 15 and take whole warps, " +
       std::to_string(running->warp->block->size) + " threads at most");
}

[[noreturn]] SIMT_COLD void fail_shuffle(int source, const void* caller) {
  fail("shuffles from lane " + std::to_string(source) + " (" + line_of(caller) + "), which its warp does not have");
}

bool same(Site a, Site b) {
  return a.line == b.line && (a.file == b.file || std::strcmp(a.file, b.file) == 0);
}

// All lanes of the warp have come to a barrier.
void arrive(Warp& warp) {
  Block& block = *warp.block;
  const Meeting& meeting = warp.meeting;
  Barrier& barrier = block.barriers[meeting.id];
  const int self = warp.number;
  if (barrier.arrived == 0) {
    barrier.meeting = meeting;
  } else if (meeting.count != barrier.meeting.count ||
             (meeting.kind == Meeting::block && !same(meeting.site, barrier.meeting.site))) {
    fail_at(barrier, self, meeting);
  }
  barrier.arrived += __builtin_popcount(warp.all), barrier.warps |= 1u << self;
  if (barrier.arrived > meeting.count) fail_at(barrier, self, meeting);
  if (barrier.arrived == meeting.count) release(block, barrier);
}

// Returns once the whole warp, or for a barrier all that take part in it, have come to the same point. Inlined into its
// callers, of which there are few: this is where the time goes.
template <Meeting::Kind kind>
inline __attribute__((always_inline)) void meet(int id, int count, Site site, const void* caller) {
  Thread& self = *running;
  Warp& warp = *self.warp;
  const Meeting& other = warp.meeting;
  if (warp.waiting == 0) {
    warp.meeting = {kind, id, count, site, caller};
  } else if (other.kind != kind || other.id != id || other.count != count ||
             (other.caller != caller && !same(other.site, site))) {
    fail_apart(self, {kind, id, count, site, caller});
  }
  warp.waiting |= 1u << self.lane;
  if (warp.waiting != warp.all) return stop(self);
  if (kind == Meeting::block || kind == Meeting::named) {
    warp.runnable = 0;
    arrive(warp);
    return give_way(self, first_thread(*warp.block));
  }
  if (kind == Meeting::warp) {
    race::warp_meets(warp);
    counters::meeting(warp.meeting, 1);
  }
  release(warp);
  give_way(self, first_lane(warp));
}

// Blocks.

void run_threads() {
  for (;;) {
    launch->body(launch->arguments);
    Thread& self = *running;
    if (!self.copies.empty()) fail("ends with copies on their way");
    self.warp->exited |= 1u << self.lane;
    --self.warp->block->live;
    stop(self);  // until the next block
  }
}

void start(Block& block, unsigned index, int place) {
  const dim3 &grid = launch->grid, &size = launch->block;
  block.index = {index % grid.x, index / grid.x % grid.y, index / grid.x / grid.y};
  block.place = place;
  block.size = block.live = int(size.x * size.y * size.z);
  block.shared.renew(launch->shared);
  const size_t warps = size_t(block.size + lanes_per_warp - 1) / lanes_per_warp;
  if (block.warps.size() != warps) block.warps = std::vector<Warp>(warps);
  block.order.resize(warps);
  permute(block.order);
  block.counting.clear();
  std::fill(std::begin(block.barriers), std::end(block.barriers), Barrier());
  for (size_t w = 0; w < warps; ++w) {
    Warp& warp = block.warps[w];
    const int lanes = std::min(lanes_per_warp, block.size - int(w) * lanes_per_warp);
    warp.block = &block, warp.number = int(w), warp.threads = block.threads + w * lanes_per_warp;
    warp.all = warp.runnable = uint32_t((uint64_t(1) << lanes) - 1);
    warp.waiting = warp.exited = 0, warp.round = 0;
    warp.first = 0, warp.stride = 1;
    permute_lanes(warp);
  }
  for (unsigned i = 0; i < unsigned(block.size); ++i) {
    Thread& thread = block.threads[i];
    thread.index = {i % size.x, i / size.x % size.y, i / size.x / size.y};
    thread.lane = int(i % lanes_per_warp), thread.warp = &block.warps[i / lanes_per_warp];
    if (!thread.ready) prepare(thread.fiber, run_threads, i);
    thread.ready = true;
    thread.copies.clear();
  }
  race::block_begins(block);
}

// Lets the block run until it has finished or cannot go on alone; false if it could not even start.
bool enter(Block& block) {
  for (size_t i = 0; i < block.counting.size();) {
    Thread& thread = *block.counting[i];
    if (int(*thread.counter - thread.target) < 0) {
      ++i;
    } else {
      thread.warp->runnable |= 1u << thread.lane;
      block.counting.erase(block.counting.begin() + long(i));
    }
  }
  Thread* first = first_thread(block);
  if (!first) return false;
  blockIdx = block.index, block_shared = block.shared.data();
  running = first, threadIdx = first->index;
  switch_fiber(host, first->fiber);
  running = nullptr;
  if (failure.empty() && block.live > 0 && block.counting.empty()) fail_stuck(block, "deadlock");
  if (failure.empty() && block.live == 0 && !block.shared.intact())
    failure =
        name(block) + ": a thread wrote outside of the shared memory, " + std::to_string(launch->shared) + " bytes";
  return true;
}

Block& block_at(size_t place) {
  while (blocks.size() <= place) blocks.push_back(std::make_unique<Block>());
  return *blocks[place];
}

void run_one_by_one(const std::vector<int>& order) {
  Block& block = block_at(0);
  for (const int index : order) {
    start(block, unsigned(index), 0);
    while (failure.empty() && block.live > 0)
      if (!enter(block)) fail_stuck(block, "deadlock");
    if (!failure.empty()) return;
  }
}

void run_together(std::vector<int>& order) {
  for (size_t i = 0; i < order.size(); ++i) start(block_at(i), unsigned(i), int(i));
  for (size_t finished = 0; finished < order.size();) {
    bool progress = false;
    for (const int i : order) {
      Block& block = *blocks[size_t(i)];
      if (block.live == 0 || !enter(block)) continue;
      if (!failure.empty()) return;
      progress = true;
      finished += block.live == 0;
    }
    if (!progress) {
      const auto stuck = std::find_if(order.begin(), order.end(), [](int i) { return blocks[size_t(i)]->live > 0; });
      return fail_stuck(*blocks[size_t(*stuck)], "deadlock of all blocks");
    }
    permute(order);
  }
}

}  // namespace

std::string run(const Launch& what) {
  launch = &what;
  const CrashGuard guard;
  failure.clear();
  blockDim = what.block, gridDim = what.grid;
  random_bits.seed(uint64_t(seed));
  std::vector<int> order(size_t(what.grid.x) * what.grid.y * what.grid.z);
  permute(order);
  race::launch_begins(what);
  what.together ? run_together(order) : run_one_by_one(order);
  counters::launch_ends();
  // Threads that were left in the middle of something start anew.
  if (!failure.empty())
    for (const auto& block : blocks)
      for (Thread& thread : block->threads) thread.ready = false;
  return failure;
}

void fail(const std::string& what) {
  fail_here(text(*running) + " " + what);
}

void set_seed(long long value) {
  seed = value;
}

// What simt.h declares.

#define SIMT_CALLER __builtin_return_address(0)

void sync_block(Site site) {
  meet<Meeting::block>(0, running->warp->block->size, site, SIMT_CALLER);
}

void sync_threads(int id, int count, Site site) {
  if (id < 1 || id > 15 || count < lanes_per_warp || count % lanes_per_warp != 0 || count > running->warp->block->size)
    fail_named({Meeting::named, id, count, site, SIMT_CALLER});
  meet<Meeting::named>(id, count, site, SIMT_CALLER);
}

void sync_warp(Site site) {
  meet<Meeting::warp>(0, 0, site, SIMT_CALLER);
}

template <Meeting::Kind kind>
inline __attribute__((always_inline)) uint64_t exchange(uint64_t bits, int source, Site site, const void* caller) {
  Thread& self = *running;
  Warp& warp = *self.warp;
  if (unsigned(source) >= unsigned(lanes_per_warp) || !(warp.all >> source & 1)) fail_shuffle(source, caller);
  uint64_t* handed = warp.handed[warp.round & 1];
  handed[self.lane] = bits;
  meet<kind>(0, 0, site, caller);
  return handed[source];
}

uint64_t exchange(uint64_t bits, int lane, Site site) {
  return exchange<Meeting::shuffle>(bits, lane, site, SIMT_CALLER);
}

uint64_t exchange_xor(uint64_t bits, int mask, Site site) {
  return exchange<Meeting::shuffle_xor>(bits, running->lane ^ mask, site, SIMT_CALLER);
}

namespace {

// The sum of the addends, each cut off at 24 bits below the largest, cut off to a float.
float cut_off_sum(const double* addends, int count) {
  double largest = 0, sum = 0;
  for (int k = 0; k < count; ++k) {
    if (!std::isfinite(addends[k])) return float(std::accumulate(addends, addends + count, 0.0));
    largest = std::max(largest, std::fabs(addends[k]));
  }
  if (largest == 0) return 0;
  const double unit = std::ldexp(1.0, std::ilogb(largest) - 24);
  for (int k = 0; k < count; ++k) sum += std::trunc(addends[k] / unit) * unit;
  const float rounded = float(sum);
  return std::fabs(double(rounded)) > std::fabs(sum) ? std::nextafter(rounded, 0.0f) : rounded;
}

}  // namespace

void multiply_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site site) {
  Thread& self = *running;
  Warp& warp = *self.warp;
  if (warp.all != ~0u) fail_shuffle(lanes_per_warp - 1, SIMT_CALLER);
  Fragments* given = warp.fragments[warp.round & 1];
  given[self.lane] = {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  meet<Meeting::matrix>(0, 0, site, SIMT_CALLER);
  const auto number = [](uint32_t bits) { return double(bit_cast<float>(bits & 0xffffe000u)); };
  const int pixel = self.lane / 4, channel = self.lane % 4;
  for (int k = 0; k < 4; ++k) {
    const int row = pixel + 8 * (k / 2), column = 2 * channel + k % 2;
    double addends[9];
    for (int c = 0; c < 8; ++c)
      addends[c] =
          number(given[row % 8 * 4 + c % 4].a[row / 8 + c / 4 * 2]) * number(given[column * 4 + c % 4].b[c / 4]);
    addends[8] = d[k];
    d[k] = cut_off_sum(addends, 9);
  }
}

void begin_copy(void* to, const void* bits, int bytes) {
  const SharedMemory& shared = running->warp->block->shared;
  const auto at = static_cast<unsigned char*>(to) - shared.data();
  if (at < 0 || at + bytes > long(shared.bytes()) || at % bytes != 0)
    fail("copies " + std::to_string(bytes) + " bytes to byte " + std::to_string(at) + " of shared memory, which has " +
         std::to_string(shared.bytes()));
  running->copies.push_back({to, {}, bytes});
  std::memcpy(running->copies.back().bits, bits, size_t(bytes));
}

void wait_copies() {
  Thread& self = *running;
  for (const Copy& copy : self.copies) {
    race::copied(self, copy.to, copy.bytes, SIMT_CALLER);
    std::memcpy(copy.to, copy.bits, size_t(copy.bytes));
  }
  self.copies.clear();
}

// Approximations.

namespace {

struct {
  int ulps = 0;
  bool flush = false;
  uint32_t seed = 0;
} approximation;

float flushed(float x) {
  return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x;
}

// Off by up to as many units in the last place as were asked for, always the same for the same arguments.
float off(float exact, uint32_t x, uint32_t y) {
  if (approximation.ulps == 0 || !std::isfinite(exact) || std::fabs(exact) < 0x1p-125f) return exact;
  uint64_t bits = (uint64_t(x) << 32 | y) ^ (uint64_t(approximation.seed) * 0x9e3779b97f4a7c15u);
  bits = (bits ^ bits >> 29) * 0xbf58476d1ce4e5b9u, bits = (bits ^ bits >> 32) * 0x94d049bb133111ebu;
  const int range = 2 * approximation.ulps + 1, ulps = int(bits >> 33) % range - approximation.ulps;
  return bit_cast<float>(bit_cast<uint32_t>(exact) + uint32_t(ulps));
}

}  // namespace

void approximate(int ulps, bool flush, unsigned seed) {
  approximation = {ulps, flush, seed};
}

float exp2_of(float x) {
  const float y = off(std::exp2(approximation.flush ? flushed(x) : x), bit_cast<uint32_t>(x), 0);
  return approximation.flush ? flushed(y) : y;
}

float quotient(float x, float y) {
  if (approximation.flush) {
    if (std::fabs(y) > 0x1p126f && std::isfinite(y)) return std::isinf(x) ? NAN : std::copysign(0.0f, x * y);
    x = flushed(x), y = flushed(y);
  }
  const float q = off(x / y, bit_cast<uint32_t>(x), bit_cast<uint32_t>(y));
  return approximation.flush ? flushed(q) : q;
}

float ratio(float x, float y) {
  return off(x / y, bit_cast<uint32_t>(x), bit_cast<uint32_t>(y));
}

float sqrt_of(float x) {
  return off(std::sqrt(x), bit_cast<uint32_t>(x), 1);
}

void arrive_and_wait(unsigned* counter, unsigned target) {
  Thread& self = *running;
  race::releases(self, counter);
  ++*counter;
  const bool must_wait = int(*counter - target) < 0;
  // Whoever comes last goes on at once, or after all the others.
  if (must_wait || (seed >= 0 && random_bits() % 2)) {
    self.counter = counter, self.target = target, self.caller = SIMT_CALLER;
    self.warp->block->counting.push_back(&self);
    if (must_wait) {
      stop(self);
    } else {
      self.warp->runnable &= ~(1u << self.lane);
      give_way(self, nullptr);
    }
  }
  race::acquires(self, counter);
}

}  // namespace simt

// Small kernels, each sound or with one bug planted in it, launched as the real ones are.
#include <cstring>
#include <string>

#include "cuda/device.cuh"
#include "cuda/launch.h"

namespace planted {

using namespace sfr::cuda;

struct Params {
  const float* in;
  float* out;
  unsigned* counter;
};

SFR_DEVICE float* shared_floats() {
  return reinterpret_cast<float*>(shared_memory());
}
SFR_DEVICE int thread() {
  return int(threadIdx.x);
}
SFR_DEVICE int threads() {
  return int(blockDim.x);
}
SFR_DEVICE int lane() {
  return thread() % warp_threads;
}

// A neighbour's value through shared memory.
template <bool broken>
__global__ void missing_barrier(Params p) {
  float* shared = shared_floats();
  shared[thread()] = p.in[thread()];
  if (!broken) sync_block();
  p.out[thread()] = shared[(thread() + 32) % threads()];
}

// The same over and over: a value must have been read before the next one takes its place.
template <bool broken>
__global__ void missing_second_barrier(Params p) {
  float* shared = shared_floats();
  float sum = 0;
  for (int i = 0; i < 4; ++i) {
    shared[thread()] = p.in[thread()] * float(i + 1);
    sync_block();
    sum += shared[(thread() + 40) % threads()];
    if (!broken) sync_block();
  }
  p.out[thread()] = sum;
}

template <bool broken>
__global__ void missing_warp_barrier(Params p) {
  float* shared = shared_floats();
  shared[thread()] = p.in[thread()];
  if (!broken) sync_warp();
  p.out[thread()] = shared[thread() ^ 1];
}

// A shuffle brings lanes together but says nothing about their memory.
template <bool broken>
__global__ void shuffle_for_a_barrier(Params p) {
  float* shared = shared_floats();
  shared[thread()] = p.in[thread()];
  if (broken) {
    p.out[thread()] = shuffle(p.in[thread()], 0);
  } else {
    sync_warp();
  }
  p.out[thread()] = shared[thread() ^ 1];
}

// Warps add to one sum: in turn, or in whatever order they come.
template <bool broken>
__global__ void sum_in_any_order(Params p) {
  float* shared = shared_floats();
  float sum = p.in[thread()];
  for (int mask = 16; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
  if (thread() == 0) shared[0] = 0;
  sync_block();
  for (int warp = 0; warp < threads() / 32; ++warp) {
    if (lane() == 0 && thread() / 32 == warp) shared[0] += sum;
    if (!broken) sync_block();
  }
  sync_block();
  p.out[thread()] = shared[0];
}

template <bool broken>
__global__ void index_behind_the_end(Params p) {
  float* shared = shared_floats();
  shared[thread() + (broken ? 1 : 0)] = p.in[thread()];
  sync_block();
  p.out[thread()] = shared[thread()];
}

template <bool broken>
__global__ void index_before_the_start(Params p) {
  float* shared = shared_floats();
  shared[thread() - (broken ? 1 : 0)] = p.in[thread()];
  sync_block();
  p.out[thread()] = shared[thread()];
}

// Half of the shared memory is never written.
template <bool broken>
__global__ void unwritten(Params p) {
  float* shared = shared_floats();
  shared[2 * thread()] = p.in[thread()];
  sync_block();
  p.out[thread()] = shared[2 * ((thread() + 32) % threads()) + (broken ? 1 : 0)];
}

template <bool broken>
__global__ void shuffle_under_divergence(Params p) {
  float sum = p.in[thread()];
  if (!broken || lane() < 16) sum += shuffle_xor(sum, 1);
  sync_block();
  p.out[thread()] = sum;
}

template <bool broken>
__global__ void shuffle_with_exited_lanes(Params p) {
  if (broken && lane() > 20) return;
  p.out[thread()] = shuffle_xor(p.in[thread()], 1);
}

template <bool broken>
__global__ void shuffle_from_nowhere(Params p) {
  p.out[thread()] = shuffle(p.in[thread()], broken ? 32 : 31);
}

template <bool broken>
__global__ void barrier_in_half_a_warp(Params p) {
  if (!broken || lane() < 16) sync_block();
  p.out[thread()] = p.in[thread()];
}

template <bool broken>
__global__ void two_barriers_for_one(Params p) {
  if (broken && thread() < 32) {
    sync_block();
  } else {
    sync_block();
  }
  p.out[thread()] = p.in[thread()];
}

template <bool broken>
__global__ void exited_thread(Params p) {
  if (broken && thread() == 37) return;
  sync_block();
  p.out[thread()] = p.in[thread()];
}

template <bool broken>
__global__ void named_barrier_with_two_counts(Params p) {
  sync_threads(3, broken && thread() < 32 ? 64 : threads());
  p.out[thread()] = p.in[thread()];
}

// Four warps at a barrier for two, then for three: the last one waits for ever.
template <bool broken>
__global__ void named_barrier_too_many(Params p) {
  sync_threads(1, broken ? 96 : 64);
  p.out[thread()] = p.in[thread()];
}

template <bool broken>
__global__ void named_barrier_half_a_warp(Params p) {
  if (!broken || lane() < 16) sync_threads(1, threads());
  p.out[thread()] = p.in[thread()];
}

template <bool broken>
__global__ void named_barrier_odd_count(Params p) {
  sync_threads(1, broken ? 33 : threads());
  p.out[thread()] = p.in[thread()];
}

template <bool broken>
__global__ void named_barrier_16(Params p) {
  sync_threads(broken ? 16 : 15, threads());
  p.out[thread()] = p.in[thread()];
}

// Pairs of warps exchange values; the barrier of the other pair orders nothing.
template <bool broken>
__global__ void named_barrier_of_others(Params p) {
  float* shared = shared_floats();
  const int pair = thread() / 64;
  shared[thread()] = p.in[thread()];
  sync_threads(1 + pair, 64);
  p.out[thread()] = shared[broken ? (thread() + 64) % threads() : thread() ^ 32];
}

// Every block writes, all meet, every block reads what another one wrote.
template <bool broken>
__global__ void blocks_that_do_not_wait(Params p) {
  const int blocks = int(gridDim.x), self = int(blockIdx.x);
  float* scratch = p.out + 2048;
  scratch[self * threads() + thread()] = p.in[thread()] + float(self);
  sync_block();
  if (!broken && thread() == 0) arrive_and_wait(p.counter, unsigned(blocks));
  sync_block();
  p.out[self * threads() + thread()] = scratch[(self + 1) % blocks * threads() + thread()];
}

// The thread that tells the other blocks must first know that its own block is ready.
template <bool broken>
__global__ void tells_too_early(Params p) {
  const int blocks = int(gridDim.x), self = int(blockIdx.x);
  float* scratch = p.out + 2048;
  scratch[self * threads() + thread()] = p.in[thread()] + float(self);
  if (!broken) sync_block();
  if (thread() == 0) arrive_and_wait(p.counter, unsigned(blocks));
  sync_block();
  p.out[self * threads() + thread()] = scratch[(self + 1) % blocks * threads() + thread()];
}

template <bool broken>
__global__ void waits_for_nobody(Params p) {
  if (thread() == 0) arrive_and_wait(p.counter, gridDim.x + (broken ? 1 : 0));
  sync_block();
  p.out[blockIdx.x * blockDim.x + threadIdx.x] = 1;
}

template <bool broken>
__global__ void two_blocks_one_place(Params p) {
  p.out[(broken ? 0 : int(blockIdx.x) * threads()) + thread()] = p.in[thread()] + float(blockIdx.x);
}

template <bool broken>
__global__ void misaligned(Params p) {
  const Word16 word = load16(p.in + 4 * thread() + (broken ? 1 : 0));
  p.out[thread()] = bits_float(word.part[0]);
}

template <bool broken>
__global__ void behind_the_end_of_a_tensor(Params p) {
  p.out[thread()] = p.in[thread() + (broken ? 4096 : 0)];
}

template <bool broken>
__global__ void behind_the_end_of_a_local_array(Params p) {
  float own[4];
  for (int i = 0; i < 4; ++i) own[i] = p.in[i];
  sync_block();
  const int last = int(p.in[0]) * 0 + (broken ? 4 : 3);
  p.out[thread()] = own[last];
}

template <bool broken>
__global__ void null_pointer(Params p) {
  p.out[thread()] = broken && thread() == 7 ? *static_cast<float*>(nullptr) : p.in[thread()];
}

SFR_DEVICE float deeper(const Params& p, int depth) {
  volatile float own[256];
  own[depth % 256] = p.in[depth % 256];
  return depth > 0 ? own[depth % 256] + deeper(p, depth - 1) : own[0];
}

template <bool broken>
__global__ void no_stack_left(Params p) {
  p.out[thread()] = deeper(p, broken ? 1000 : 10);
}

// Four words of each thread by copies, and a neighbour's read.
SFR_DEVICE void copy_words(const Params& p, float* to, int round) {
  copy_async<16>(to + 4 * thread(), p.in + 4 * (thread() + round));
}
SFR_DEVICE float neighbours(const float* from) {
  return from[4 * ((thread() + 40) % threads()) + 1];
}

template <bool broken>
__global__ void copy_without_wait(Params p) {
  copy_words(p, shared_floats(), 0);
  if (!broken) wait_copies();
  sync_block();
  p.out[thread()] = neighbours(shared_floats());
}

template <bool broken>
__global__ void wait_after_the_barrier(Params p) {
  copy_words(p, shared_floats(), 0);
  if (!broken) wait_copies();
  sync_block();
  if (broken) wait_copies();
  p.out[thread()] = neighbours(shared_floats());
}

template <bool broken>
__global__ void copy_without_barrier(Params p) {
  copy_async<4>(shared_floats() + thread(), p.in + thread(), thread() % 2 == 0);
  wait_copies();
  if (!broken) sync_block();
  p.out[thread()] = shared_floats()[(thread() + 40) % threads()];
}

// Two buffers: one is read while the other comes. What is read must not be asked for anew.
template <bool broken>
__global__ void copy_onto_what_is_read(Params p) {
  float* buffers[2] = {shared_floats(), shared_floats() + 4 * threads()};
  float sum = 0;
  copy_words(p, buffers[0], 0);
  for (int k = 0; k < 4; ++k) {
    wait_copies();
    sync_block();
    copy_words(p, buffers[broken ? k % 2 : (k + 1) % 2], k + 1);
    sum += neighbours(buffers[k % 2]);
  }
  wait_copies();
  p.out[thread()] = sum;
}

template <bool broken>
__global__ void copy_beyond_shared_memory(Params p) {
  copy_words(p, shared_floats() + (broken ? 4 : 0), 0);
  wait_copies();
  sync_block();
  p.out[thread()] = neighbours(shared_floats());
}

template <bool broken>
__global__ void never_ends(Params p) {
  volatile float* out = p.out;
  do out[thread()] = 1;
  while (broken && out[thread()] == 1);
}

// Sound: halves next to each other, written by neighbours.
template <bool>
__global__ void halves(Params p) {
  auto* shared = reinterpret_cast<uint16_t*>(shared_memory());
  shared[thread()] = float_to_half(p.in[thread()]);
  sync_block();
  p.out[thread()] = half_to_float(shared[(thread() + 1) % threads()]);
}

// Sound, and every kind of meeting point in it.
template <bool>
__global__ void everything(Params p) {
  float* shared = shared_floats();
  float x = p.in[thread()];
  for (int i = 0; i < 3; ++i) {
    x = 0.5f * x + shuffle(x, (lane() + i) % 32) + shuffle_xor(x, 1 << i);
    shared[thread()] = x;
    sync_warp();
    x += shared[thread() ^ 3];
    sync_threads(1 + thread() / 64, 64);
    x += shared[thread() ^ 32];
    sync_block();
    x += shared[(thread() + 64) % threads()];
    sync_block();
  }
  p.out[int(blockIdx.x) * threads() + thread()] = x;
}

// What costs time and changes no value that matters: for the counters.

// A square of 32 x 32 is written by columns; rows of 33 lie in different banks.
template <bool broken>
__global__ void bank_conflict(Params p) {
  float* shared = shared_floats();
  const int row = broken ? 32 : 33;
  for (int i = 0; i < 32; ++i) shared[thread() * row + i] = p.in[i * 32 + thread()];  // counted: column
  sync_warp();
  float sum = 0;
  for (int i = 0; i < 32; ++i) sum += shared[i * row + thread()];
  p.out[thread()] = sum;
}

// 16 bytes a lane, 16 apart or 48.
template <bool broken>
__global__ void wide_conflict(Params p) {
  Word16* shared = reinterpret_cast<Word16*>(shared_memory());
  const Word16 word = load16(p.in + 4 * thread());
  shared[thread() * (broken ? 8 : 1)] = word;  // counted: wide
  p.out[thread()] = bits_float(word.part[0]);
}

template <bool broken>
__global__ void uncoalesced_load(Params p) {
  p.out[thread()] = p.in[thread() * (broken ? 32 : 1)];  // counted: load
}

// Lanes take as many rounds as they are far from the first; or all the same.
template <bool broken>
__global__ void idle_lanes(Params p) {
  float sum = 0;
  for (int i = 0; i < (broken ? lane() + 1 : 32); ++i) sum += p.in[i * 32 + lane()];  // counted: round
  p.out[thread()] = sum;
}

struct Case {
  const char* name;
  Kernel<Params> sound, broken;
  Launch how;
};

#define PLANTED(name) #name, name<false>, name<true>

// Blocks, threads, bytes of shared memory, whether the blocks wait for each other.
const Case cases[] = {
    {PLANTED(missing_barrier), {1, 128, 512, false, nullptr}},
    {PLANTED(missing_second_barrier), {1, 128, 512, false, nullptr}},
    {PLANTED(missing_warp_barrier), {1, 64, 256, false, nullptr}},
    {PLANTED(shuffle_for_a_barrier), {1, 64, 256, false, nullptr}},
    {PLANTED(sum_in_any_order), {1, 256, 16, false, nullptr}},
    {PLANTED(index_behind_the_end), {1, 64, 256, false, nullptr}},
    {PLANTED(index_before_the_start), {1, 64, 256, false, nullptr}},
    {PLANTED(unwritten), {1, 64, 512, false, nullptr}},
    {PLANTED(shuffle_under_divergence), {1, 64, 0, false, nullptr}},
    {PLANTED(shuffle_with_exited_lanes), {1, 64, 0, false, nullptr}},
    {PLANTED(shuffle_from_nowhere), {1, 32, 0, false, nullptr}},
    {PLANTED(barrier_in_half_a_warp), {1, 64, 0, false, nullptr}},
    {PLANTED(two_barriers_for_one), {1, 64, 0, false, nullptr}},
    {PLANTED(exited_thread), {1, 64, 0, false, nullptr}},
    {PLANTED(named_barrier_with_two_counts), {1, 128, 0, false, nullptr}},
    {PLANTED(named_barrier_too_many), {1, 128, 0, false, nullptr}},
    {PLANTED(named_barrier_half_a_warp), {1, 64, 0, false, nullptr}},
    {PLANTED(named_barrier_odd_count), {1, 64, 0, false, nullptr}},
    {PLANTED(named_barrier_16), {1, 64, 0, false, nullptr}},
    {PLANTED(named_barrier_of_others), {1, 128, 512, false, nullptr}},
    {PLANTED(blocks_that_do_not_wait), {6, 64, 0, true, nullptr}},
    {PLANTED(tells_too_early), {6, 64, 0, true, nullptr}},
    {PLANTED(waits_for_nobody), {4, 64, 0, true, nullptr}},
    {PLANTED(two_blocks_one_place), {3, 64, 0, false, nullptr}},
    {PLANTED(misaligned), {1, 32, 0, false, nullptr}},
    {PLANTED(behind_the_end_of_a_tensor), {1, 32, 0, false, nullptr}},
    {PLANTED(behind_the_end_of_a_local_array), {1, 64, 0, false, nullptr}},
    {PLANTED(null_pointer), {1, 64, 0, false, nullptr}},
    {PLANTED(no_stack_left), {1, 64, 0, false, nullptr}},
    {PLANTED(copy_without_wait), {1, 128, 2048, false, nullptr}},
    {PLANTED(wait_after_the_barrier), {1, 128, 2048, false, nullptr}},
    {PLANTED(copy_without_barrier), {1, 128, 512, false, nullptr}},
    {PLANTED(copy_onto_what_is_read), {1, 128, 4096, false, nullptr}},
    {PLANTED(copy_beyond_shared_memory), {1, 128, 2048, false, nullptr}},
    {PLANTED(never_ends), {1, 64, 0, false, nullptr}},
    {PLANTED(halves), {1, 64, 128, false, nullptr}},
    {PLANTED(everything), {3, 256, 1024, false, nullptr}},
    {PLANTED(bank_conflict), {1, 32, 33 * 32 * 4, false, nullptr}},
    {PLANTED(wide_conflict), {1, 32, 8 * 32 * 16, false, nullptr}},
    {PLANTED(uncoalesced_load), {1, 32, 0, false, nullptr}},
    {PLANTED(idle_lanes), {1, 32, 0, false, nullptr}},
};

}  // namespace planted

namespace {

// Calls f; returns what it threw, or nothing.
template <class F>
const char* error_of(F&& f) {
  static std::string text;
  try {
    f();
    return nullptr;
  } catch (const std::exception& error) {
    text = error.what();
    return text.c_str();
  }
}

}  // namespace

#define PLANTED_EXPORT extern "C" __attribute__((visibility("default")))

// The names in turn, then nothing.
PLANTED_EXPORT const char* planted_name(int i) {
  return i < int(std::size(planted::cases)) ? planted::cases[i].name : nullptr;
}

PLANTED_EXPORT const char* planted_run(int i, int broken, const float* in, float* out) {
  const planted::Case& of = planted::cases[i];
  unsigned counter = 0;
  return error_of([&] { launch(broken ? of.broken : of.sound, of.how, planted::Params{in, out, &counter}); });
}

// A kernel that would run if the device could run it.
PLANTED_EXPORT const char* planted_launch(int blocks, int threads, int shared, int together, int allowed) {
  static float out[16384];
  unsigned counter = 0;
  const auto kernel = shared ? planted::missing_barrier<false> : planted::waits_for_nobody<false>;
  return error_of([&] {
    if (allowed) sfr::cuda::allow_shared(kernel, 0);
    sfr::cuda::launch(kernel, {blocks, threads, size_t(shared), together != 0, nullptr},
                      planted::Params{out, out, &counter});
  });
}

PLANTED_EXPORT int planted_resident(int device, int threads, int shared) {
  const sfr::cuda::OnDevice on(device);
  return sfr::cuda::resident_blocks(planted::missing_barrier<false>, device, threads, size_t(shared));
}

PLANTED_EXPORT float planted_half_to_float(uint16_t half) {
  return sfr::cuda::half_to_float(half);
}
PLANTED_EXPORT uint16_t planted_float_to_half(float x) {
  return sfr::cuda::float_to_half(x);
}
PLANTED_EXPORT float planted_exp2(float x) {
  return sfr::cuda::exp2_of(x);
}
PLANTED_EXPORT float planted_quotient(float x, float y) {
  return sfr::cuda::quotient(x, y);
}
PLANTED_EXPORT float planted_ratio(float x, float y) {
  return sfr::cuda::ratio(x, y);
}
PLANTED_EXPORT float planted_root(float x) {
  return sfr::cuda::sqrt_of(x);
}

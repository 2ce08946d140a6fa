// One team, the memory it has, and the problem it is at.
//
// A kernel is a row of phases: weights, costs, solving, gradients. Each takes a TeamContext, finds its threads and
// memory anew, and leaves what the next one needs in that memory. Where the kernel knows which memory that is (Place),
// phases are inlined: addresses and parameters are then constants of the compiler, or nearly so. Elsewhere each is a
// function of its own, which is called, so that no phase's registers weigh on another's.
#pragma once

#include "layout.h"

// The 1 lets the compiler use all the registers that a block can have: otherwise it keeps half of them for a second
// block, and spills.
#define SFR_KERNEL __global__ void __launch_bounds__(most_warps* warp_threads, 1)

namespace sfr::cuda {

// Where a team works; what its phases are called with.
template <Place place>
struct TeamContext {
  const ProblemLayout& layout;
  const Operation& operation;
  unsigned char* scratch;
  int64_t teams;       // of the launch
  unsigned epoch = 0;  // of the team's blocks so far; every phase returns its own count

  // Number of this team in the launch.
  SFR_DEVICE int64_t team() const {
    const int blocks = in_one_block<place> ? 1 : layout.blocks;
    return int64_t(blockIdx.x) / blocks * layout.teams + int(threadIdx.x) / layout.threads;
  }
};

// Calls f(context, item) for every item of this team. What f leaves in the context, the next item finds there.
template <Place place, class Params, class F>
SFR_DEVICE void each_item(const KernelParams<Params>& p, F&& f) {
  TeamContext<place> context{p.layout, p.operation, p.scratch, p.teams};
#pragma unroll 1
  for (int64_t item = context.team(); item < p.items; item += p.teams) f(context, item);
}

template <auto phase>
struct Phase;
template <class Result, class... Args, Result (*phase)(Args...)>
struct Phase<phase> {
  static __device__ __noinline__ Result call(Args... args) { return phase(args...); }
};

// Runs a phase: as a part of its kernel where the kernel knows where everything lies, else as a function of its own.
template <Place place, auto phase, class... Args>
SFR_DEVICE auto run(Args&&... args) {
  if constexpr (in_one_block<place>)
    return phase(args...);
  else
    return Phase<phase>::call(args...);
}

// What reading the weights found out.
template <class T>
struct WeightSummary {
  T a_total, b_total, per_a, per_b;
  int kept_rows, kept_columns;
  bool light;     // some kept patch weighs next to nothing
  bool weighted;  // some weights are given
  bool sound;     // finite and non-negative; only the device sees them
};
static_assert(sizeof(WeightSummary<float>) <= summary_entries * sizeof(float));
static_assert(sizeof(WeightSummary<double>) <= summary_entries * sizeof(double));

template <class T, Place place>
struct Problem {
  const ProblemLayout& layout;
  Team team;  // all its threads
  ProblemMemory<T, place> at;
  int first, rows;  // the slab

  SFR_DEVICE explicit Problem(const TeamContext<place>& context) : layout(context.layout), at(locate(context)) {
    team.rank = int(threadIdx.x) % layout.threads;
    team.size = layout.threads;
    if constexpr (in_one_block<place>) {
      first = 0;
      rows = layout.N;
      return;
    }
    team.block = int(blockIdx.x) % layout.blocks;
    team.blocks = layout.blocks;
    team.counter = reinterpret_cast<unsigned*>(context.scratch + context.team() * counter_bytes);
    team.epoch = context.epoch;
    first = layout.slab * team.block;
    rows = layout.N - first < layout.slab ? layout.N - first : layout.slab;
  }

  static SFR_DEVICE ProblemMemory<T, place> locate(const TeamContext<place>& context) {
    const ProblemLayout& s = context.layout;
    const int64_t t = context.team(), blocks = in_one_block<place> ? 1 : s.blocks;
    const int64_t block = int64_t(blockIdx.x) % blocks;
    unsigned char* far = context.scratch + (blocks > 1 ? context.teams * counter_bytes : 0);
    unsigned char* near = far + context.teams * s.far_bytes + (t * blocks + block) * s.near_bytes;
    unsigned char* shared = shared_memory() + int(threadIdx.x) / s.threads * s.shared_bytes;
    return ProblemMemory<T, place>(s, context.operation, {shared, 0}, {near, 0}, {far + t * s.far_bytes, 0});
  }

  // Those who solve: the first of the team's threads, or all.
  SFR_DEVICE bool solves() const { return team.rank < layout.solvers; }
  SFR_DEVICE Team solvers() const {
    Team part = team;
    part.size = layout.solvers;
    part.barrier = layout.solvers == layout.threads ? whole_barrier : solvers_barrier;
    return part;
  }
  SFR_DEVICE ReductionBuffer<T> buffer() const { return {at.warps, at.blocks, layout.M}; }
  // The slab's costs.
  SFR_DEVICE T* cost() const { return layout.cost_near ? at.cost : at.far_cost + int64_t(first) * layout.ld; }
};

}  // namespace sfr::cuda

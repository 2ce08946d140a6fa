// One team, the memory it has, and the problem it is at.
//
// A kernel is a row of phases: weights, costs, solving, gradients. Each is a function of its own, which is called and
// not inlined: it takes a Site, finds its threads and memory anew, and leaves what the next one needs in that memory.
// So no phase's registers weigh on another's, and forward and backward share their code.
#pragma once

#include "shape.h"

#define SFR_PHASE __device__ __noinline__
// The 1 lets the compiler use all the registers that a block can have: otherwise it keeps half of them for a second
// block, and spills.
#define SFR_KERNEL __global__ void __launch_bounds__(most_warps* warp_threads, 1)

namespace sfr::cuda {

// Where a team works; what its phases are called with.
struct Site {
  const Shape& shape;
  const Task& task;
  unsigned char* scratch;
  int64_t teams;          // of the launch
  unsigned meetings = 0;  // of the team's blocks so far; every phase returns its own count

  // Number of this team in the launch.
  SFR_DEVICE int64_t team() const {
    return int64_t(blockIdx.x) / shape.blocks * shape.teams + int(threadIdx.x) / shape.threads;
  }
};

// What reading the weights found out.
template <class T>
struct Notes {
  T a_total, b_total;
  int kept_columns;
  bool weighted;  // some weights are given
  bool sound;     // finite and non-negative, and one of them above 0; only the device sees them
};

template <class T>
struct Problem {
  const Shape& shape;
  Team team;  // all its threads
  Places<T> at;
  int first, rows;  // the slab

  SFR_DEVICE explicit Problem(const Site& site) : shape(site.shape), at(locate(site)) {
    team.rank = int(threadIdx.x) % shape.threads;
    team.size = shape.threads;
    team.block = int(blockIdx.x) % shape.blocks;
    team.blocks = shape.blocks;
    team.counter = reinterpret_cast<unsigned*>(site.scratch + site.team() * 16);
    team.meetings = site.meetings;
    first = shape.slab * team.block;
    rows = shape.N - first < shape.slab ? shape.N - first : shape.slab;
  }

  static SFR_DEVICE Places<T> locate(const Site& site) {
    const Shape& s = site.shape;
    const int64_t t = site.team(), block = int64_t(blockIdx.x) % s.blocks;
    unsigned char* far = site.scratch + (s.blocks > 1 ? site.teams * 16 : 0);
    unsigned char* near = far + site.teams * s.far_bytes + (t * s.blocks + block) * s.near_bytes;
    unsigned char* shared = shared_memory() + int(threadIdx.x) / s.threads * s.shared_bytes;
    return Places<T>(s, site.task, {shared, 0}, {near, 0}, {far + t * s.far_bytes, 0});
  }

  // Those who solve: the first of the team's threads, or all.
  SFR_DEVICE bool solves() const { return team.rank < shape.solvers; }
  SFR_DEVICE Team solvers() const {
    Team part = team;
    part.size = shape.solvers;
    part.barrier = shape.solvers == shape.threads ? whole_barrier : solvers_barrier;
    return part;
  }
  SFR_DEVICE Board<T> board() const { return {at.warps, at.blocks, shape.M}; }
  // The slab's costs.
  SFR_DEVICE T* cost() const { return shape.cost_near ? at.cost : at.far_cost + int64_t(first) * shape.ld; }
};

}  // namespace sfr::cuda

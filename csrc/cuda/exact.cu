#include "../contracts/exact.h"

#include "scan.cuh"
// After what it is made of.
#include "../exact/problem.h"
#include "transport.cuh"

namespace sfr::cuda {
namespace {

// A problem is one warp's: a scan over a row ends with the lanes' meeting, however many lanes there are, and between
// two scans there is little to do.
//
// What it needs lies in shared memory as far as it fits: the vectors, then the costs beside them.
template <class T>
SFR_BOTH ExactWork<T> place(const ExactParams& p, Arena& vectors, Arena& costs) {
  ExactWork<T> work;
  work.reserve(vectors, p.N, p.M, p.M);
  work.cost = costs.take<T>(p.N * p.M);
  return work;
}

// The costs between kept patches. False: one is not finite.
template <class T>
SFR_DEVICE bool read_cost(const Lanes& lanes, const ExactForwardParams& p, int64_t item, ExactWork<T>& work) {
  const Masses &a = work.a, &b = work.b;
  work.ld = b.count;
  bool sound = true;
  with_element(p.cost.dtype, [&](auto element) {
    using E = decltype(element);
    if constexpr (sizeof(T) >= sizeof(E)) {
      const E* cost = first_of<E>(p.cost, item / p.G, item % p.G);
#pragma unroll 1
      for (int64_t i = 0; i < a.count; ++i) {
        const E* in = cost + a.index(i) * p.cost.stride_n;
#pragma unroll 4
        for (int64_t j = lanes.lane; j < b.count; j += warp_threads) {
          const T x = T(to_float(in[b.index(j) * p.cost.stride_m]));
          sound = sound && fabs(double(x)) <= largest_cost;
          work.cost[i * work.ld + j] = x;
        }
      }
    }
  });
  lanes.sync();  // mutant: the shuffles below are meetings too, but order no memory
  return over_lanes<Max>(sound ? 0.0f : 1.0f, warp_threads) == 0;
}

template <class T>
__global__ void __launch_bounds__(warp_threads)
    exact_forward_kernel(const __grid_constant__ Work<ExactForwardParams> p) {
  const Lanes lanes(int(threadIdx.x));
  const Shape& s = p.shape;
#pragma unroll 1
  for (int64_t item = blockIdx.x; item < p.items; item += p.teams) {
    Arena shared{shared_memory(), 0}, far{p.scratch + int64_t(blockIdx.x) * s.far_bytes, 0};
    ExactWork<T> work = place<T>(p, s.resident ? shared : far, s.cost_near ? shared : far);
    if (work.template read_weights<T>(lanes, p, item) && read_cost(lanes, p, item, work))
      write<T>(lanes, p, item, work, solve(lanes, work));
    else
      write_nan<T>(lanes, p, item);
  }
}

// d/da of one side, through the normalisation a = w / sum(w).
template <class T>
SFR_DEVICE void weight_gradient(Team& team, const Board<T>& board, const WeightView& view, int64_t b, int64_t g, int n,
                                const T* potential, T up, T* out) {
  if (!out) return;
  Side<T> side(view, b, g, n);
  int kept;
  side.read(team, board, kept);
  T along[1] = {};
#pragma unroll 1
  for (int i = team.rank; i < n; i += team.size)
    if (side.keeps(i)) along[0] += side.marginal(i) * potential[i];
  over_block<Sum>(team, board, along);
#pragma unroll 1
  for (int i = team.rank; i < n; i += team.size)
    out[i] = side.keeps(i) ? up * (potential[i] - along[0]) / (side.total * side.most) : T(0);
}

template <class T>
SFR_KERNEL exact_backward_kernel(const __grid_constant__ Work<ExactBackwardParams> p) {
  Team team;
  team.rank = int(threadIdx.x);
  team.size = p.shape.threads;
  const Board<T> board{reinterpret_cast<T*>(shared_memory()), nullptr, 0};
  const int64_t most = most_entries(p), pairs = p.N * p.M;
#pragma unroll 1
  for (int64_t item = blockIdx.x; item < p.items; item += p.teams) {
    const T up = static_cast<const T*>(p.grad_value)[item];
    if (p.grad_cost) {
      T* out = static_cast<T*>(p.grad_cost) + item * pairs;
      const T* mass = static_cast<const T*>(p.mass) + item * most;
      const T rest = mass[0] - mass[0];  // NaN where the problem is
#pragma unroll 4
      for (int64_t k = team.rank; k < pairs; k += team.size) out[k] = rest;
      team.sync();
#pragma unroll 1
      for (int64_t k = team.rank; k < most; k += team.size)
        if (mass[k] > 0) out[p.rows[item * most + k] * p.M + p.columns[item * most + k]] = up * mass[k];
    }
    const int64_t b = item / p.G, g = item % p.G;
    const T *f = static_cast<const T*>(p.f) + item * p.N, *h = static_cast<const T*>(p.g) + item * p.M;
    T* grad_a = p.grad_a ? static_cast<T*>(p.grad_a) + item * p.N : nullptr;
    T* grad_b = p.grad_b ? static_cast<T*>(p.grad_b) + item * p.M : nullptr;
    weight_gradient(team, board, p.a, b, g, int(p.N), f, up, grad_a);
    weight_gradient(team, board, p.b, b, g, int(p.M), h, up, grad_b);
  }
}

// Forced, `several` has everything in shared memory, `block` the costs in global memory, `stream` all of it.
template <class T>
Shape choose_exact(const ExactParams& p, Strategy forced, const DeviceLimits& device) {
  Shape s;
  s.N = int(p.N), s.M = int(p.M);
  Arena vectors, costs;
  place<T>(p, vectors, costs);
  for (const Strategy which : {Strategy::several, Strategy::block, Strategy::stream}) {
    if (forced != Strategy::automatic && forced != which) continue;
    s.resident = which != Strategy::stream;
    s.cost_near = which == Strategy::several;
    s.shared_bytes = int64_t((s.resident ? vectors.used : 0) + (s.cost_near ? costs.used : 0));
    s.far_bytes = int64_t(vectors.used + costs.used) - s.shared_bytes;
    if (s.shared_bytes <= int64_t(device.shared)) return s;
  }
  throw std::runtime_error("sfr_ext: " + std::to_string(p.N) + " x " + std::to_string(p.M) +
                           " patches do not fit on this GPU with the strategy that was asked for");
}

}  // namespace

template <class T>
int64_t exact_forward(const ExactForwardParams& p, const Where& where) {
  const OnDevice on(where.device);
  const Shape shape = choose_exact<T>(p, where.strategy, limits(where.device));
  return start<ExactForwardParams>(exact_forward_kernel<T>, p, {}, shape, p.B * p.G, where);
}

template <class T>
int64_t exact_backward(const ExactBackwardParams& p, const Where& where) {
  const OnDevice on(where.device);
  Shape shape;
  shape.threads = most_warps * warp_threads;
  shape.shared_bytes = board_entries * int64_t(sizeof(T));
  return start<ExactBackwardParams>(exact_backward_kernel<T>, p, {}, shape, p.B * p.G, where);
}

template int64_t exact_forward<SFR_REAL>(const ExactForwardParams&, const Where&);
template int64_t exact_backward<SFR_REAL>(const ExactBackwardParams&, const Where&);

}  // namespace sfr::cuda

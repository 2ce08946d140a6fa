#include "../contracts/sinkhorn.h"

#include "transport.cuh"

namespace sfr::cuda {
namespace {

// Costs of a problem as the solver wants them; a removed patch's are not looked at. The solver begins with a barrier.
template <class T>
SFR_PHASE void read_cost(Site site, const SinkhornParams& p, int64_t item) {
  const Problem<T> problem(site);
  const Team& team = problem.team;
  const Shape& s = site.shape;
  T* out = problem.cost();
  with_element(p.cost.dtype, [&](auto element) {
    using E = decltype(element);
    if constexpr (sizeof(T) >= sizeof(E)) {
      const E* cost = first_of<E>(p.cost, item / p.G, item % p.G);
#pragma unroll 1
      for (int i = team.warp(); i < problem.rows; i += team.warps())
#pragma unroll 4
        for (int j = team.lane(); j < s.M; j += warp_threads) {
          const bool kept = problem.at.row_weight[i] > 0 && problem.at.column_weight[j] > 0;
          const E* from = cost + (problem.first + i) * p.cost.stride_n + j * p.cost.stride_m;
          out[int64_t(i) * s.ld + j] = kept ? T(to_float(*from)) : T(0);
        }
    }
  });
}

template <class T>
SFR_KERNEL sinkhorn_forward_kernel(const __grid_constant__ Work<SinkhornForwardParams> p) {
  Site site{p.shape, p.task, p.scratch, p.teams};
#pragma unroll 1
  for (int64_t item = site.team(); item < p.items; item += p.teams) {
    site.meetings = read_weights<T>(site, p.solve, item / p.G, item % p.G, nullptr);
    read_cost<T>(site, p, item);
    site.meetings = transport_forward<T>(site, p.solve, item);
    Problem<T>(site).team.sync();
  }
}

// d/dC from the plan to where it is wanted.
template <class T>
SFR_PHASE void write_gradient(Site site, T* out, bool sound) {
  const Problem<T> problem(site);
  const Team& team = problem.team;
  const int M = site.shape.M, ld = site.shape.ld;
  out += int64_t(problem.first) * M;
#pragma unroll 1
  for (int i = team.warp(); i < problem.rows; i += team.warps())
#pragma unroll 4
    for (int j = team.lane(); j < M; j += warp_threads)
      out[int64_t(i) * M + j] = sound ? problem.at.P[int64_t(i) * ld + j] : T(NAN);
}

template <class T>
SFR_KERNEL sinkhorn_backward_kernel(const __grid_constant__ Work<SinkhornBackwardParams> p) {
  Site site{p.shape, p.task, p.scratch, p.teams};
#pragma unroll 1
  for (int64_t item = site.team(); item < p.items; item += p.teams) {
    site.meetings = read_weights<T>(site, p.solve, item / p.G, item % p.G, nullptr);
    read_cost<T>(site, p, item);
    site.meetings = transport_backward<T>(site, p.solve, item);
    Problem<T>(site).team.sync();
    if (p.grad_cost)
      write_gradient<T>(site, static_cast<T*>(p.grad_cost) + item * p.N * p.M, is_sound<T>(p.solve, item));
    Problem<T>(site).team.sync();
  }
}

Task task_of(const SinkhornParams& p) {
  Task task;
  task.N = p.N, task.M = p.M, task.G = p.G;
  return task;
}

}  // namespace

template <class T>
int64_t sinkhorn_forward(const SinkhornForwardParams& p, const Where& where) {
  return start_on<T>(sinkhorn_forward_kernel<T>, p, solving(task_of(p), p.solve), p.B * p.G, where);
}

template <class T>
int64_t sinkhorn_backward(const SinkhornBackwardParams& p, const Where& where) {
  return start_on<T>(sinkhorn_backward_kernel<T>, p, solving(task_of(p), p.solve), p.B * p.G, where);
}

template int64_t sinkhorn_forward<SFR_REAL>(const SinkhornForwardParams&, const Where&);
template int64_t sinkhorn_backward<SFR_REAL>(const SinkhornBackwardParams&, const Where&);

}  // namespace sfr::cuda

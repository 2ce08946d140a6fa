#include "../contracts/cost.h"

#include "ground.cuh"

namespace sfr::cuda {
namespace {

// A slab of rows is an item of its own, unless patches share pixels.
template <class T>
SFR_KERNEL cost_forward_kernel(const __grid_constant__ Work<CostForwardParams> p) {
  Site site{p.shape, p.task, p.scratch, p.teams};
  const Shape& s = p.shape;
  const int64_t slabs = (s.N + s.slab - 1) / s.slab;
#pragma unroll 1
  for (int64_t item = site.team(); item < p.items; item += p.teams) {
    const int64_t map = item / slabs;
    const int first = int(item % slabs) * s.slab, rows = s.N - first < s.slab ? s.N - first : s.slab;
    T* out = static_cast<T*>(p.cost) + (map * s.N + first) * s.M;
    site.meetings = ground_forward<T>(site, p, map / p.G, map % p.G, first, rows, out, s.M);
  }
}

// Cosine: sums over rows and columns of d/dC (1 - C).
template <class T>
SFR_DEVICE void cosine_sums(Ground<T>& ground, const T* grad, const T* cost) {
  const Team& team = ground.team;
  const int N = ground.shape.N, M = ground.shape.M;
  const auto term = [&](int i, int j) {
    const int64_t at = int64_t(i) * M + j;
    return grad[at] * (1 - cost[at]);
  };
#pragma unroll 1
  for (int i = team.warp(); i < N; i += team.warps()) {
    T sum = 0;
#pragma unroll 1
    for (int j = team.lane(); j < M; j += warp_threads) sum += term(i, j);
    sum = over_lanes<Sum>(sum, warp_threads);
    if (team.lane() == 0) ground.at.x_sums[i] = sum;
  }
#pragma unroll 1
  for (int j = team.rank; j < M; j += team.size) {
    T sum = 0;
#pragma unroll 1
    for (int i = 0; i < N; ++i) sum += term(i, j);
    ground.at.y_sums[j] = sum;
  }
}

template <class T>
SFR_PHASE unsigned feature_gradients(Site site, const CostBackwardParams& p, int64_t b, int64_t g) {
  Ground<T> ground(site, p, b, g);
  const Shape& s = site.shape;
  const int64_t at = (b * p.G + g) * s.N * s.M;
  const T *cost = static_cast<const T*>(p.cost) + at, *grad = static_cast<const T*>(p.grad_cost) + at;
  T* W = ground.cost();
  if (p.metric == Metric::cosine) {
    invert_norms(ground);
    cosine_sums(ground, grad, cost);
  }
  weigh(ground, 0, s.N, grad, s.M, cost, s.M, W, s.ld, false);
  ground.team.meet();
  ground_backward(ground, W, s.ld, p.grad_x, p.grad_y);
  return ground.team.meetings;
}

// A whole batch entry at a time: the gradient of x sums over its groups.
template <class T>
SFR_KERNEL cost_backward_kernel(const __grid_constant__ Work<CostBackwardParams> p) {
  Site site{p.shape, p.task, p.scratch, p.teams};
#pragma unroll 1
  for (int64_t b = site.team(); b < p.items; b += p.teams)
#pragma unroll 1
    for (int64_t g = 0; g < p.G; ++g) site.meetings = feature_gradients<T>(site, p, b, g);
}

}  // namespace

template <class T>
int64_t cost_forward(const CostForwardParams& p, const Where& where) {
  const OnDevice on(where.device);
  Task task = task_of(p);
  task.solved = false;
  const Shape shape = choose<T>(task, where.strategy, limits(where.device));
  return start<CostForwardParams>(cost_forward_kernel<T>, p, task, shape,
                                  p.B * p.G * ((shape.N + shape.slab - 1) / shape.slab), where);
}

template <class T>
int64_t cost_backward(const CostBackwardParams& p, const Where& where) {
  Task task = task_of(p);
  task.solved = false;
  task.backward = true;
  return start_on<T>(cost_backward_kernel<T>, p, task, p.B, where);
}

template int64_t cost_forward<SFR_REAL>(const CostForwardParams&, const Where&);
template int64_t cost_backward<SFR_REAL>(const CostBackwardParams&, const Where&);

}  // namespace sfr::cuda

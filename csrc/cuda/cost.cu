#include "../contracts/cost.h"

#include "ground.cuh"

namespace sfr::cuda {
namespace {

// A slab of rows is an item of its own, unless patches share pixels.
template <class T, Place place>
SFR_KERNEL cost_forward_kernel(const __grid_constant__ KernelParams<CostForwardParams> p) {
  const ProblemLayout& s = p.layout;
  each_item<place>(p, [&](TeamContext<place>& context, int64_t item) SFR_INLINED {
    const int slabs = (s.N + s.slab - 1) / s.slab;  // here, where it needs no register between items
    const int64_t map = item / slabs;
    const int first = int(item % slabs) * s.slab, rows = s.N - first < s.slab ? s.N - first : s.slab;
    T* out = static_cast<T*>(p.cost) + (map * s.N + first) * s.M;
    context.epoch = run<place, ground_forward<T, place>>(context, p, map / p.G, map % p.G, first, rows, out, s.M);
  });
}

// Hides pixels that are in no patch with a finite cost: as such a patch has weights that are 0 or NaN, its gradient is
// the same whatever they hold, and a weight of 0 times a NaN is not 0.
template <class T, Place place>
SFR_DEVICE void hide_broken(Ground<T, place>& ground, const T* cost) {
  Team& team = ground.team;
  const int N = ground.layout.N, M = ground.layout.M;
  bool hidden = false;
  const auto mark = [&](const FeatureView& view, int along, int others, int across, uint8_t* used) {
#pragma unroll 1
    for (int p = team.rank; p < int(view.H * view.W); p += team.size) {
      bool any = false;
      ground.each_cover(view, p, [&](int i) {
#pragma unroll 1
        for (int j = 0; j < others && !any; ++j) {
          const T c = cost[int64_t(i) * along + int64_t(j) * across];
          any = c - c == 0;
        }
      });
      used[p] = any;
      hidden = hidden || !any;
    }
  };
  mark(ground.params.x, M, M, 1, ground.at.x_used);
  mark(ground.params.y, 1, N, M, ground.at.y_used);
  Arena room = ground.at.pull_panels;  // before there are panels
  if (any_of(team, room.take<T>(most_warps), hidden))
    ground.x_used = ground.at.x_used, ground.y_used = ground.at.y_used;
}

// Cosine: sums over rows and columns of d/dC (1 - C).
template <class T, Place place>
SFR_DEVICE void cosine_sums(Ground<T, place>& ground, const T* grad, const T* cost) {
  const Team& team = ground.team;
  const int N = ground.layout.N, M = ground.layout.M;
  const auto term = [&](int i, int j) {
    const int64_t at = int64_t(i) * M + j;
    return grad[at] * alike_of(grad[at], cost[at]);
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

template <class T, Place place>
[[nodiscard]] SFR_DEVICE unsigned cost_gradients(TeamContext<place> context, const CostBackwardParams& p, int64_t b,
                                                 int64_t g) {
  Ground<T, place> ground(context, p, b, g);
  const ProblemLayout& s = context.layout;
  const int64_t at = (b * p.G + g) * s.N * s.M;
  const T *cost = static_cast<const T*>(p.cost) + at, *grad = static_cast<const T*>(p.grad_cost) + at;
  T* W = ground.cost();
  hide_broken(ground, cost);
  if (p.metric == Metric::cosine) {
    invert_norms(ground);
    cosine_sums(ground, grad, cost);
  }
  weigh<false>(ground, grad, s.M, cost, s.M, W, s.ld, false);
  ground.team.grid_barrier();
  ground_backward(ground, W, s.ld, p.grad_x, p.grad_y);
  return ground.team.epoch;
}

// A whole batch entry at a time: the gradient of x sums over its groups.
template <class T, Place place>
SFR_KERNEL cost_backward_kernel(const __grid_constant__ KernelParams<CostBackwardParams> p) {
  each_item<place>(p, [&](TeamContext<place>& context, int64_t b) SFR_INLINED {
#pragma unroll 1
    for (int64_t g = 0; g < p.G; ++g) context.epoch = run<place, cost_gradients<T, place>>(context, p, b, g);
  });
}

// Forward keeps no costs: they leave at once.
template <class T>
Kernel<KernelParams<CostForwardParams>> cost_forward_kernel_of() {
  if constexpr (sizeof(T) == 4)
    return cost_forward_kernel<T, Place::near>;
  else
    return cost_forward_kernel<T, Place::any>;
}

template <class T>
Kernels<CostBackwardParams> cost_backward_kernels() {
  if constexpr (sizeof(T) == 4) return {cost_backward_kernel<T, Place::any>, cost_backward_kernel<T, Place::near>};
  return {cost_backward_kernel<T, Place::any>, nullptr};
}

}  // namespace

template <class T>
int64_t cost_forward(const CostForwardParams& p, const Where& where) {
  const OnDevice on(where.device);
  Operation operation = operation_of(p);
  operation.solved = false;
  const auto kernel = cost_forward_kernel_of<T>();
  const ProblemLayout layout = choose<T>(operation, where.strategy, limits_of(kernel, where.device));
  return launch_items<CostForwardParams>(kernel, p, operation, layout,
                                         p.B * p.G * ((layout.N + layout.slab - 1) / layout.slab), where);
}

template <class T>
int64_t cost_backward(const CostBackwardParams& p, const Where& where) {
  Operation operation = operation_of(p);
  operation.solved = false;
  operation.backward = true;
  return lay_out_and_launch<T>(cost_backward_kernels<T>(), p, operation, p.B, where);
}

template int64_t cost_forward<SFR_REAL>(const CostForwardParams&, const Where&);
template int64_t cost_backward<SFR_REAL>(const CostBackwardParams&, const Where&);

}  // namespace sfr::cuda

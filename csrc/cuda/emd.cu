#include "../contracts/emd.h"

#include "ground.cuh"
#include "transport.cuh"

namespace sfr::cuda {
namespace {

// Copies the costs of the slab of an item, rows of so many in either place.
template <class T, Place place>
SFR_DEVICE void copy_costs(const Problem<T, place>& problem, const T* from, int from_row, T* to, int to_row) {
  map_entries(problem.team, problem.rows, problem.layout.M, from, from_row, to, to_row,
              [](int, int, T cost) { return cost; });
}

// Where those of an item are that are kept.
template <class T, Place place>
SFR_DEVICE int64_t kept_place(const Problem<T, place>& problem, int64_t item) {
  return (item * problem.layout.N + problem.first) * problem.layout.M;
}

template <class T, Place place>
[[nodiscard]] SFR_DEVICE unsigned keep_costs(TeamContext<place> context, void* kept, int64_t item) {
  const Problem<T, place> problem(context);
  const ProblemLayout& s = problem.layout;
  copy_costs<T>(problem, problem.cost(), s.ld, static_cast<T*>(kept) + kept_place(problem, item), s.M);
  return problem.team.epoch;
}

// The costs, and the norms of patches, where the costs were kept.
template <class T, Place place>
[[nodiscard]] SFR_DEVICE unsigned ground_again(TeamContext<place> context, const CostParams& p, const void* kept,
                                               int64_t b, int64_t g) {
  Ground<T, place> ground(context, p, b, g);
  const ProblemLayout& s = ground.layout;
  copy_costs<T, place>(ground, static_cast<const T*>(kept) + kept_place<T, place>(ground, b * p.G + g), s.M,
                       ground.cost(), s.ld);
  if (p.metric == Metric::cosine) invert_norms(ground);
  ground.team.sync();
  return ground.team.epoch;
}

// Weights and costs of problem (b, g), `known` where they were kept.
template <class T, Place place>
[[nodiscard]] SFR_DEVICE unsigned prepare(TeamContext<place> context, const CostParams& p, const Solve& solve,
                                          int64_t b, int64_t g, const void* known) {
  context.epoch = run<place, read_weights<T, place>>(context, solve, b, g, &p);
  if (known) return run<place, ground_again<T, place>>(context, p, known, b, g);
  const Problem<T, place> problem(context);
  return run<place, ground_forward<T, place>>(context, p, b, g, problem.first, problem.rows, problem.cost(),
                                              context.layout.ld);
}

template <class T, Place place>
SFR_KERNEL emd_forward_kernel(const __grid_constant__ KernelParams<EmdForwardParams> p) {
  each_item<place>(p, [&](TeamContext<place>& context, int64_t item) SFR_INLINED {
    context.epoch = prepare<T, place>(context, p, p.solve, item / p.G, item % p.G, p.known ? p.cost : nullptr);
    if (p.cost && !p.known) context.epoch = run<place, keep_costs<T, place>>(context, p.cost, item);
    context.epoch = run<place, transport_forward<T, place>>(context, p.solve, item);
    Problem<T, place>(context).team.sync();
  });
}

template <class T>
Kernels<EmdForwardParams> emd_forward_kernels() {
  if constexpr (sizeof(T) == 4) return {emd_forward_kernel<T, Place::any>, emd_forward_kernel<T, Place::near>};
  return {emd_forward_kernel<T, Place::any>, nullptr};
}

// From d/dC in the plan to the gradients of the features.
template <class T, Place place>
[[nodiscard]] SFR_DEVICE unsigned emd_gradients(TeamContext<place> context, const EmdBackwardParams& p, int64_t b,
                                                int64_t g, bool sound) {
  Ground<T, place> ground(context, p, b, g);
  const int ld = context.layout.ld;
  T *P = ground.at.P, *cost = ground.cost();
  // A team of several blocks puts the weights of pairs where all of them see them.
  const bool alone = in_one_block<place> || context.layout.blocks == 1;
  weigh<true>(ground, P, ld, cost, ld, alone ? P : cost, ld, !sound);
  ground.team.grid_barrier();
  ground_backward(ground, alone ? P : ground.at.far_cost, ld, p.grad_x, p.grad_y);
  return ground.team.epoch;
}

// A whole batch entry at a time: the gradient of x sums over its groups.
template <class T, Place place>
SFR_KERNEL emd_backward_kernel(const __grid_constant__ KernelParams<EmdBackwardParams> p) {
  each_item<place>(p, [&](TeamContext<place>& context, int64_t b) SFR_INLINED {
#pragma unroll 1
    for (int64_t g = 0; g < p.G; ++g) {
      context.epoch = prepare<T, place>(context, p, p.solve, b, g, p.cost);
      context.epoch = run<place, transport_backward<T, place>>(context, p.solve, b * p.G + g);
      Problem<T, place>(context).team.sync();
      context.epoch = run<place, emd_gradients<T, place>>(context, p, b, g, is_sound<T>(p.solve, b * p.G + g));
    }
  });
}

template <class T>
Kernels<EmdBackwardParams> emd_backward_kernels() {
  if constexpr (sizeof(T) == 4) return {emd_backward_kernel<T, Place::any>, emd_backward_kernel<T, Place::near>};
  return {emd_backward_kernel<T, Place::any>, nullptr};
}

}  // namespace

template <class T>
int64_t emd_forward(const EmdForwardParams& p, const Where& where) {
  return lay_out_and_launch<T>(emd_forward_kernels<T>(), p, solving(operation_of(p), p.solve), p.B * p.G, where);
}

template <class T>
int64_t emd_backward(const EmdBackwardParams& p, const Where& where) {
  Operation operation = solving(operation_of(p), p.solve);
  operation.backward = true;
  return lay_out_and_launch<T>(emd_backward_kernels<T>(), p, operation, p.B, where);
}

template int64_t emd_forward<SFR_REAL>(const EmdForwardParams&, const Where&);
template int64_t emd_backward<SFR_REAL>(const EmdBackwardParams&, const Where&);

}  // namespace sfr::cuda

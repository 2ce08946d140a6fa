#include "../contracts/emd.h"

#include "ground.cuh"
#include "transport.cuh"

namespace sfr::cuda {
namespace {

// Weights and costs of problem (b, g).
template <class T, Place place>
[[nodiscard]] SFR_DEVICE unsigned prepare(TeamContext<place> context, const CostParams& p, const Solve& solve,
                                          int64_t b, int64_t g) {
  context.epoch = run<place, read_weights<T, place>>(context, solve, b, g, &p);
  const Problem<T, place> problem(context);
  return run<place, ground_forward<T, place>>(context, p, b, g, problem.first, problem.rows, problem.cost(),
                                              context.layout.ld);
}

template <class T, Place place>
SFR_KERNEL emd_forward_kernel(const __grid_constant__ KernelParams<EmdForwardParams> p) {
  each_item<place>(p, [&](TeamContext<place>& context, int64_t item) SFR_INLINED {
    context.epoch = prepare<T, place>(context, p, p.solve, item / p.G, item % p.G);
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
  weigh(ground, ground.first, ground.rows, P, ld, cost, ld, alone ? P : cost, ld, !sound);
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
      context.epoch = prepare<T, place>(context, p, p.solve, b, g);
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

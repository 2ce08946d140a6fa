#include "../contracts/emd.h"

#include "ground.cuh"
#include "transport.cuh"

namespace sfr::cuda {
namespace {

// Weights and costs of problem (b, g).
template <class T>
[[nodiscard]] SFR_DEVICE unsigned prepare(TeamContext context, const CostParams& p, const Solve& solve, int64_t b,
                                          int64_t g) {
  context.epoch = read_weights<T>(context, solve, b, g, &p);
  const Problem<T> problem(context);
  return ground_forward<T>(context, p, b, g, problem.first, problem.rows, problem.cost(), context.layout.ld);
}

template <class T>
SFR_KERNEL emd_forward_kernel(const __grid_constant__ KernelParams<EmdForwardParams> p) {
  each_item(p, [&](TeamContext& context, int64_t item) {
    context.epoch = prepare<T>(context, p, p.solve, item / p.G, item % p.G);
    context.epoch = transport_forward<T>(context, p.solve, item);
    Problem<T>(context).team.sync();
  });
}

// From d/dC in the plan to the gradients of the features.
template <class T>
[[nodiscard]] SFR_PHASE unsigned feature_gradients(TeamContext context, const EmdBackwardParams& p, int64_t b,
                                                   int64_t g, bool sound) {
  Ground<T> ground(context, p, b, g);
  const int ld = context.layout.ld;
  T *P = ground.at.P, *cost = ground.cost();
  // A team of several blocks puts the weights of pairs where all of them see them.
  const bool alone = context.layout.blocks == 1;
  weigh(ground, ground.first, ground.rows, P, ld, cost, ld, alone ? P : cost, ld, !sound);
  ground.team.grid_barrier();
  ground_backward(ground, alone ? P : ground.at.far_cost, ld, p.grad_x, p.grad_y);
  return ground.team.epoch;
}

// A whole batch entry at a time: the gradient of x sums over its groups.
template <class T>
SFR_KERNEL emd_backward_kernel(const __grid_constant__ KernelParams<EmdBackwardParams> p) {
  each_item(p, [&](TeamContext& context, int64_t b) {
#pragma unroll 1
    for (int64_t g = 0; g < p.G; ++g) {
      context.epoch = prepare<T>(context, p, p.solve, b, g);
      context.epoch = transport_backward<T>(context, p.solve, b * p.G + g);
      Problem<T>(context).team.sync();
      context.epoch = feature_gradients<T>(context, p, b, g, is_sound<T>(p.solve, b * p.G + g));
    }
  });
}

}  // namespace

template <class T>
int64_t emd_forward(const EmdForwardParams& p, const Where& where) {
  return lay_out_and_launch<T>(emd_forward_kernel<T>, p, solving(operation_of(p), p.solve), p.B * p.G, where);
}

template <class T>
int64_t emd_backward(const EmdBackwardParams& p, const Where& where) {
  Operation operation = solving(operation_of(p), p.solve);
  operation.backward = true;
  return lay_out_and_launch<T>(emd_backward_kernel<T>, p, operation, p.B, where);
}

template int64_t emd_forward<SFR_REAL>(const EmdForwardParams&, const Where&);
template int64_t emd_backward<SFR_REAL>(const EmdBackwardParams&, const Where&);

}  // namespace sfr::cuda

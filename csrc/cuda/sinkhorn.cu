#include "../contracts/sinkhorn.h"

#include "transport.cuh"

namespace sfr::cuda {
namespace {

// Costs of a problem as the solver wants them; a removed patch's are not looked at. The solver begins with a barrier.
template <class T, Place place>
SFR_DEVICE void read_cost(TeamContext<place> context, const SinkhornParams& p, int64_t item) {
  const Problem<T, place> problem(context);
  const Team& team = problem.team;
  const ProblemLayout& s = context.layout;
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

template <class T, Place place>
SFR_KERNEL sinkhorn_forward_kernel(const __grid_constant__ KernelParams<SinkhornForwardParams> p) {
  each_item<place>(p, [&](TeamContext<place>& context, int64_t item) SFR_INLINED {
    context.epoch = run<place, read_weights<T, place>>(context, p.solve, item / p.G, item % p.G, nullptr);
    run<place, read_cost<T, place>>(context, p, item);
    context.epoch = run<place, transport_forward<T, place>>(context, p.solve, item);
    Problem<T, place>(context).team.sync();
  });
}

template <class T>
Kernels<SinkhornForwardParams> sinkhorn_forward_kernels() {
  if constexpr (sizeof(T) == 4)
    return {sinkhorn_forward_kernel<T, Place::any>, sinkhorn_forward_kernel<T, Place::near>};
  return {sinkhorn_forward_kernel<T, Place::any>, nullptr};
}

// d/dC from the plan to where it is wanted.
template <class T, Place place>
SFR_DEVICE void write_gradient(TeamContext<place> context, T* out, bool sound) {
  const Problem<T, place> problem(context);
  const Team& team = problem.team;
  const int M = context.layout.M, ld = context.layout.ld;
  out += int64_t(problem.first) * M;
#pragma unroll 1
  for (int i = team.warp(); i < problem.rows; i += team.warps())
#pragma unroll 4
    for (int j = team.lane(); j < M; j += warp_threads)
      out[int64_t(i) * M + j] = sound ? problem.at.P[int64_t(i) * ld + j] : T(NAN);
}

template <class T, Place place>
SFR_KERNEL sinkhorn_backward_kernel(const __grid_constant__ KernelParams<SinkhornBackwardParams> p) {
  each_item<place>(p, [&](TeamContext<place>& context, int64_t item) SFR_INLINED {
    context.epoch = run<place, read_weights<T, place>>(context, p.solve, item / p.G, item % p.G, nullptr);
    run<place, read_cost<T, place>>(context, p, item);
    context.epoch = run<place, transport_backward<T, place>>(context, p.solve, item);
    Problem<T, place>(context).team.sync();
    if (p.grad_cost)
      run<place, write_gradient<T, place>>(context, static_cast<T*>(p.grad_cost) + item * p.N * p.M,
                                           is_sound<T>(p.solve, item));
    Problem<T, place>(context).team.sync();
  });
}

template <class T>
Kernels<SinkhornBackwardParams> sinkhorn_backward_kernels() {
  if constexpr (sizeof(T) == 4)
    return {sinkhorn_backward_kernel<T, Place::any>, sinkhorn_backward_kernel<T, Place::near>};
  return {sinkhorn_backward_kernel<T, Place::any>, nullptr};
}

Operation operation_of(const SinkhornParams& p) {
  Operation operation;
  operation.N = p.N, operation.M = p.M, operation.G = p.G;
  return operation;
}

}  // namespace

template <class T>
int64_t sinkhorn_forward(const SinkhornForwardParams& p, const Where& where) {
  return lay_out_and_launch<T>(sinkhorn_forward_kernels<T>(), p, solving(operation_of(p), p.solve), p.B * p.G, where);
}

template <class T>
int64_t sinkhorn_backward(const SinkhornBackwardParams& p, const Where& where) {
  return lay_out_and_launch<T>(sinkhorn_backward_kernels<T>(), p, solving(operation_of(p), p.solve), p.B * p.G, where);
}

template int64_t sinkhorn_forward<SFR_REAL>(const SinkhornForwardParams&, const Where&);
template int64_t sinkhorn_backward<SFR_REAL>(const SinkhornBackwardParams&, const Where&);

}  // namespace sfr::cuda

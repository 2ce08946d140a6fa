#include "../contracts/sinkhorn.h"

#include "transport.cuh"

namespace sfr::cuda {
namespace {

// Costs of a problem as the solver wants them; a removed patch's are not looked at. The solver begins with a barrier.
template <class T, Place place>
SFR_DEVICE void read_cost(TeamContext<place> context, const SinkhornParams& p, int64_t item) {
  const Problem<T, place> problem(context);
  const ProblemLayout& s = context.layout;
  T* out = problem.cost();
  with_element(p.cost.dtype, [&](auto element) {
    using E = decltype(element);
    if constexpr (sizeof(T) >= sizeof(E)) {
      const E* cost = first_of<E>(p.cost, item / p.G, item % p.G);
      const bool whole =
          sizeof(E) == sizeof(T) && s.M % 4 == 0 && p.cost.stride_m == 1 && in_fours(cost, p.cost.stride_n);
      each_four(
          problem.team, problem.rows, s.M, whole,
          [&](int i) {
            const E* row = cost + (problem.first + i) * p.cost.stride_n;
            return problem.at.row_weight[i] > 0 ? row : nullptr;
          },
          [](int) { return 0; },
          [&](const E* row, int j, auto known) {
            if (!row) return Four<T>{};
            if constexpr (decltype(known)::value && sizeof(E) == sizeof(T)) return load4(row + j);
            return read_four<T>(row + j * p.cost.stride_m, p.cost.stride_m, s.M - j);
          },
          [&](int i, int j, const E*, int, Four<T> found, bool counts) {
#pragma unroll
            for (int k = 0; k < 4; ++k)
              if (!(j + k < s.M && problem.at.column_weight[j + k] > 0)) found.at[k] = 0;
            write_four(out + int64_t(i) * s.ld + j, found, true, counts ? s.M - j : 0);
          });
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
  const int M = context.layout.M, ld = context.layout.ld;
  out += int64_t(problem.first) * M;
  map_entries(problem.team, problem.rows, M, problem.at.P, ld, out, M,
              [&](int, int, T gradient) { return sound ? gradient : T(NAN); });
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

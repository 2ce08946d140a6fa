#include "../contracts/sinkhorn.h"

#include "transport.h"
#include "variant.h"

namespace sfr::cpu::SFR_ISA {
namespace {

template <class T>
struct Work {
  Transport<T> transport;
  T* cost = nullptr;

  Work(Arena& arena, const SinkhornParams& p) {
    transport.reserve(arena, p.N, p.M);
    cost = arena.take<T>(p.N * padded<T>(p.M));
  }
};

// The costs between kept patches, as the solver wants them.
template <class T>
void read_cost(const Team& team, const SinkhornParams& p, int64_t item, Work<T>& work) {
  const Weights<T>&a = work.transport.a, &b = work.transport.b;
  const int64_t ld = work.transport.ld();
  with_element(p.cost.dtype, [&](auto element) {
    using E = decltype(element);
    const E* cost = first_of<E>(p.cost, item / p.G, item % p.G);
    team.blocks(a.count, [&](int64_t i) {
      T* out = work.cost + i * ld;
      const E* in = cost + a.index(i) * p.cost.stride_n;
      for (int64_t j = 0; j < b.count; ++j) out[j] = convert_in<T>(in[b.index(j) * p.cost.stride_m]);
      for (int64_t j = b.count; j < ld; ++j) out[j] = 0;
    });
  });
  team.barrier();
}

// Calls task(team, item, work) with weights and costs in place.
template <class T, class Params, class Task>
void each_problem(const Params& p, Task&& task) {
  const Workload workload{p.B * p.G, Transport<T>::nanoseconds(p.N, p.M), 0, p.threads};
  for_each_problem_in<Work<T>>(workload, p, [&](const Team& team, int64_t item, Work<T>& work) {
    if (team.rank == 0) work.transport.read_weights(p.solve, item / p.G, item % p.G);
    team.barrier();
    read_cost(team, p, item, work);
    task(team, item, work);
  });
}

template <class T>
Status forward(const SinkhornForwardParams& p) {
  const Status status = check_weights<T>(p.solve, p.B, p.G, p.N, p.M);
  if (status != Status::ok) return status;
  each_problem<T>(p, [&](const Team& team, int64_t item, Work<T>& work) {
    transport_forward(team, work.transport, work.cost, p.solve, item);
  });
  return Status::ok;
}

template <class T>
Status backward(const SinkhornBackwardParams& p) {
  each_problem<T>(p, [&](const Team& team, int64_t item, Work<T>& work) {
    const bool sound = transport_backward(team, work.transport, work.cost, p.solve, item);
    if (!p.grad_cost) return;
    const Weights<T>&a = work.transport.a, &b = work.transport.b;
    const T missing = sound ? T(0) : std::numeric_limits<T>::quiet_NaN();
    T* out = static_cast<T*>(p.grad_cost) + item * p.N * p.M;
    team.blocks(p.N, [&](int64_t i) {
      for (int64_t j = 0; j < p.M; ++j) out[i * p.M + j] = missing;
    });
    team.barrier();
    if (!sound) return;
    const T* grad = work.transport.memory.P;
    const int64_t ld = work.transport.ld();
    team.blocks(a.count, [&](int64_t i) {
      for (int64_t j = 0; j < b.count; ++j) out[a.index(i) * p.M + b.index(j)] = grad[i * ld + j];
    });
  });
  return Status::ok;
}

}  // namespace

Status sinkhorn_forward(const SinkhornForwardParams& p) {
  return p.compute == DType::float64 ? forward<double>(p) : forward<float>(p);
}
Status sinkhorn_backward(const SinkhornBackwardParams& p) {
  return p.compute == DType::float64 ? backward<double>(p) : backward<float>(p);
}

}  // namespace sfr::cpu::SFR_ISA

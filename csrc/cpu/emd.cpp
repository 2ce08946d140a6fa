#include "../contracts/emd.h"

#include "ground.h"
#include "transport.h"
#include "variant.h"

namespace sfr::cpu::SFR_ISA {
namespace {

template <class T>
struct Work {
  Ground<T> ground;
  Transport<T> transport;
  GroundGrad<T> ground_grad;

  Work(Arena& arena, const CostParams& p) {
    ground.reserve(arena, p);
    transport.reserve(arena, p.N(), p.M());
    transport.of_features = true;
  }
  Work(Arena& arena, const EmdBackwardParams& p) {
    ground.reserve(arena, p);
    transport.reserve(arena, p.N(), p.M());
    transport.of_features = true;
    ground_grad.reserve(arena, p, p.grad_x, p.grad_y);
  }
};

// Weights and costs of one problem, `known` where they were kept.
template <class T>
void prepare(const Team& team, Work<T>& work, const Solve& solve, int64_t b, int64_t g, const void* known) {
  if (team.rank == 0) {
    Transport<T>& transport = work.transport;
    transport.read_weights(solve, b, g);
    work.ground.set(b, g, transport.a.kept, transport.a.count, transport.b.kept, transport.b.count);
  }
  team.barrier();
  const CostParams& p = *work.ground.params;
  if (known)
    ground_again(team, work.ground, static_cast<const T*>(known) + (b * p.G + g) * p.N() * p.M());
  else
    ground_forward(team, work.ground);
}

// The costs between kept patches, close together, and 0 up to the end of their place.
template <class T>
void keep_costs(const Team& team, const Ground<T>& ground, T* place, int64_t all) {
  const int64_t n = ground.x.patches, m = ground.y.patches;
  rows_out(team, ground.cost, ground.ld, n, m, place);
  if (team.rank == 0) std::memset(place + n * m, 0, sizeof(T) * (all - n * m));
}

// Of pieces of work of `problems` problems each.
template <class T>
Workload workload(const CostParams& p, int64_t items, int64_t problems) {
  const double nanoseconds = Ground<T>::nanoseconds(p) + Transport<T>::nanoseconds(p.N(), p.M());
  return {items, nanoseconds * double(problems), Ground<T>::thread_bytes(p), p.threads};
}

template <class T>
Status forward(const EmdForwardParams& p) {
  const Status status = check_weights<T>(p.solve, p.B, p.G, p.N(), p.M());
  if (status != Status::ok) return status;
  const int64_t all = p.N() * p.M();
  for_each_problem_in<Work<T>>(workload<T>(p, p.B * p.G, 1), p, [&](const Team& team, int64_t item, Work<T>& work) {
    prepare(team, work, p.solve, item / p.G, item % p.G, p.known ? p.cost : nullptr);
    if (p.cost && !p.known) keep_costs(team, work.ground, static_cast<T*>(p.cost) + item * all, all);
    transport_forward(team, work.transport, work.ground.cost, p.solve, item);
  });
  return Status::ok;
}

// A whole batch entry at a time: the gradient of x sums over its groups.
template <class T>
Status backward(const EmdBackwardParams& p) {
  for_each_problem_in<Work<T>>(workload<T>(p, p.B, p.G), p, [&](const Team& team, int64_t b, Work<T>& work) {
    bool sound = true;
    for (int64_t g = 0; g < p.G; ++g) {
      prepare(team, work, p.solve, b, g, p.cost);
      const bool finite = transport_backward(team, work.transport, work.ground.cost, p.solve, b * p.G + g);
      sound = sound && finite;
      // A broken problem goes through as well: its NaNs are made below.
      ground_backward(team, work.ground, work.ground_grad, work.transport.memory.P);
      if (!finite && p.grad_y.data && team.rank == 0)
        fill(p.grad_y, map_offset(p.grad_y, b, g), 0, p.C, std::numeric_limits<float>::quiet_NaN());
      team.barrier();
    }
    if (!sound && p.grad_x.data && team.rank == 0)
      fill(p.grad_x, map_offset(p.grad_x, b, 0), 0, p.C, std::numeric_limits<float>::quiet_NaN());
  });
  return Status::ok;
}

}  // namespace

Status emd_forward(const EmdForwardParams& p) {
  return p.compute == DType::float64 ? forward<double>(p) : forward<float>(p);
}
Status emd_backward(const EmdBackwardParams& p) {
  return p.compute == DType::float64 ? backward<double>(p) : backward<float>(p);
}

}  // namespace sfr::cpu::SFR_ISA

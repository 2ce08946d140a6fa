#include "../contracts/cost.h"

#include "ground.h"
#include "sparse.h"
#include "variant.h"

namespace sfr::cpu::SFR_ISA {
namespace {

template <class T>
struct Forward {
  Ground<T> ground;

  Forward(Arena& arena, const CostParams& p) { ground.reserve(arena, p); }
};

template <class T>
struct Backward {
  Ground<T> ground;
  GroundGrad<T> ground_grad;
  Slots<T> of_x, of_y;
  bool few;  // whether the entries of the gradient that are not 0 fit into the slots
  T* grad;

  Backward(Arena& arena, const CostBackwardParams& p) {
    ground.reserve(arena, p);
    ground.padded_too = true;  // no weights say which patches are
    ground_grad.reserve(arena, p, p.grad_x, p.grad_y);
    of_x.reserve(arena, p.N(), few_slots);
    of_y.reserve(arena, p.M(), few_slots);
    grad = arena.take<T>(p.N() * padded<T>(p.M()));
  }
};

// Hides pixels of one side that are in no patch with a finite cost: as such a patch has weights that are 0 or NaN, its
// gradient is the same whatever they hold, and a weight of 0 times a NaN is not 0. Costs are [patches][others], in
// steps of `along` and `across`.
template <class T>
void hide_broken(Side<T>& side, const T* cost, int64_t along, int64_t others, int64_t across) {
  side.hide_all_but([&](int64_t i) {
    for (int64_t j = 0; j < others; ++j)
      if (const T c = cost[i * along + j * across]; c - c == 0) return true;
    return false;
  });
}

template <class T>
void forward(const CostForwardParams& p) {
  const int64_t N = p.N(), M = p.M();
  const Workload workload{p.B * p.G, Ground<T>::nanoseconds(p), Ground<T>::thread_bytes(p), p.threads};
  for_each_problem_in<Forward<T>>(workload, p, [&](const Team& team, int64_t item, Forward<T>& work) {
    Ground<T>& ground = work.ground;
    if (team.rank == 0) ground.set(item / p.G, item % p.G, nullptr, N, nullptr, M);
    team.barrier();
    ground_forward(team, ground);
    rows_out(team, ground.cost, ground.ld, N, M, static_cast<T*>(p.cost) + item * N * M);
  });
}

// A whole batch entry at a time: the gradient of x sums over its groups.
template <class T>
void backward(const CostBackwardParams& p) {
  const int64_t N = p.N(), M = p.M();
  const Workload workload{p.B, Ground<T>::nanoseconds(p) * double(p.G), Ground<T>::thread_bytes(p), p.threads};
  for_each_problem_in<Backward<T>>(workload, p, [&](const Team& team, int64_t b, Backward<T>& work) {
    Ground<T>& ground = work.ground;
    for (int64_t g = 0; g < p.G; ++g) {
      const int64_t first = (b * p.G + g) * N * M;
      const T *cost = static_cast<const T*>(p.cost) + first, *grad = static_cast<const T*>(p.grad_cost) + first;
      if (team.rank == 0) {
        ground.set(b, g, nullptr, N, nullptr, M);
        work.few = p.patch == 1 && p.metric != Metric::cosine &&
                   find_entries(p.metric, grad, cost, N, M, work.of_x, work.of_y);
        if (!work.few) {
          hide_broken(ground.x, cost, M, M, 1);
          hide_broken(ground.y, cost, 1, N, M);
        }
      }
      team.barrier();
      if (work.few) {
        entries_backward(team, ground, work.ground_grad, work.of_x, work.of_y);
        continue;
      }
      rows_in(team, grad, N, M, work.grad, ground.ld);
      ground_again(team, ground, cost);
      ground_backward(team, ground, work.ground_grad, work.grad);
    }
  });
}

}  // namespace

Status cost_forward(const CostForwardParams& p) {
  p.compute == DType::float64 ? forward<double>(p) : forward<float>(p);
  return Status::ok;
}
Status cost_backward(const CostBackwardParams& p) {
  p.compute == DType::float64 ? backward<double>(p) : backward<float>(p);
  return Status::ok;
}

}  // namespace sfr::cpu::SFR_ISA

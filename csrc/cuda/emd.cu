#include "../contracts/emd.h"

#include "ground.cuh"
#include "transport.cuh"

namespace sfr::cuda {
namespace {

// Weights and costs of problem (b, g).
template <class T>
SFR_DEVICE unsigned prepare(Site site, const CostParams& p, const Solve& solve, int64_t b, int64_t g) {
  site.meetings = read_weights<T>(site, solve, b, g, &p);
  const Problem<T> problem(site);
  return ground_forward<T>(site, p, b, g, problem.first, problem.rows, problem.cost(), site.shape.ld);
}

template <class T>
SFR_KERNEL emd_forward_kernel(const __grid_constant__ Work<EmdForwardParams> p) {
  Site site{p.shape, p.task, p.scratch, p.teams};
#pragma unroll 1
  for (int64_t item = site.team(); item < p.items; item += p.teams) {
    site.meetings = prepare<T>(site, p, p.solve, item / p.G, item % p.G);
    site.meetings = transport_forward<T>(site, p.solve, item);
    Problem<T>(site).team.sync();
  }
}

// From d/dC in the plan to the gradients of the features.
template <class T>
SFR_PHASE unsigned feature_gradients(Site site, const EmdBackwardParams& p, int64_t b, int64_t g, bool sound) {
  Ground<T> ground(site, p, b, g);
  const int ld = site.shape.ld;
  T *P = ground.at.P, *cost = ground.cost();
  // A team of several blocks puts the weights of pairs where all of them see them.
  const bool alone = site.shape.blocks == 1;
  weigh(ground, ground.first, ground.rows, P, ld, cost, ld, alone ? P : cost, ld, !sound);
  ground.team.meet();
  ground_backward(ground, alone ? P : ground.at.far_cost, ld, p.grad_x, p.grad_y);
  return ground.team.meetings;
}

// A whole batch entry at a time: the gradient of x sums over its groups.
template <class T>
SFR_KERNEL emd_backward_kernel(const __grid_constant__ Work<EmdBackwardParams> p) {
  Site site{p.shape, p.task, p.scratch, p.teams};
#pragma unroll 1
  for (int64_t b = site.team(); b < p.items; b += p.teams)
#pragma unroll 1
    for (int64_t g = 0; g < p.G; ++g) {
      site.meetings = prepare<T>(site, p, p.solve, b, g);
      site.meetings = transport_backward<T>(site, p.solve, b * p.G + g);
      Problem<T>(site).team.sync();
      site.meetings = feature_gradients<T>(site, p, b, g, is_sound<T>(p.solve, b * p.G + g));
    }
}

}  // namespace

template <class T>
int64_t emd_forward(const EmdForwardParams& p, const Where& where) {
  return start_on<T>(emd_forward_kernel<T>, p, solving(task_of(p), p.solve), p.B * p.G, where);
}

template <class T>
int64_t emd_backward(const EmdBackwardParams& p, const Where& where) {
  Task task = solving(task_of(p), p.solve);
  task.backward = true;
  return start_on<T>(emd_backward_kernel<T>, p, task, p.B, where);
}

template int64_t emd_forward<SFR_REAL>(const EmdForwardParams&, const Where&);
template int64_t emd_backward<SFR_REAL>(const EmdBackwardParams&, const Where&);

}  // namespace sfr::cuda

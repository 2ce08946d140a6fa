// Solving one problem: over-relaxed scaling far from the solution, Newton steps near it, log-domain updates where even
// scalings would underflow.
#pragma once

#include "scaling.h"
#include "system.h"

namespace sfr::cpu::SFR_ISA {

template <class T>
T magnitude(T x) {
  return x < 0 ? -x : x;
}

template <class T>
struct Solution {
  int64_t n_iter = 0;
  Evaluation<T> plan;
};

// One Newton step on both potentials: the plan's system with the errors of its marginals as right sides. A step that
// would change a plan's entry by more than e^2 or so is shortened, since the linear model does not reach that far.
// The old potentials stay in the scalings. A step of the conjugate gradients counts as an iteration. Returns whether
// the step was shortened.
template <class T>
bool newton_step(const Team& team, Plan<T>& plan, PlanSystem<T>& system, int64_t max_iter, int64_t& n_iter) {
  constexpr T longest = 2, precision = T(1e-2);
  struct {
    Margin<T>& side;
    T *error, *step;
  } const sides[] = {{plan.rows, system.h, system.alpha}, {plan.columns, system.k, system.beta}};

  if (team.rank == 0)
    for (const auto& [side, error, step] : sides)
      for (int64_t i = 0; i < side.size; ++i) error[i] = i < side.count ? side.weight[i] - side.sum[i] : T(0);
  team.barrier();
  n_iter += 1 + solve_system(team, system, precision, max_iter - n_iter - 1);
  T length = 0;
  for (const auto& [side, error, step] : sides)
    for (int64_t i = 0; i < side.count; ++i) length = magnitude(step[i]) > length ? magnitude(step[i]) : length;
  const T factor = T(1 / ln2) * (length > longest ? longest / length : T(1));
  if (team.rank == 0)
    for (const auto& [side, error, step] : sides)
      for (int64_t i = 0; i < side.count; ++i) {
        side.scale[i] = side.log[i];
        side.log[i] += factor * step[i];
      }
  team.barrier();
  return length > longest;
}

// Puts the scalings back to 1, after the old potentials if the step is to be undone.
template <class T>
void finish_step(const Team& team, Plan<T>& plan, bool undo) {
  if (team.rank == 0)
    for (Margin<T>* side : {&plan.rows, &plan.columns})
      for (int64_t i = 0; i < side->size; ++i) {
        if (undo && i < side->count) side->log[i] = side->scale[i];
        side->scale[i] = 1;
      }
  team.barrier();
}

// From columns.log to a plan within tol, or as far as max_iter goes. Newton takes over at `gate`; a step that fails is
// undone and the iterations go on to a quarter of that error before the next is tried.
template <class T>
Solution<T> solve(const Team& team, Plan<T>& plan, PlanSystem<T>& system, T tol, int64_t max_iter) {
  Solution<T> out;
  Relaxation<T> relaxation;
  T gate = T(1e-2);
  int tries = 6;
  update_rows(team, plan);
  out.plan = evaluate(team, plan);
  while (out.plan.error > tol && out.n_iter < max_iter) {
    if (out.plan.cold) {
      ++out.n_iter;
      update_columns(team, plan);
      update_rows(team, plan);
      out.plan = evaluate(team, plan);
    } else if (out.plan.error > gate || tries == 0) {
      scale(team, plan, out.plan.error, tries > 0 && gate > tol ? gate : tol, max_iter, out.n_iter, relaxation);
      out.plan = evaluate(team, plan);
    } else {
      const bool shortened = newton_step(team, plan, system, max_iter, out.n_iter);
      const Evaluation<T> after = evaluate(team, plan);
      // A shortened step moves mass along a path that only opens up on the way: the error may wait.
      const bool good = after.error < out.plan.error * (shortened ? T(1.2) : T(0.7));
      finish_step(team, plan, !good);
      if (good) {
        out.plan = after;
      } else {
        gate = out.plan.error / 4;
        --tries;
        out.plan = evaluate(team, plan);
      }
    }
  }
  return out;
}

}  // namespace sfr::cpu::SFR_ISA

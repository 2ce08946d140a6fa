// Solving one problem: over-relaxed scaling far from the solution, Newton steps near it, log-domain updates where even
// scalings would underflow.
#pragma once

#include <limits>

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

template <class T>
struct Step {
  Margin<T>& side;
  T *error, *step;
};

// One Newton step on both potentials, left in the scalings: the plan's system with the errors of its marginals as
// right sides. A step that would change a plan's entry by more than e^2 or so is shortened, since the linear model
// does not reach that far. A step of the conjugate gradients counts as an iteration. Returns the factor from the
// system's solution to the step in powers of two.
template <class T>
T newton_step(const Team& team, Plan<T>& plan, PlanSystem<T>& system, T precision, int64_t max_iter, int64_t& n_iter) {
  constexpr T longest = 2;
  const Step<T> sides[] = {{plan.rows, system.h, system.alpha}, {plan.columns, system.k, system.beta}};
  if (team.rank == 0)
    for (const auto& [side, error, step] : sides)
      for (int64_t i = 0; i < side.size; ++i) error[i] = i < side.count ? side.goal()[i] - side.sum[i] : T(0);
  team.barrier();
  n_iter += 1 + solve_system(team, system, precision, max_iter - n_iter - 1);
  T length = 0;
  for (const auto& [side, error, step] : sides)
    for (int64_t i = 0; i < side.count; ++i) length = magnitude(step[i]) > length ? magnitude(step[i]) : length;
  const T factor = T(1 / ln2) * (length > longest ? longest / length : T(1));
  if (team.rank == 0)
    for (const auto& [side, error, step] : sides)
      for (int64_t i = 0; i < side.size; i += lanes<T>) store(side.scale + i, exp2<T>(factor * load(step + i)));
  team.barrier();
  return factor;
}

template <class T>
void undo_step(const Team& team, Plan<T>& plan, const PlanSystem<T>& system, T factor) {
  if (team.rank == 0)
    for (const auto& [side, error, step] :
         {Step<T>{plan.rows, system.h, system.alpha}, Step<T>{plan.columns, system.k, system.beta}})
      for (int64_t i = 0; i < side.count; ++i) side.log[i] -= factor * step[i];
  team.barrier();
}

// What rounding of the potentials leaves of an error.
template <class T>
T rounding(const Plan<T>& plan) {
  T size = 0;
  for (const Margin<T>* side : {&plan.rows, &plan.columns}) {
    T most = 0;
    for (int64_t i = 0; i < side->count; ++i) most = magnitude(side->log[i]) > most ? magnitude(side->log[i]) : most;
    size += most;
  }
  return size * std::numeric_limits<T>::epsilon();
}

// From columns.log to a plan within tol, or as far as max_iter goes. Newton takes over at `gate`. A step that fails is
// undone and taken again from a more precise solution of its system (what is left then is mass between parts of the
// plan that hardly touch, the system's smallest eigenvalues); after that, iterations follow, twice as many after each
// failure: where rounding lets no step succeed, little is lost, and after a few more tries nothing is tried. Between
// steps the plan is scaled; the one that is judged is that of the potentials.
template <class T>
Solution<T> solve(const Team& team, Plan<T>& plan, PlanSystem<T>& system, Method method, T tol, int64_t max_iter) {
  Solution<T> out;
  Relaxation<T> relaxation(method != Method::plain);
  const T gate = method == Method::automatic ? T(1e-2) : T(0);
  constexpr T finest = sizeof(T) == 4 ? T(1e-5) : T(1e-10);
  T precision = T(1e-2);
  int64_t rest = 16, resume = 0;  // no Newton step before iteration `resume`
  int64_t last = max_iter;
  bool exact = true;
  const auto evaluate_exactly = [&] {
    exact = true;
    return evaluate<From::potentials>(team, plan);
  };
  const auto evaluate_scaled = [&] {
    exact = false;
    const Evaluation<T> scaled = evaluate<From::scalings>(team, plan);
    absorb(team, plan);
    return scaled;
  };
  if (plan.soft()) {
    update_rows(team, plan);
    out.plan = evaluate_exactly();
  } else {
    update_rows<true>(team, plan);
    out.plan = evaluate_scaled();
  }
  for (;;) {
    if (!(out.plan.error > tol) || out.n_iter >= last) {
      if (exact) return out;
      out.plan = evaluate_exactly();
    } else if (out.plan.cold) {
      ++out.n_iter;
      update_columns(team, plan);
      update_rows(team, plan);
      out.plan = evaluate_exactly();
    } else if (out.plan.error > gate || out.n_iter < resume) {
      const bool far = out.plan.error > gate;
      const int64_t limit = far || max_iter < resume ? max_iter : resume;
      const Burst burst = scale(team, plan, out.plan.error, far ? gate : T(0), tol, limit, out.n_iter, relaxation);
      if (burst == Burst::stopped) {
        out.plan = evaluate_scaled();
      } else {
        absorb(team, plan);
        out.plan = evaluate_exactly();
      }
    } else {
      const T factor = newton_step(team, plan, system, precision, max_iter, out.n_iter);
      const Evaluation<T> after = evaluate_scaled();
      // A shortened step moves mass along a path that only opens up on the way: the error may wait.
      const bool shortened = factor < T(1 / ln2);
      if (after.error < out.plan.error * (shortened ? T(1.2) : T(0.7))) {
        out.plan = after;
      } else {
        if (precision > finest) {
          precision *= T(1e-2);
        } else {
          if (rest > 64 && out.plan.error < rounding(plan)) last = out.n_iter;
          resume = out.n_iter + rest;
          rest *= 2;
        }
        undo_step(team, plan, system, factor);
        out.plan = evaluate_exactly();
      }
    }
  }
}

}  // namespace sfr::cpu::SFR_ISA

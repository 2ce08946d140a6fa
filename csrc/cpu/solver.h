// Solving one problem: larger eps first, over-relaxed scaling far from the solution, Newton steps near it, log-domain
// updates where even scalings would underflow.
#pragma once

#include <array>
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
  T *before, *step;
};

template <class T>
std::array<Step<T>, 2> steps_of(Plan<T>& plan, PlanSystem<T>& system) {
  return {{{plan.rows, system.h, system.alpha}, {plan.columns, system.k, system.beta}}};
}

// One Newton step on both potentials, left in the scalings: the plan's system with the errors of its marginals as right
// sides. No potential goes further than e^4, since the linear model does not reach that far; those that want to are
// of parts of the plan that hardly touch others, which need not wait for them. A step of the conjugate gradients counts
// as an iteration. Returns whether the step was cut.
template <class T>
bool newton_step(const Team& team, Plan<T>& plan, PlanSystem<T>& system, T precision, int64_t max_iter,
                 int64_t& n_iter) {
  constexpr T longest = 4;
  const auto steps = steps_of(plan, system);
  if (team.rank == 0)
    for (const auto& [side, error, step] : steps)
      for (int64_t i = 0; i < side.size; ++i) error[i] = i < side.count ? side.goal()[i] - side.sum[i] : T(0);
  team.barrier();
  n_iter += 1 + solve_system(team, system, precision, max_iter - n_iter - 1);
  bool cut = false;
  for (const auto& [side, before, step] : steps)
    for (int64_t i = 0; i < side.count; ++i) cut = cut || magnitude(step[i]) > longest;
  if (team.rank == 0)
    for (const auto& [side, before, step] : steps)
      for (int64_t i = 0; i < side.size; i += lanes<T>) {
        const Vec<T> limit = splat<T>(longest), x = vmax<T>(-limit, -vmax<T>(-limit, -load(step + i)));
        store(side.scale + i, exp2<T>(T(1 / ln2) * x));
        store(before + i, load(side.log + i));
      }
  team.barrier();
  return cut;
}

template <class T>
void undo_step(const Team& team, Plan<T>& plan, PlanSystem<T>& system) {
  if (team.rank == 0)
    for (const auto& [side, before, step] : steps_of(plan, system))
      std::memcpy(side.log, before, sizeof(T) * side.size);
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

// From columns.log: the rows' potentials, and the plan of both.
template <class T>
Evaluation<T> start(const Team& team, Plan<T>& plan) {
  if (plan.soft()) {
    update_rows(team, plan);
    return evaluate<From::potentials>(team, plan);
  }
  update_rows<true>(team, plan);
  const Evaluation<T> out = evaluate<From::scalings>(team, plan);
  absorb(team, plan);
  return out;
}

// At a small eps, iterations move mass a little at a time; at a larger one they cross the same distance at once, and
// its potentials, found roughly, are a good start. Solves for eps times 4, 16, ..., the widest first, up to about a
// fifth of the costs' deviation, which is `spread` times eps.
template <class T>
void approach(const Team& team, Plan<T>& plan, T spread, int64_t max_iter, int64_t& n_iter) {
  constexpr T pace = 4, enough = T(0.18), rough = T(0.03);
  constexpr int64_t patience = 64;
  const auto widen = [&](T by) {
    if (team.rank == 0) {
      plan.factor /= by;
      for (Margin<T>* side : {&plan.rows, &plan.columns}) side->soft *= by;
      for (int64_t j = 0; j < plan.columns.count; ++j) {
        const T start = plan.columns.log_weight[j];
        plan.columns.log[j] = start + (plan.columns.log[j] - start) / by;
      }
    }
    team.barrier();
  };
  T width = 1;
  while (width * pace < enough * spread) width *= pace;
  if (width > 1) widen(width);
  for (; width > 1; width /= pace) {
    Relaxation<T> relaxation(true);
    const int64_t limit = max_iter < n_iter + patience ? max_iter : n_iter + patience;
    for (Evaluation<T> now = start(team, plan); now.error > rough && !now.cold && n_iter < limit;) {
      const Burst burst = scale(team, plan, T(0), rough, limit, n_iter, relaxation);
      absorb(team, plan);
      if (burst != Burst::at_edge) break;
      now = evaluate<From::potentials>(team, plan);
    }
    widen(1 / pace);
  }
}

// From columns.log to a plan within tol, or as far as max_iter goes. Newton takes over at `gate`. Where its model did
// not hold, mass is off in a few places, which a few iterations put right. A step that fails nevertheless is undone
// and, unless it was cut, taken again from a more precise solution of its system (what is left then is mass between
// parts of the plan that hardly touch, the system's smallest eigenvalues); after that, iterations follow, twice as many
// after each failure. Between steps the plan is scaled; the one that is judged is that of the potentials, and where
// their rounding keeps it from tol, solving ends.
template <class T>
Solution<T> solve(const Team& team, Plan<T>& plan, PlanSystem<T>& system, Method method, T spread, T tol,
                  int64_t max_iter) {
  Solution<T> out;
  const bool newton = method == Method::automatic;
  if (newton) approach(team, plan, spread, max_iter, out.n_iter);
  Relaxation<T> relaxation(method != Method::plain);
  const T gate = newton ? T(1e-2) : T(0);
  constexpr T finest = sizeof(T) == 4 ? T(1e-5) : T(1e-10);
  constexpr int64_t corrections = 8;
  T precision = T(1e-2);
  int64_t rest = 16, resume = 0;  // no Newton step before iteration `resume`
  int64_t last = max_iter;
  T missed = T(__builtin_inf());  // error of the potentials, the last time that scalings were within tol
  const auto evaluate_scaled = [&] {
    const Evaluation<T> scaled = evaluate<From::scalings>(team, plan);
    absorb(team, plan);
    return scaled;
  };
  const auto evaluate_reached = [&] {
    const Evaluation<T> exact = evaluate<From::potentials>(team, plan);
    if (exact.error > missed * T(0.9) && exact.error < 4 * rounding(plan)) last = out.n_iter;
    missed = exact.error;
    return exact;
  };
  out.plan = start(team, plan);
  bool exact = plan.soft();
  for (;;) {
    if (!(out.plan.error > tol) || out.n_iter >= last) {
      if (exact) return out;
      out.plan = evaluate_reached();
      exact = true;
    } else if (out.plan.cold) {
      ++out.n_iter;
      update_columns(team, plan);
      update_rows(team, plan);
      out.plan = evaluate<From::potentials>(team, plan);
      exact = true;
    } else if (out.plan.error > gate || out.n_iter < resume) {
      const bool far = out.plan.error > gate;
      const int64_t limit = far || max_iter < resume ? max_iter : resume;
      const Burst burst = scale(team, plan, far ? gate : T(0), tol, limit, out.n_iter, relaxation);
      exact = burst != Burst::stopped;
      if (exact) absorb(team, plan);
      out.plan = burst == Burst::stopped   ? evaluate_scaled()
                 : burst == Burst::reached ? evaluate_reached()
                                           : evaluate<From::potentials>(team, plan);
    } else {
      const T before = out.plan.error, half = before / 2;
      const bool cut = newton_step(team, plan, system, precision, max_iter, out.n_iter);
      out.plan = evaluate_scaled();
      exact = false;
      if (out.plan.error > half && out.n_iter < max_iter) {
        const int64_t limit = max_iter < out.n_iter + corrections ? max_iter : out.n_iter + corrections;
        Relaxation<T> none(false);
        scale(team, plan, T(0), half, limit, out.n_iter, none);
        out.plan = evaluate_scaled();
      }
      // A cut step moves mass along a path that only opens up on the way: the error may wait.
      if (!(out.plan.error < before * (cut ? T(1.2) : T(0.7)))) {
        if (precision > finest && !cut) {
          precision *= T(1e-2);
        } else {
          if (rest > 64 && before < 4 * rounding(plan)) last = out.n_iter;
          resume = out.n_iter + rest;
          rest *= 2;
        }
        undo_step(team, plan, system);
        out.plan = evaluate<From::potentials>(team, plan);
        exact = true;
      }
    }
  }
}

}  // namespace sfr::cpu::SFR_ISA

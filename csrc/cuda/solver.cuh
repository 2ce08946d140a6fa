// Solving one problem: larger eps first, over-relaxed scaling far from the solution, Newton steps near it, log-domain
// updates where even scalings would underflow. The strategy, and why, stand in csrc/cpu/solver.h.
#pragma once

#include "scaling.cuh"
#include "symmetric.cuh"
#include "system.cuh"

namespace sfr::cuda {

template <class T>
struct Solution {
  int64_t n_iter = 0;
  Evaluation<T> plan;
};

// One Newton step on both potentials, left in the scalings; the potentials before it stay in row::right and
// column::right. Returns whether the step was cut.
template <class T>
SFR_DEVICE bool newton_step(Plan<T>& plan, T precision, int64_t max_iter, int64_t& n_iter) {
  constexpr T longest = 4;
  Team& team = plan.team;
  T *error_a = plan.of_rows(row::right), *error_b = plan.of_columns(column::right);
  const T *alpha = plan.of_rows(row::alpha), *beta = plan.of_columns(column::beta);
  const auto missing = [](const Margin<T>& side, int i, T sum) {
    return side.weight[i] > 0 ? side.goal(i) - sum : T(0);
  };
  plan.each_row([&](int i) { error_a[i] = missing(plan.row_margin, i, plan.of_rows(row::sum)[i]); });
  plan.each_column([&](int j) { error_b[j] = missing(plan.column_margin, j, plan.of_columns(column::sum)[j]); });
  n_iter += 1 + solve_system(plan, precision, max_iter - n_iter - 1);
  const auto scaling = [](T step) {
    return exp2_of(T(1 / ln2) * (step > longest ? longest : step < -longest ? -longest : step));
  };
  T length = 0;
  plan.each_row([&](int i) {
    length = Max()(length, magnitude(alpha[i]));
    error_a[i] = plan.of_rows(row::log)[i];
    plan.of_rows(row::scale)[i] = scaling(alpha[i]);
  });
  plan.each_column([&](int j) {
    length = Max()(length, magnitude(beta[j]));
    error_b[j] = plan.of_columns(column::log)[j];
    plan.of_columns(column::scale)[j] = scaling(beta[j]);
  });
  return over_team<Max>(team, plan.board, length) > longest;
}

template <class T>
SFR_DEVICE void undo_step(const Plan<T>& plan) {
  plan.each_row([&](int i) { plan.of_rows(row::log)[i] = plan.of_rows(row::right)[i]; });
  plan.each_column([&](int j) { plan.of_columns(column::log)[j] = plan.of_columns(column::right)[j]; });
  plan.team.sync();
}

// The problem for eps times `by`, and columns' potentials for it.
template <class T>
SFR_DEVICE void widen(Plan<T>& plan, T by) {
  plan.factor /= by;
  plan.row_margin.soft *= by;
  plan.column_margin.soft *= by;
  plan.each_column([&](int j) {
    const T w = plan.column_margin.weight[j];
    T& log = plan.of_columns(column::log)[j];
    if (w > 0) log = log2_of(w) + (log - log2_of(w)) / by;
  });
  plan.team.sync();
}

// What rounding of the potentials leaves of an error.
template <class T>
SFR_DEVICE T rounding(const Plan<T>& plan) {
  T rows = 0, columns = 0;
  plan.each_row([&](int i) {
    if (plan.row_margin.weight[i] > 0) rows = Max()(rows, magnitude(plan.of_rows(row::log)[i]));
  });
  plan.each_column([&](int j) {
    if (plan.column_margin.weight[j] > 0) columns = Max()(columns, magnitude(plan.of_columns(column::log)[j]));
  });
  T most[2] = {rows, columns};
  over_team<Max>(plan.team, plan.board, most);
  return (most[0] + most[1]) * (sizeof(T) == 4 ? T(1.1920929e-7) : T(2.220446049250313e-16));
}

// From column::log to a plan within tol, or as far as max_iter goes. `spread`: the costs' deviation over eps.
template <class T>
SFR_DEVICE Solution<T> solve(Plan<T>& plan, const SolverOptions& options, T spread) {
  constexpr T pace = 4, enough = T(0.18), rough = T(0.03), finest = sizeof(T) == 4 ? T(1e-5) : T(1e-10);
  constexpr int64_t patience = 64, corrections = 8;
  const T tol = T(options.tol);
  const int64_t max_iter = options.max_iter;
  const auto at_most = [&](int64_t n) { return n < max_iter ? n : max_iter; };
  const bool symmetric = options.symmetric, newton = options.method == Method::automatic && !symmetric;
  const T gate = newton ? T(1e-2) : T(0);
  Solution<T> out;
  Relaxation<T> relaxation(options.method != Method::plain);
  T width = 1;  // above 1: solving roughly for eps times this
  while (newton && width * pace < enough * spread) width *= pace;
  if (width > 1) widen(plan, width);
  int64_t until = at_most(patience);  // so long at this width
  T precision = T(1e-2);
  int64_t rest = 16, resume = 0;  // no Newton step before iteration `resume`
  int64_t last = max_iter;
  T before = T(INFINITY);  // error before the last Newton step, or burst of symmetric iterations
  T missed = T(INFINITY);  // error of the potentials, the last time that scalings were within tol
  bool stepped = false, corrected = false, cut = false;  // the Newton step that is to be judged
  bool fresh = true;                                     // the rows' potentials are to follow from the columns'
  bool reached = false;                                  // the scalings are within tol
  bool narrower = false;                                 // on to a smaller eps
  for (bool exact = true;;) {
    if (narrower) {
      widen(plan, 1 / pace);
      width /= pace;
      until = at_most(out.n_iter + patience);
      relaxation = Relaxation<T>(true);
      narrower = false;
      fresh = true;
    }
    if (fresh) {
      update_rows(plan);
      if (symmetric) meet_halfway(plan);
      fresh = false;
      exact = true;
    }
    if (exact) {
      out.plan = evaluate<From::potentials>(plan);
    } else {
      out.plan = evaluate<From::scalings>(plan);
      absorb(plan);
    }
    const T error = out.plan.error;
    if (reached) {
      if (error > missed * T(0.9) && error < 4 * rounding(plan)) last = out.n_iter;
      missed = error;
      reached = false;
    }
    bool correct = false;
    if (stepped) {
      correct = !corrected && error > before / 2 && out.n_iter < max_iter;
      corrected = correct;
      stepped = correct;
      // A cut step moves mass along a path that only opens up on the way: the error may wait.
      if (!correct && !(error < before * (cut ? T(1.2) : T(0.7)))) {
        if (precision > finest && !cut) {
          precision *= T(1e-2);
        } else {
          if (rest > 64 && before < 4 * rounding(plan)) last = out.n_iter;
          resume = out.n_iter + rest;
          rest *= 2;
        }
        undo_step(plan);
        exact = true;
        continue;
      }
    }
    const bool wide = width > 1;
    if (wide && (!(error > rough) || out.plan.cold || out.n_iter >= until)) {
      narrower = true;
    } else if (!wide && !correct && (!(error > tol) || out.n_iter >= last)) {
      if (exact) return out;
      reached = exact = true;
    } else if (out.plan.cold && !correct) {
      ++out.n_iter;
      if (!symmetric) update_columns(plan);
      fresh = true;
    } else if (symmetric) {
      if (stalls(error, before)) return out;
      before = error;
      scale_symmetric(plan, tol, max_iter, out.n_iter);
      absorb(plan);
      exact = true;
    } else if (wide || correct || error > gate || out.n_iter < resume) {
      const bool far = !wide && !correct && error > gate;
      const int64_t limit = wide      ? until
                            : correct ? at_most(out.n_iter + corrections)
                            : far     ? max_iter
                                      : at_most(resume);
      const T goal = wide ? rough : correct ? before / 2 : tol;
      const Burst burst = scale(plan, far ? gate : T(0), goal, limit, out.n_iter, relaxation, correct);
      narrower = wide && burst != Burst::at_edge;
      reached = burst == Burst::reached && !wide && !correct;
      exact = !correct && (wide || burst != Burst::stopped);
      if (exact) absorb(plan);
    } else {
      before = error;
      cut = newton_step(plan, precision, max_iter, out.n_iter);
      stepped = true;
      exact = false;
    }
  }
}

}  // namespace sfr::cuda

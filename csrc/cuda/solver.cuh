// Solving one problem: over-relaxed scaling far from the solution, Newton steps near it, log-domain updates where even
// scalings would underflow. The strategy, and why, stand in csrc/cpu/solver.h.
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

// One Newton step on both potentials, left in the scalings. Returns the factor from the system's solution to the step
// in powers of two.
template <class T>
SFR_DEVICE T newton_step(Plan<T>& plan, T precision, int64_t max_iter, int64_t& n_iter) {
  constexpr T longest = 2;
  Team& team = plan.team;
  const T *alpha = plan.of_rows(row::alpha), *beta = plan.of_columns(column::beta);
  const auto missing = [](const Margin<T>& side, int i, T sum) {
    return side.weight[i] > 0 ? side.goal(i) - sum : T(0);
  };
  plan.each_row([&](int i) { plan.of_rows(row::right)[i] = missing(plan.row_margin, i, plan.of_rows(row::sum)[i]); });
  plan.each_column([&](int j) {
    plan.of_columns(column::right)[j] = missing(plan.column_margin, j, plan.of_columns(column::sum)[j]);
  });
  n_iter += 1 + solve_system(plan, precision, max_iter - n_iter - 1);
  T length = 0;
  plan.each_row([&](int i) { length = Max()(length, magnitude(alpha[i])); });
  plan.each_column([&](int j) { length = Max()(length, magnitude(beta[j])); });
  length = over_team<Max>(team, plan.board, length);
  const T factor = T(1 / ln2) * (length > longest ? longest / length : T(1));
  plan.each_row([&](int i) { plan.of_rows(row::scale)[i] = exp2_of(factor * alpha[i]); });
  plan.each_column([&](int j) { plan.of_columns(column::scale)[j] = exp2_of(factor * beta[j]); });
  team.sync();
  return factor;
}

template <class T>
SFR_DEVICE void undo_step(const Plan<T>& plan, T factor) {
  plan.each_row([&](int i) { plan.of_rows(row::log)[i] -= factor * plan.of_rows(row::alpha)[i]; });
  plan.each_column([&](int j) { plan.of_columns(column::log)[j] -= factor * plan.of_columns(column::beta)[j]; });
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

// From column::log to a plan within tol, or as far as max_iter goes.
template <class T>
SFR_DEVICE Solution<T> solve(Plan<T>& plan, const SolverOptions& options) {
  Solution<T> out;
  const T tol = T(options.tol);
  const int64_t max_iter = options.max_iter;
  const bool symmetric = options.symmetric;
  Relaxation<T> relaxation(options.method != Method::plain);
  const T gate = options.method == Method::automatic ? T(1e-2) : T(0);
  constexpr T finest = sizeof(T) == 4 ? T(1e-5) : T(1e-10);
  T precision = T(1e-2);
  int64_t rest = 16, resume = 0;  // no Newton step before iteration `resume`
  int64_t last = max_iter;
  enum Next { exactly, scaled };
  update_rows(plan);
  if (symmetric) meet_halfway(plan);
  T before = T(INFINITY);  // error before the last Newton step, or burst of symmetric iterations
  T factor = 0;            // of the Newton step; 0: none under way
  bool exact = true;
  for (Next next = exactly;;) {
    exact = next == exactly;
    if (exact) {
      out.plan = evaluate<From::potentials>(plan);
    } else {
      out.plan = evaluate<From::scalings>(plan);
      absorb(plan);
    }
    if (factor > 0) {
      // A shortened step moves mass along a path that only opens up on the way: the error may wait.
      const bool shortened = factor < T(1 / ln2);
      const bool failed = !(out.plan.error < before * (shortened ? T(1.2) : T(0.7)));
      if (failed) {
        if (precision > finest) {
          precision *= T(1e-2);
        } else {
          if (rest > 64 && before < rounding(plan)) last = out.n_iter;
          resume = out.n_iter + rest;
          rest *= 2;
        }
        undo_step(plan, factor);
        next = exactly;
      }
      factor = 0;
      if (failed) continue;
    }
    if (!(out.plan.error > tol) || out.n_iter >= last) {
      if (exact) return out;
      next = exactly;
    } else if (out.plan.cold) {
      ++out.n_iter;
      if (!symmetric) update_columns(plan);
      update_rows(plan);
      if (symmetric) meet_halfway(plan);
      next = exactly;
    } else if (symmetric) {
      if (stalls(out.plan.error, before)) return out;
      before = out.plan.error;
      scale_symmetric(plan, tol, max_iter, out.n_iter);
      absorb(plan);
      next = exactly;
    } else if (out.plan.error > gate || out.n_iter < resume) {
      const bool far = out.plan.error > gate;
      const int64_t limit = far || max_iter < resume ? max_iter : resume;
      const Burst burst = scale(plan, far ? gate : T(0), tol, limit, out.n_iter, relaxation);
      if (burst != Burst::stopped) absorb(plan);
      next = burst == Burst::stopped ? scaled : exactly;
    } else {
      before = out.plan.error;
      factor = newton_step(plan, precision, max_iter, out.n_iter);
      next = scaled;
    }
  }
}

}  // namespace sfr::cuda

// Solving one problem: the strategy says what is next, the passes do it.
#pragma once

#include "iterations.h"
#include "masses.h"
#include "newton.h"

namespace SFR_TARGET {

// The problem for eps times `by`, and columns' potentials for it.
template <class T>
SFR_FN void widen(Plan<T>& plan, T by) {
  plan.factor /= by;
  plan.shift /= by;
  plan.rows.eps_over_reach *= by;
  plan.columns.eps_over_reach *= by;
  plan.each_column([&](Index j) {
    const Vec<T> start = log_weight(plan.columns, j), log = load(plan.columns.log() + j);
    store(plan.columns.log() + j, start + kept(plan.columns, j, log - start) / by);
  });
  plan.sync();
}

template <class T>
struct Solution {
  int64_t n_iter = 0;
  Evaluation<T> plan;
};

// Within tol, small patches may still be far from their marginals: what they lack is little, but the gradients of their
// weights are their potentials. Those that the plan does not show follow the others in the log domain; what is left,
// mostly mass between small patches, takes a few Newton steps, or halvings. Returns the plan's evaluation.
template <class T>
SFR_FN Evaluation<T> refine(Plan<T>& plan, const SolverOptions& options, Evaluation<T> now, int64_t& n_iter) {
  constexpr int most_steps = 12, most_corrections = 16, most_updates = 2, halvings = 8;
  const bool symmetric = options.symmetric;
  if (plan.light && options.max_iter > 0) {
    SFR_ROLLED
    for (int k = 0; k < (symmetric ? 2 * halvings : most_updates); ++k) {
      if (!symmetric) plan.update_columns();
      plan.evaluate(symmetric ? From::halfway : From::columns);
    }
    if (plan.has_reach()) balance_masses(plan);
    now = plan.evaluate(From::potentials);
  }
  Step<T> step{Action::newton};
  step.precision = T(1e-4);
  step.limit = options.max_iter;
  const T tol = T(options.tol);
  if (symmetric) {
    constexpr T least = is_single<T> ? T(1e-5) : T(1e-12);
    T before = Number<T>::infinity;
    SFR_ROLLED
    while (now.relative > least && now.relative > 10 * tol && now.relative < before / 2 && n_iter < step.limit) {
      before = now.relative;
      SFR_ROLLED
      for (int n = 0; n < halvings; ++n) plan.scale_halfway(false);
      n_iter += halvings;
      plan.absorb();
      if (plan.has_reach()) balance_masses(plan);
      now = plan.evaluate(From::potentials);
    }
    return now;
  }
  const T most = tol > now.error ? tol : now.error * T(1.5);  // where rounding has kept it from tol
  SFR_ROLLED
  for (int k = 0; k < most_steps && now.relative > 10 * most && n_iter < step.limit; ++k) {
    if (options.method != Method::automatic) break;
    newton_step(plan, step, n_iter);
    Evaluation<T> next = plan.evaluate(From::scalings);
    // A plain iteration, and more where the step has cost the others something. On a long way the relative error grows
    // at first, as steps are cut.
    SFR_ROLLED
    for (int n = 1; n == 1 || (n <= most_corrections && !(next.error <= most)); n *= 4) {
      SFR_ROLLED
      for (int m = 0; m < n; ++m) {
        plan.scale_rows(false, T(1));
        plan.scale_columns(false, T(1));
      }
      n_iter += n;
      plan.absorb();
      if (plan.has_reach()) balance_masses(plan);
      next = plan.evaluate(From::potentials);
    }
    if (!(next.error <= most)) {
      undo_step(plan);
      return plan.evaluate(From::potentials);
    }
    now = next;
  }
  return now;
}

// From the columns' potentials to a plan within tol, or as far as max_iter goes. `spread`: the costs' deviation over
// eps, or 0 where the potentials are a start already.
template <class T>
SFR_FN Solution<T> solve(Plan<T>& plan, const SolverOptions& options, T spread) {
  SolverStrategy<T> strategy(options, spread);
  From from = strategy.start();
  T width = 1;
  SFR_ROLLED
  for (;;) {
    if (strategy.width() != width) {
      widen(plan, strategy.width() / width);
      width = strategy.width();
    }
    // Where the rows' potentials are still to follow, the masses are not known yet.
    if (plan.has_reach() && (from == From::potentials || from == From::scalings)) balance_masses(plan);
    const Evaluation<T> now = plan.evaluate(from);
    const Step<T> step = strategy.next(now, [&] { return rounding(plan); });
    from = strategy.after(step);
    switch (step.action) {
      case Action::finish: {
        const Evaluation<T> last = refine(plan, options, now, strategy.n_iter);
        return {strategy.n_iter, last};
      }
      case Action::evaluate:
      case Action::narrow:
        break;
      case Action::update:
        if (!options.symmetric) plan.update_columns();
        break;
      case Action::iterate: {
        const Stop stop = options.symmetric ? iterate_halfway(plan, step, strategy.n_iter)
                                            : iterate(plan, step, strategy.relaxation, strategy.n_iter);
        from = strategy.iterated(stop);
        if (from != From::scalings) plan.absorb();
        break;
      }
      case Action::newton:
        strategy.stepped(newton_step(plan, step, strategy.n_iter));
        break;
      case Action::undo:
        undo_step(plan);
        break;
    }
  }
}

}  // namespace SFR_TARGET

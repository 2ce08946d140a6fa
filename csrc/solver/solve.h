// Solving one problem: the strategy says what is next, the passes do it.
#pragma once

#include "iterations.h"
#include "masses.h"
#include "newton.h"
#include "refinement.h"

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

// From the columns' potentials to a plan within tol, or as far as max_iter goes. `spread`: the costs' deviation over
// eps, or 0 where the potentials are a start already.
template <class T>
SFR_FN Solution<T> solve(Plan<T>& plan, const SolverOptions& options, T spread) {
  SolverStrategy<T> strategy(options, spread);
  Refinement<T> refinement(options, plan.light);
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
    Step<T> step{Action::finish};
    if (!refinement.begun()) step = strategy.next(now, [&] { return rounding(plan); });
    if (step.action == Action::finish) step = refinement.next(now, strategy.n_iter);
    from = refinement.begun() ? refinement.after(step) : strategy.after(step);
    switch (step.action) {
      case Action::finish:
        return {strategy.n_iter, now};
      case Action::evaluate:
      case Action::narrow:
        break;
      case Action::update:
        if (!options.symmetric) plan.update_columns();
        break;
      case Action::iterate: {
        const Stop stop = options.symmetric ? iterate_halfway(plan, step, strategy.n_iter)
                                            : iterate(plan, step, strategy.relaxation, strategy.n_iter);
        if (!refinement.begun()) from = strategy.iterated(stop);
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

// Solving one problem: the strategy says what is next, the passes do it.
#pragma once

#include "iterations.h"
#include "masses.h"
#include "newton.h"
#include "options.h"
#include "refinement.h"

namespace SFR_TARGET {

// The problem for eps times `by`, and columns' potentials for it.
template <class T, template <class> class Plan>
SFR_FN void scale_eps(Plan<T>& plan, T by) {
  plan.factor /= by;
  plan.shift /= by;
  // Where there is none, the compiler is to see that it stays 0.
  if (plan.rows.has_reach()) plan.rows.eps_over_reach *= by;
  if (plan.columns.has_reach()) plan.columns.eps_over_reach *= by;
  plan.each_column([&](Index j) {
    const Vec<T> start = log_weight(plan.columns, j), log = load(plan.columns.log() + j);
    store(plan.columns.log() + j, start + kept(plan.columns, j, log - start) / by);
  });
  take_shift(plan);
  plan.sync();
}

// Columns' potentials to start from, where none are given.
template <class T, template <class> class Plan>
SFR_FN void start(Plan<T>& plan, bool symmetric) {
  plan.each_column([&](Index j) { store(plan.columns.log() + j, log_weight(plan.columns, j)); });
  if (!plan.has_reach()) return plan.sync();  // mutant: the next pass has a barrier before it reads; for those to come
  // 0 of the cost itself: where costs lie far beyond a reach, those of the centred cost would be far out.
  const T centre = plan.centre / 2 * plan.factor;
  shift_masses(plan, -plan.shift);
  plan.each_patch_of_columns([&](Index j) { plan.columns.log()[j] -= centre; });
  if (!symmetric) take_shift(plan);
  plan.sync();  // mutant: the next pass has a barrier before it reads; for those to come
}

// Keeps the columns' potentials, from which the rows' follow; the shift beside them.
template <class T, template <class> class Plan>
SFR_FN T hold(Plan<T>& plan) {
  plan.each_column([&](Index j) { store(plan.columns.before() + j, load(plan.columns.log() + j)); });
  return plan.shift;
}
template <class T, template <class> class Plan>
SFR_FN void take_back(Plan<T>& plan, T shift) {
  plan.each_column([&](Index j) { store(plan.columns.log() + j, load(plan.columns.before() + j)); });
  if (plan.has_reach()) shift_masses(plan, shift - plan.shift);
  plan.sync();
}

template <class T>
struct Solution {
  int64_t n_iter = 0;
  Evaluation<T> plan;
  T annealed_eps = 1;  // the eps it is of, in units of the problem's own
};

// From the columns' potentials to a plan within tol, or as far as max_iter goes. `apart`: over eps. `warm`: the
// potentials are a start that was given. `fixed`: eps may not give way.
template <class T, template <class> class Plan>
SFR_FN Solution<T> solve(Plan<T>& plan, const SolverOptions& options, CostRange<T> apart, bool warm, bool fixed) {
  SolverStrategy<T> strategy(options, apart, warm, fixed, plan.factorising_takes());
  Refinement<T> refinement(options, plan.light);
  const auto round_off = [&] { return rounding(plan); };
  struct {
    From from;
    T annealed_eps = 1, held = 0;
    bool retreats = false;
  } at{strategy.start()};
  SFR_IN_MEMORY(strategy);
  SFR_IN_MEMORY(refinement);
  SFR_IN_MEMORY(at);
  SFR_ROLLED
  for (;;) {
    if (strategy.annealed_eps() != at.annealed_eps) {
      if (strategy.held_eps() == at.annealed_eps) at.held = hold(plan);
      scale_eps(plan, strategy.annealed_eps() / at.annealed_eps);
      at.annealed_eps = strategy.annealed_eps();
      if (at.retreats) take_back(plan, at.held);
    }
    // Where the rows' potentials are still to follow, the masses are not known yet.
    if (plan.has_reach() && (at.from == From::potentials || at.from == From::scalings)) balance_masses(plan);
    Evaluation<T> now = plan.evaluate(at.from);
    if (plan.has_reach() && now.underflow && at.from == From::columns) {
      balance_masses(plan);
      at.from = From::potentials;
      now = plan.evaluate(at.from);
    }
    Step<T> step{Action::finish};
    if (!refinement.begun()) step = strategy.next(now, round_off);
    if (step.action == Action::finish) {
      step = refinement.next(now, strategy.n_iter);
      step.patience = Rules<T>::worth * strategy.price;
    }
    at.from = refinement.begun() ? refinement.after(step) : strategy.after(step);
    switch (step.action) {
      case Action::finish:
        return {strategy.n_iter, now, at.annealed_eps};
      case Action::evaluate:
      case Action::anneal:
        break;
      case Action::retreat:
        at.retreats = true;
        break;
      case Action::restart:
        start(plan, options.symmetric);
        break;
      case Action::update:
        if (!options.symmetric) plan.update_columns();
        break;
      case Action::iterate: {
        const Stop stop = options.symmetric ? iterate_halfway(plan, step, strategy.n_iter)
                                            : iterate(plan, step, strategy.relaxation, strategy.n_iter);
        if (!refinement.begun()) at.from = strategy.iterated(stop, round_off);
        if (at.from != From::scalings) plan.absorb();
        break;
      }
      case Action::newton: {
        const Stepped taken = newton_step(plan, step, strategy.n_iter);
        if (!refinement.begun()) at.from = strategy.stepped(taken);
        if (at.from != From::scalings) plan.absorb();
        break;
      }
      case Action::undo:
        undo_step(plan);
        break;
    }
  }
}

}  // namespace SFR_TARGET

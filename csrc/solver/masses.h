// The total mass of a problem with a reach: one slow mode of the iterations, which has a closed form.
#pragma once

#include "passes.h"
#include "strategy.h"

namespace SFR_TARGET {

// Adds `by`, in powers of two, to all potentials of the rows and takes it from those of the columns. No entry of the
// plan changes, so the potentials stay as they are: a number beside them holds it, and no rounding meets it.
template <class T, template <class> class Plan>
SFR_FN void shift_masses(Plan<T>& plan, T by) {
  plan.shift += by;
  plan.rows.offset = plan.rows.centre + plan.rows.eps_over_reach * plan.shift;
  plan.columns.offset = plan.columns.centre - plan.columns.eps_over_reach * plan.shift;
}

// What rounding leaves of the targets that a shift moves.
template <class T, template <class> class Plan>
SFR_FN T rounding_of_shift(const Plan<T>& plan) {
  const T rows = plan.rows.eps_over_reach, columns = plan.columns.eps_over_reach;
  return magnitude((rows > columns ? rows : columns) * plan.shift) * Number<T>::epsilon;
}

// What the columns' potentials have in common, which may be large, goes to where no rounding meets it: nothing follows
// from it in a balanced problem, and elsewhere it is a shift. It is that of the column nearest to 0, so that no outlier
// moves it. One of up to `least`, in powers of two, stays.
template <class T, template <class> class Plan>
SFR_FN void take_shift(Plan<T>& plan, T least = 0) {
  const Marginal<T>& columns = plan.columns;
  T nearest[2];  // from below, and negative from above
  plan.template reduce_columns<Max>(nearest, [&](Index j, Vec<T>(&found)[2]) {
    const Vec<T> none = splat<T>(-Number<T>::infinity), x = load(columns.log() + j) - log_weight(columns, j);
    found[0] = vmax<T>(found[0], kept(columns, j, splat<T>(1)) > 0 ? (x > 0 ? none : x) : none);
    found[1] = vmax<T>(found[1], kept(columns, j, splat<T>(1)) > 0 ? (x > 0 ? -x : none) : none);
  });
  const T common = nearest[0] > nearest[1] ? nearest[0] : -nearest[1];
  if (!finite(common) || magnitude(common) <= least) return;
  plan.each_patch_of_columns([&](Index j) { columns.log()[j] -= common; });
  if (plan.has_reach()) shift_masses(plan, -common);
}

// The dual value is largest in such a shift where the masses of both targets, A = sum_i a_i exp(-f_i / reach_a) and B
// alike, are equal: s = ln(A / B) / (1 / reach_a + 1 / reach_b) (Sejourne, Vialard and Peyre, 2022).
template <class T, template <class> class Plan>
SFR_FN void balance_masses(Plan<T>& plan) {
  const auto target = [](const Marginal<T>& side, Index i, Vec<T>(&sums)[1]) {
    const Vec<T> log = load(side.log() + i) + log2<T>(load(side.scale() + i));
    sums[0] += side.has_reach() ? kept(side, i, side.target_under_reach(log_weight(side, i), log)) : mass_at(side, i);
  };
  T of_rows[1], of_columns[1];
  plan.template reduce_rows<Sum>(of_rows, [&](Index i, Vec<T>(&sums)[1]) { target(plan.rows, i, sums); });
  plan.template reduce_columns<Sum>(of_columns, [&](Index j, Vec<T>(&sums)[1]) { target(plan.columns, j, sums); });
  const T eps_over_reaches = plan.rows.eps_over_reach + plan.columns.eps_over_reach;
  const T by = (log2_of(of_rows[0]) - log2_of(of_columns[0])) / eps_over_reaches;
  if (!finite(by)) return;
  shift_masses(plan, by);
  const auto move_target = [](const Marginal<T>& side, Index i, T moved) {
    // Outside of the kept patches no target moves.
    const Vec<T> inside = kept(side, i, splat<T>(1)), factor = exp2<T>(splat<T>(moved));
    if (side.has_reach()) store(side.reach_target + i, load(side.reach_target + i) * (inside * factor + (1 - inside)));
  };
  plan.each_row([&](Index i) { move_target(plan.rows, i, -plan.rows.eps_over_reach * by); });
  plan.each_column([&](Index j) { move_target(plan.columns, j, plan.columns.eps_over_reach * by); });
  plan.sync();
}

}  // namespace SFR_TARGET

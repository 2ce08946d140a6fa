// One transport problem from its weights and costs, which lie in its plan, to its outputs, and back.
#pragma once

#include "adjoint.h"
#include "masses.h"
#include "options.h"
#include "solve.h"

namespace SFR_TARGET {

// Sums of both sides' weights as they were given.
template <class T>
struct Totals {
  T a = 1, b = 1;
};

// Sets what the plan's exponents are made of, and the masses of sides with a reach.
template <class T>
SFR_FN void set_scale(Plan<T>& plan, const SolverOptions& options, Totals<T> totals, T mean, T eps) {
  plan.mean = mean;
  plan.shift = 0;
  plan.factor = eps > 0 ? 1 / (eps * T(ln2)) : T(0);
  if (options.reach_a > 0) {
    plan.rows.set_reach(T(options.reach_a), eps, mean, totals.a);
    plan.each_patch_of_rows([&](Index i) { scale_weight(plan.rows, i, totals.a); });
  }
  if (options.reach_b > 0) {
    plan.columns.set_reach(T(options.reach_b), eps, mean, totals.b);
    plan.each_patch_of_columns([&](Index j) { scale_weight(plan.columns, j, totals.b); });
  }
}

// Potentials, with the marginals, from those of problem p as they are returned; no `from`: 0.
template <class T>
SFR_FN void set_rows(Plan<T>& plan, const void* from, int64_t p) {
  const T* f = static_cast<const T*>(from) + p * plan.all_rows;
  plan.each_row([&](Index i) { store(plan.rows.log() + i, log_weight(plan.rows, i)); });
  plan.each_patch_of_rows([&](Index i) { plan.rows.log()[i] += f[plan.row_index(i)] * plan.factor; });
}
template <class T>
SFR_FN void set_columns(Plan<T>& plan, const void* from, int64_t p, T centre) {
  const T* g = static_cast<const T*>(from) + p * plan.all_columns;
  plan.each_column([&](Index j) { store(plan.columns.log() + j, log_weight(plan.columns, j)); });
  if (from)
    plan.each_patch_of_columns(
        [&](Index j) { plan.columns.log()[j] += (g[plan.column_index(j)] - centre) * plan.factor; });
}

// What the columns' potentials have in common, which may be large, goes to where no rounding meets it.
template <class T>
SFR_FN void take_shift(Plan<T>& plan) {
  const Marginal<T>& columns = plan.columns;
  const T sum = plan.sum_patches_of_columns([&](Index j) { return columns.log()[j] - log_weight_of(columns, j); });
  const T common = sum / T(plan.kept_columns);
  if (!finite(common)) return;
  plan.each_patch_of_columns([&](Index j) { columns.log()[j] -= common; });
  shift_masses(plan, -common);
}

// Potentials of 0 of the cost itself: where costs lie far beyond a reach, those of the centred cost would be far out.
template <class T>
SFR_FN void start_at_zero(Plan<T>& plan) {
  const T centre = plan.mean / 2 * plan.factor;
  plan.each_patch_of_columns([&](Index j) { plan.columns.log()[j] -= centre; });
}

// Everything about an empty problem is 0.
template <class T>
SFR_FN void put_nothing(const Plan<T>& plan, const Solve& out, int64_t p) {
  plan.fill_rows(static_cast<T*>(out.f) + p * plan.all_rows, T(0));
  if (plan.has_columns()) plan.fill_columns(static_cast<T*>(out.g) + p * plan.all_columns, T(0));
  if (!plan.reports()) return;
  const auto put = [p](void* to) { static_cast<T*>(to)[p] = 0; };
  put(out.transport);
  put(out.entropic);
  put(out.eps);
  put(out.mean);
  put(out.shift);
  put(out.excess);
  put(out.error);
  out.n_iter[p] = 0;
}

// Solves problem p. `sound`: its weights are what weights should be.
template <class T>
SFR_FN void problem_forward(Plan<T>& plan, const Solve& out, Totals<T> totals, bool sound, int64_t p) {
  if (sound && plan.empty()) return put_nothing(plan, out, p);
  const Spread<T> spread = spread_of(plan);
  const T eps = regularisation(out, spread, p), nan = Number<T>::nan;
  sound = sound && finite(spread.mean) && finite(spread.deviation) && finite(eps);
  Solution<T> solution;
  if (sound) {
    set_scale(plan, out.options, totals, spread.mean, eps);
    set_columns(plan, out.init_g, p, spread.mean / 2);
    if (plan.has_reach()) {
      if (!out.init_g) start_at_zero(plan);
      if (!out.options.symmetric) take_shift(plan);
    }
    plan.each_row([&](Index i) { store(plan.rows.scale() + i, splat<T>(1)); });
    plan.each_column([&](Index j) { store(plan.columns.scale() + j, splat<T>(1)); });
    plan.sync();
    solution = solve(plan, out.options, eps > 0 && !out.init_g ? spread.deviation / eps : T(0));
  }

  // A side's potentials, and what they add to the dual value.
  const auto put_potential = [&](const Marginal<T>& side, Index i, T* to) {
    const T bare = (side.log()[i] - log_weight_of(side, i)) * T(ln2), f = sound ? bare * eps : nan;
    if (to) *to = f;
    if (!side.has_reach()) return side.weight[i] * f;
    return -side.weight[i] * side.reach(eps) * expm1_of(-side.over_reach(bare));
  };
  T *f = static_cast<T*>(out.f) + p * plan.all_rows, *g = static_cast<T*>(out.g) + p * plan.all_columns;
  plan.clear_removed_rows(f);
  if (plan.has_columns()) plan.clear_removed_columns(g);
  T dual = plan.sum_patches_of_rows([&](Index i) { return put_potential(plan.rows, i, f + plan.row_index(i)); });
  dual += plan.sum_patches_of_columns(
      [&](Index j) { return put_potential(plan.columns, j, plan.has_columns() ? g + plan.column_index(j) : nullptr); });
  // Side by side and patch by patch: a sum near 1 would round away what it differs by.
  const auto over = [](const Marginal<T>& side, const Marginal<T>& other, Index i) {
    return side.sum()[i] - side.weight[i] * other.total;
  };
  T excess = plan.sum_patches_of_rows([&](Index i) { return over(plan.rows, plan.columns, i); });
  excess = (excess + plan.sum_patches_of_columns([&](Index j) { return over(plan.columns, plan.rows, j); })) / 2;
  if (!plan.reports()) return;
  const auto put = [&](void* to, T value) { static_cast<T*>(to)[p] = sound ? value : nan; };
  const T shift = plan.shift * eps * T(ln2);
  T centre = 0;
  if (!plan.rows.has_reach()) centre += spread.mean / 2 + shift;
  if (!plan.columns.has_reach()) centre += spread.mean / 2 - shift;
  put(out.transport, solution.plan.value);
  put(out.entropic, dual + centre - eps * excess);
  put(out.eps, eps);
  put(out.mean, spread.mean);
  put(out.shift, shift);
  put(out.excess, excess);
  put(out.error, solution.plan.error);
  out.n_iter[p] = solution.n_iter;
}

// A problem that holds a NaN is NaN everywhere.
template <class T>
SFR_FN bool is_sound(const SolveGrad& grad, int64_t p) {
  return finite(static_cast<const T*>(grad.mean)[p]);
}

// Leaves d/dC of problem p in the plan, and writes the gradients of weights and eps. One that is not sound has no d/dC.
template <class T>
SFR_FN void problem_backward(Plan<T>& plan, const SolveGrad& grad, Totals<T> totals, int64_t p) {
  T* out_a = grad.grad_a ? static_cast<T*>(grad.grad_a) + p * plan.all_rows : nullptr;
  T* out_b = grad.grad_b && plan.has_columns() ? static_cast<T*>(grad.grad_b) + p * plan.all_columns : nullptr;
  T* out_eps = grad.grad_eps_given ? static_cast<T*>(grad.grad_eps_given) + p : nullptr;
  if (!is_sound<T>(grad, p)) {
    if (out_a) plan.fill_rows(out_a, Number<T>::nan);
    if (out_b) plan.fill_columns(out_b, Number<T>::nan);
    if (out_eps && plan.reports()) *out_eps = Number<T>::nan;
    return;
  }
  if (plan.empty()) {
    if (out_a) plan.fill_rows(out_a, T(0));
    if (out_b) plan.fill_columns(out_b, T(0));
    if (out_eps && plan.reports()) *out_eps = 0;
    plan.clear();
    return;
  }
  const auto at = [p](const void* in) { return in ? static_cast<const T*>(in)[p] : T(0); };
  const T mean = at(grad.mean), eps = at(grad.eps);
  set_scale(plan, grad.options, totals, mean, eps);
  shift_masses(plan, at(grad.shift) * plan.factor);
  set_rows(plan, grad.f, p);
  set_columns(plan, grad.g, p, T(0));
  plan.sync();
  const Upstream<T> up{at(grad.grad_transport), at(grad.grad_entropic), at(grad.grad_eps)};
  const bool relative = grad.options.relative && !grad.eps_given;
  const T slope = adjoint_backward(plan, up, eps, relative, T(grad.options.eps));
  if (out_eps && plan.reports()) *out_eps = slope;

  // Through the normalisation a = w / sum(w), which a side with a reach does without.
  const auto along = [](const Marginal<T>& side, Index i) { return side.weight[i] * side.gradient()[i]; };
  const auto through = [](const Marginal<T>& side, Index i, T along, T total) {
    const T gradient = side.gradient()[i];
    return side.has_reach() ? gradient : (gradient - along) / total;
  };
  if (out_a) {
    const T mean_a = plan.sum_patches_of_rows([&](Index i) { return along(plan.rows, i); });
    plan.clear_removed_rows(out_a);
    plan.each_patch_of_rows([&](Index i) { out_a[plan.row_index(i)] = through(plan.rows, i, mean_a, totals.a); });
  }
  if (out_b) {
    const T mean_b = plan.sum_patches_of_columns([&](Index j) { return along(plan.columns, j); });
    plan.clear_removed_columns(out_b);
    plan.each_patch_of_columns(
        [&](Index j) { out_b[plan.column_index(j)] = through(plan.columns, j, mean_b, totals.b); });
  }
}

}  // namespace SFR_TARGET

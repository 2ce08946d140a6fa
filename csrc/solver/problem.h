// One transport problem from its weights and costs, which lie in its plan, to its outputs, and back.
#pragma once

#include "adjoint.h"
#include "masses.h"
#include "options.h"
#include "solve.h"

namespace SFR_TARGET {

// Sums of both sides' weights as they were given, as far as the type goes, and what one is divided by them.
template <class T>
struct Totals {
  T a = 1, b = 1, per_a = 1, per_b = 1;
};

// Sets what the plan's exponents are made of, and the masses of sides with a reach.
template <class T, template <class> class Plan>
SFR_FN void set_scale(Plan<T>& plan, const SolverOptions& options, Totals<T> totals, T centre, T eps) {
  plan.centre = centre;
  plan.shift = 0;
  plan.factor = eps > 0 ? 1 / (eps * T(ln2)) : T(0);
  if (options.reach_a > 0) {
    plan.rows.set_reach(reach_of(options.reach_a, eps), eps, centre, totals.a);
    plan.each_patch_of_rows([&](Index i) { scale_weight(plan.rows, i, totals.a); });
  }
  if (options.reach_b > 0) {
    plan.columns.set_reach(reach_of(options.reach_b, eps), eps, centre, totals.b);
    plan.each_patch_of_columns([&](Index j) { scale_weight(plan.columns, j, totals.b); });
  }
}

// Potentials, with the marginals, from those of problem p as they are returned.
template <class T, template <class> class Plan>
SFR_FN void set_rows(Plan<T>& plan, const void* from, int64_t p) {
  const T* f = static_cast<const T*>(from) + p * plan.all_rows;
  plan.each_row([&](Index i) { store(plan.rows.log() + i, log_weight(plan.rows, i)); });
  plan.each_patch_of_rows([&](Index i) { plan.rows.log()[i] += f[plan.row_index(i)] * plan.factor; });
}
template <class T, template <class> class Plan>
SFR_FN void set_columns(Plan<T>& plan, const void* from, int64_t p, T centre) {
  const T* g = static_cast<const T*>(from) + p * plan.all_columns;
  plan.each_column([&](Index j) { store(plan.columns.log() + j, log_weight(plan.columns, j)); });
  plan.each_patch_of_columns(
      [&](Index j) { plan.columns.log()[j] += (g[plan.column_index(j)] - centre) * plan.factor; });
}

// Everything about an empty problem is 0. One without a plan has `value` inf instead.
template <class T, template <class> class Plan>
SFR_FN void put_nothing(const Plan<T>& plan, const Solve& out, int64_t p, T value = 0) {
  plan.fill_rows(static_cast<T*>(out.f) + p * plan.all_rows, T(0));
  if (plan.has_columns()) plan.fill_columns(static_cast<T*>(out.g) + p * plan.all_columns, T(0));
  if (!plan.reports()) return;
  const auto put = [p](void* to, T x) { static_cast<T*>(to)[p] = x; };
  put(out.transport, value);
  put(out.entropic, value);
  put(out.eps, T(0));
  put(out.centre, value);
  put(out.shift, T(0));
  put(out.excess, T(0));
  put(out.error, value);
  out.n_iter[p] = 0;
}

// Solves problem p. `sound`: its weights are what weights should be.
template <class T, template <class> class Plan>
SFR_FN void problem_forward(Plan<T>& plan, const Solve& out, Totals<T> totals, bool sound, int64_t p) {
  if (sound && plan.empty()) return put_nothing(plan, out, p);
  const Spread<T> spread = spread_of(plan, out.options);
  if (sound && spread.sound && !spread.feasible) return put_nothing(plan, out, p, Number<T>::infinity);
  SFR_IN_MEMORY(spread);
  const T nan = Number<T>::nan;
  T eps = regularisation(out, spread, p);
  sound = sound && spread.sound && finite(spread.centre) && finite(eps);
  Solution<T> solution;
  if (sound) {
    CostRange<T> apart;
    if (eps > 0) apart = how_far_apart(plan, spread, out.options, eps);
    if (!out.eps_given && eps > 0 && eps < out_of_sight<T> * apart.near) eps = out_of_sight<T> * apart.near;
    set_scale(plan, out.options, totals, spread.centre, eps);
    bool warm = out.init_g != nullptr;
    if (warm) {
      set_columns(plan, out.init_g, p, spread.centre / 2);
      // Without a reach only one that would round: a start that is the solution is to stay what it is, to the bit.
      const T least = plan.has_reach() ? T(0) : T(out.options.tol) / (8 * Number<T>::epsilon);
      if (!out.options.symmetric) take_shift(plan, least);
      warm = !(rounding_of_shift(plan) > T(1e-3));
    }
    if (!warm) start(plan, out.options.symmetric);
    plan.each_row([&](Index i) { store(plan.rows.scale() + i, splat<T>(1)); });
    plan.each_column([&](Index j) { store(plan.columns.scale() + j, splat<T>(1)); });
    plan.sync();  // mutant: the next pass has a barrier before it reads; for those to come
    if (eps > 0) apart = {apart.near / eps, apart.far / eps, apart.moved};
    solution = solve(plan, out.options, apart, warm, out.eps_given != nullptr);
    eps *= solution.annealed_eps;
  }

  // An eps of 0 stands for equal costs: then potentials hold their mean, and nothing else.
  const T mean = eps > 0 ? T(0) : spread.mean / 2;
  // A side's potentials, and what they add to the dual value.
  const auto put_potential = [&](const Marginal<T>& side, Index i, T* to) {
    // Of a patch that has no pair, and is left behind, it is beyond all bounds.
    constexpr T most = Number<T>::largest / 4;
    const T bare = (side.log()[i] - log_weight_of(side, i)) * T(ln2), f = sound ? bare * eps + mean : nan;
    if (to) *to = f > most ? most : f;
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
  if (!plan.rows.has_reach()) centre += spread.centre / 2 + shift;
  if (!plan.columns.has_reach()) centre += spread.centre / 2 - shift;
  put(out.transport, solution.plan.value);
  put(out.entropic, dual + centre - eps * excess);
  put(out.eps, eps);
  put(out.centre, spread.centre);
  put(out.shift, shift);
  put(out.excess, excess);
  put(out.error, solution.plan.error);
  out.n_iter[p] = solution.n_iter;
}

// A problem that holds a NaN is NaN everywhere, and its centre is.
template <class T>
SFR_FN bool is_sound(const SolveGrad& grad, int64_t p) {
  const T centre = static_cast<const T*>(grad.centre)[p];
  return centre == centre;
}

// Leaves d/dC of problem p in the plan, and writes the gradients of weights and eps. One that is not sound has no d/dC.
template <class T, template <class> class Plan>
SFR_FN void problem_backward(Plan<T>& plan, const SolveGrad& grad, Totals<T> totals, int64_t p) {
  T* out_a = grad.grad_a ? static_cast<T*>(grad.grad_a) + p * plan.all_rows : nullptr;
  T* out_b = grad.grad_b && plan.has_columns() ? static_cast<T*>(grad.grad_b) + p * plan.all_columns : nullptr;
  T* out_eps = grad.grad_eps_given ? static_cast<T*>(grad.grad_eps_given) + p : nullptr;
  if (!is_sound<T>(grad, p)) {
    if (out_a) plan.fill_rows(out_a, Number<T>::nan);
    if (out_b) plan.fill_columns(out_b, Number<T>::nan);
    if (out_eps && plan.reports()) *out_eps = Number<T>::nan;
    plan.clear();
    return;
  }
  if (plan.empty() || !finite(static_cast<const T*>(grad.centre)[p])) {
    if (out_a) plan.fill_rows(out_a, T(0));
    if (out_b) plan.fill_columns(out_b, T(0));
    if (out_eps && plan.reports()) *out_eps = 0;
    plan.clear();
    return;
  }
  const auto at = [p](const void* in) { return in ? static_cast<const T*>(in)[p] : T(0); };
  const T eps = at(grad.eps);
  const bool relative = grad.options.relative && !grad.eps_given;
  Spread<T> spread;
  if (relative) spread = spread_of(plan, grad.options);
  set_scale(plan, grad.options, totals, at(grad.centre), eps);
  shift_masses(plan, at(grad.shift) * plan.factor);
  set_rows(plan, grad.f, p);
  set_columns(plan, grad.g, p, T(0));
  plan.sync();  // mutant: the next pass has a barrier before it reads; for those to come
  const Upstream<T> up{at(grad.grad_transport), at(grad.grad_entropic), at(grad.grad_eps)};
  const T slope = adjoint_backward(plan, up, eps, relative ? &spread : nullptr);
  if (out_eps && plan.reports()) *out_eps = slope;

  // Through the normalisation a = w / sum(w), which a side with a reach does without.
  const auto along = [](const Marginal<T>& side, Index i) { return side.weight[i] * side.gradient()[i]; };
  const auto through = [](const Marginal<T>& side, Index i, T along, T per_total) {
    const T gradient = side.gradient()[i];
    return side.has_reach() ? gradient : (gradient - along) * per_total;
  };
  if (out_a) {
    const T mean_a = plan.sum_patches_of_rows([&](Index i) { return along(plan.rows, i); });
    plan.clear_removed_rows(out_a);
    plan.each_patch_of_rows([&](Index i) { out_a[plan.row_index(i)] = through(plan.rows, i, mean_a, totals.per_a); });
  }
  if (out_b) {
    const T mean_b = plan.sum_patches_of_columns([&](Index j) { return along(plan.columns, j); });
    plan.clear_removed_columns(out_b);
    plan.each_patch_of_columns(
        [&](Index j) { out_b[plan.column_index(j)] = through(plan.columns, j, mean_b, totals.per_b); });
  }
}

}  // namespace SFR_TARGET

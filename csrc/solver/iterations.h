// Sinkhorn iterations of one problem on the scalings, over-relaxed: the updates of one entry, which the passes apply,
// and the loop around them.
#pragma once

#include "marginal.h"
#include "strategy.h"

namespace SFR_TARGET {

template <class T>
SFR_INLINE Vec<T> in_range(Vec<T> x) {
  constexpr T most = Rules<T>::most_scale, least = 1 / most;
  const Vec<T> above = x < least ? splat<T>(least) : x;  // both ways at once: no branch
  return x > most ? splat<T>(most) : above;
}

template <class T>
SFR_INLINE Vec<T> is_at_edge(Vec<T> x) {
  constexpr T most = Rules<T>::most_scale / 2;
  return ((x > most) | (x < 1 / most)) ? splat<T>(1) : Vec<T>{};
}

// x (w / (x s))^omega by the [1/1] Pade approximant about 1, which needs no power; the plain w / s where the ratio is
// far from 1. One division either way. Kept in range. A target that comes towards w as x grows takes a smaller power,
// by logarithms. Where both masses are next to nothing x stays: the plan does not show what they are.
template <class T>
SFR_INLINE Vec<T> relaxed(const Marginal<T>& side, Vec<T> x, Vec<T> s, Vec<T> w, T omega) {
  const Vec<T> have = x * s;
  const auto near = (have > w * T(0.5)) & (have < w * T(2));
  const auto nothing = (have < side.nothing()) & (w < side.nothing());
  if (side.has_reach()) {
    const Vec<T> power = log2<T>(in_range<T>(quotient<T>(w, have)));
    const Vec<T> next = in_range<T>(x * exp2<T>(power * ((near ? splat<T>(omega) : splat<T>(1)) / side.gain())));
    return nothing ? x : next;
  }
  const Vec<T> above = x * ((1 + omega) * w - (omega - 1) * have), below = (1 + omega) * have - (omega - 1) * w;
  const Vec<T> next = in_range<T>(quotient<T>(near ? above : w, near ? below : s));
  return nothing ? x : next;
}

// Until the plan's marginals are within step.error (by the sums at hand), the scalings are at the edge of their range,
// the iterations are used up, or the error is below the gate and what was asked for is not near. The last column update
// is always a plain one, so that the plan leaves with its mass whole.
template <class Plan, class T>
SFR_FN Stop iterate_products(Plan& plan, const Step<T>& step, Relaxation<T>& relaxation, int64_t& n_iter) {
  constexpr int every = Rules<T>::sampled_every;
  static_assert(Relaxation<T>::window % every == 0);
  ErrorSample<T> columns;
  T last = 0;
  SFR_ROLLED
  for (int n = 1;; ++n) {
    ++n_iter;
    const T omega = step.plain ? T(1) : relaxation.factor();
    const bool sample = n % every == 0 || n_iter >= step.limit;
    const ErrorSample<T> rows = plan.scale_rows(sample, omega);
    if (!sample) {
      const bool next = n % every == every - 1 || n_iter + 1 >= step.limit;  // for the sample of the rows
      const ErrorSample<T> left = plan.scale_columns(next, omega);
      if (next) columns = left;
      continue;
    }
    const T error = error_of_both(plan.rows, plan.columns, rows.error, columns.error, rows.mass);
    const bool at_edge = rows.at_edge || columns.at_edge, reached = !(error > step.error);
    const bool below = error < step.gate && !iterations_are_as_fast(error, last, step.error);
    const bool stop = reached || n_iter >= step.limit || at_edge || below;
    last = error;
    plan.scale_columns(false, stop ? T(1) : omega);
    if (stop) return at_edge ? Stop::at_edge : reached ? Stop::reached : Stop::ended;
    if (n % Relaxation<T>::window == 0) relaxation.observe(error);
    if (plan.has_reach()) balance_masses(plan);
  }
}

// The same by the fastest products that the plan has; what the loop counts is its own meanwhile.
template <class Plan, class T>
SFR_FN Stop iterate(Plan& plan, const Step<T>& step, Relaxation<T>& relaxation, int64_t& n_iter) {
  struct Done {
    Stop stop;
    Relaxation<T> relaxation;
    int64_t n_iter;
  };
  const Done done = plan.with_products([step, relaxation, n_iter](auto& products) SFR_INLINED {
    Done now{Stop::ended, relaxation, n_iter};
    now.stop = iterate_products(products, step, now.relaxation, now.n_iter);
    return now;
  });
  relaxation = done.relaxation;
  n_iter = done.n_iter;
  return done.stop;
}

// A symmetric problem: v <- sqrt(v w / (P v)), which is the mean of a potential and its update, until the marginal is
// within step.error, at the edge of the scalings' range, or no longer gets nearer. Leaves v in both scalings.
template <class Plan, class T>
SFR_FN Stop iterate_halfway(Plan& plan, const Step<T>& step, int64_t& n_iter) {
  T last = Number<T>::infinity;
  SFR_ROLLED
  for (int n = 1;; ++n) {
    ++n_iter;
    const bool sample = n % Rules<T>::sampled_every == 0 || n_iter >= step.limit;
    const ErrorSample<T> seen = plan.scale_halfway(sample);
    if (!sample) continue;
    const T error = error_of_both(plan.rows, plan.columns, seen.error, seen.error, seen.mass);
    if (seen.at_edge) return Stop::at_edge;
    if (!(error > step.error)) return Stop::reached;
    if (stalls(error, last) || n_iter >= step.limit) return Stop::ended;
    last = error;
  }
}

}  // namespace SFR_TARGET

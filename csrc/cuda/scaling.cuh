// Sinkhorn iterations of one problem in the scaling domain, over-relaxed, and the log-domain updates for potentials
// that scalings cannot reach. The rules are those of csrc/cpu/scaling.h.
#pragma once

#include "plan.cuh"

namespace sfr::cuda {

// Mean and standard deviation of the cost under a (x) b. The deviation is taken in units of the largest, so that
// nothing overflows or underflows on the way.
template <class T>
struct Spread {
  T mean, largest, deviation;
};

template <class T>
SFR_DEVICE Spread<T> measure(Plan<T>& plan) {
  const T *a = plan.row_margin.weight, *b = plan.column_margin.weight;
  const auto cost = [&](int i, int j) { return plan.cost[int64_t(i) * plan.ld + j]; };
  Spread<T> out;
  T sum = 0;
  plan.each_entry([&](int i, int j) { sum += a[i] * b[j] * cost(i, j); });
  out.mean = over_team<Sum>(plan.team, plan.board, sum);
  T most = 0;
  plan.each_entry([&](int i, int j) {
    const T d = magnitude(cost(i, j) - out.mean);
    if (a[i] > 0 && b[j] > 0 && d > most) most = d;
  });
  out.largest = over_team<Max>(plan.team, plan.board, most);
  const T unit = out.largest > 0 ? out.largest : T(1);
  sum = 0;
  plan.each_entry([&](int i, int j) {
    const T d = (cost(i, j) - out.mean) / unit;
    sum += a[i] * b[j] * d * d;
  });
  out.deviation = unit * sqrt_of(over_team<Sum>(plan.team, plan.board, sum));
  return out;
}

template <class T>
SFR_DEVICE T exponent(const Plan<T>& plan, T log, int i, int j) {
  return log - (plan.cost[int64_t(i) * plan.ld + j] - plan.mean) * plan.factor;
}

// Update of the potential at i from a sum 2^most * sum over the other side: log2 a - log2 of it, or less with a reach.
template <class T>
SFR_DEVICE T updated(const Margin<T>& side, int i, T most, T sum) {
  const T w = side.weight[i];
  if (!(w > 0)) return Max::nothing<T>();
  if (side.soft > 0) return log2_of(w) - (most + log2_of(sum) + side.offset) / side.gain();
  return log2_of(w) - most - log2_of(sum);
}

// Exact update of F in the log domain: F_i = log2 a_i - log2 sum_j 2^(G_j - S_ij).
template <class T>
SFR_DEVICE void update_rows(Plan<T>& plan) {
  const T* G = plan.of_columns(column::log);
  T *most = plan.of_rows(row::sum), *F = plan.of_rows(row::log);
  row_terms<Max>(plan, [&](int i, int j) { return exponent(plan, G[j], i, j); }, [&](int i, T x) { most[i] = x; });
  plan.team.sync();
  row_terms<Sum>(
      plan, [&](int i, int j) { return exp2_of(exponent(plan, G[j], i, j) - most[i]); },
      [&](int i, T sum) { F[i] = updated(plan.row_margin, i, most[i], sum); });
  plan.team.sync();
}

// Exact update of G: G_j = log2 b_j - log2 sum_i 2^(F_i - S_ij).
template <class T>
SFR_DEVICE void update_columns(Plan<T>& plan) {
  const T* F = plan.of_rows(row::log);
  T *most = plan.of_columns(column::sum), *G = plan.of_columns(column::log);
  column_terms<Max>(plan, [&](int i, int j) { return exponent(plan, F[i], i, j); });
  exchange_columns<Max>(plan);
  each_column_sum<Max>(plan, [&](int j, T x) { most[j] = x; });
  plan.team.sync();
  column_terms<Sum>(plan, [&](int i, int j) { return exp2_of(exponent(plan, F[i], i, j) - most[j]); });
  exchange_columns<Sum>(plan);
  each_column_sum<Sum>(plan, [&](int j, T sum) { G[j] = updated(plan.column_margin, j, most[j], sum); });
  plan.team.sync();
}

// The factor of over-relaxation, from the contraction seen; see csrc/cpu/scaling.h for the rule and its sources. Every
// thread holds the same one.
template <class T>
class Relaxation {
 public:
  SFR_DEVICE explicit Relaxation(bool on) : on_(on) {}

  SFR_DEVICE T factor() const { return factor_; }

  // Would iterations bring this error below tol as soon as Newton steps, each of which squares it and costs twenty?
  // `last` is the error four iterations ago.
  static SFR_DEVICE bool soon(T error, T last, T tol) {
    const T fall = error / last;
    T iterated = error;
#pragma unroll 1
    for (T squared = error; squared > tol; squared *= squared) iterated *= fall * fall * fall * fall * fall;
    return iterated <= tol;
  }

  // The error after `window` more iterations.
  SFR_DEVICE void observe(T error) {
    if (!on_) return;
    const T before = last_;
    last_ = error;
    if (!(before > 0)) return;
    if (factor_ > 1 && error > before) {
      factor_ = 1;
      ceiling_ = 1 + (ceiling_ - 1) * T(0.9);
    } else if (error < T(0.3) && error > 0) {
      T rate = error / before;
#pragma unroll 1
      for (int k = 1; k < window; k *= 2) rate = sqrt_of(rate);
      if (rate > T(0.9999)) rate = T(0.9999);
      if (rate > factor_ - 1 + T(1e-3)) {
        T lambda = (rate + factor_ - 1) * (rate + factor_ - 1) / (rate * factor_ * factor_);
        if (lambda > T(0.9999)) lambda = T(0.9999);
        const T best = 2 / (1 + sqrt_of(1 - lambda));
        if (best > factor_) factor_ = best;
        if (factor_ > ceiling_) factor_ = ceiling_;
      }
    }
  }

  static constexpr int window = 8;  // a power of two

 private:
  bool on_;
  T factor_ = 1, ceiling_ = T(1.95), last_ = 0;
};

template <class T>
constexpr T most_scale = sizeof(T) == 4 ? T(1073741824) : T(1.7e72);  // 2^30, about 2^240

template <class T>
SFR_DEVICE T in_range(T x) {
  return x > most_scale<T> ? most_scale<T> : x > 1 / most_scale<T> ? x : 1 / most_scale<T>;
}

// x (w / (x s))^omega by the [1/1] Pade approximant about 1, which needs no power; the plain w / s where the ratio is
// far from 1. One division either way. Kept in range.
template <class T>
SFR_DEVICE T relaxed(T x, T s, T w, T omega) {
  const T have = x * s;
  const bool near = have > w * T(0.5) && have < w * T(2);
  const T above = near ? x * ((1 + omega) * w - (omega - 1) * have) : w;
  const T below = near ? (1 + omega) * have - (omega - 1) * w : s;
  return in_range(quotient(above, below));
}

// The same for a marginal that bends towards w as x grows: a smaller power, taken by logarithms.
template <class T>
SFR_DEVICE T relaxed(const Margin<T>& side, T x, T s, T w, T omega) {
  if (side.soft == 0) return relaxed(x, s, w, omega);
  const T have = x * s, power = log2_of(in_range(quotient(w, have)));
  const bool near = have > w * T(0.5) && have < w * T(2);
  return in_range(x * exp2_of(power * ((near ? omega : T(1)) / side.gain())));
}

template <class T>
SFR_DEVICE T out_of_range(T x) {
  return x > most_scale<T> / 2 || x < 2 / most_scale<T> ? T(1) : T(0);
}

// What ended a burst of iterations.
enum class Burst { reached, at_edge, stopped };

// Iterates on the scalings until the plan's marginals are within tol (by the sums at hand), the scalings are at the
// edge of their range, the iterations are used up, or the error is below the gate and tol is not near. This is looked
// at every few iterations only: telling all threads costs a good part of one. The last column update is always a plain
// one, so that the plan leaves with its mass whole; `plainly`: all of them are.
template <class T>
SFR_DEVICE Burst scale(Plan<T>& plan, T gate, T tol, int64_t max_iter, int64_t& n_iter, Relaxation<T>& relaxation,
                       bool plainly) {
  constexpr int every = 4;
  Team& team = plan.team;
  T *u = plan.of_rows(row::scale), *v = plan.of_columns(column::scale);
  const Margin<T>&rows = plan.row_margin, &columns = plan.column_margin;
  bool at_edge = false;
  T column_error = 0, last = 0;
#pragma unroll 1
  for (int n = 1;; ++n) {
    ++n_iter;
    const bool look = n % every == 0 || n_iter >= max_iter;
    const T omega = plainly ? T(1) : relaxation.factor();
    T seen[2] = {}, mass = 0;  // error, edge
    row_products(plan, v, [&](int i, T s) {
      if (!(rows.weight[i] > 0)) return;
      const T a = rows.goal_at(i, u[i]), next = relaxed(rows, u[i], s, a, omega);
      if (look) {
        seen[0] += magnitude(u[i] * s - a);
        seen[1] += out_of_range(next);
        mass += u[i] * s;
      }
      u[i] = next;
    });
    if (look && plan.soft()) mass = over_team<Sum>(team, plan.board, mass);
    team.sync();
    column_products(plan, u);
    if (look)
      exchange_columns<Sum>(plan, seen);
    else
      exchange_columns<Sum>(plan);
    T error = seen[0] + column_error;
    if (look && plan.soft()) error /= mass;
    at_edge = at_edge || seen[1] > 0;
    const bool reached = !(error > tol), far = !(error < gate) || relaxation.soon(error, last, tol);
    const bool stop = look && (reached || n_iter >= max_iter || at_edge || !far);
    if (look) last = error;
    T left[2] = {};
    each_column_sum<Sum>(plan, [&](int j, T t) {
      if (!(columns.weight[j] > 0)) return;
      const T next = relaxed(columns, v[j], t, columns.goal_at(j, v[j]), stop ? T(1) : omega);
      left[0] += magnitude(next * t - columns.goal_at(j, next));
      left[1] += out_of_range(next);
      v[j] = next;
    });
    if (n % every == every - 1) {  // for the next look
      over_block<Sum>(team, plan.board, left);
      column_error = left[0];
      at_edge = left[1] > 0;
    } else {
      team.sync();
    }
    if (stop) return at_edge ? Burst::at_edge : reached ? Burst::reached : Burst::stopped;
    if (n % Relaxation<T>::window == 0 && !plainly) relaxation.observe(error);
  }
}

}  // namespace sfr::cuda

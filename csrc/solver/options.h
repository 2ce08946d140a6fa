// From a problem's costs and the public options to the eps that it is solved with.
#pragma once

#include "../contracts/sinkhorn.h"
#include "passes.h"

namespace SFR_TARGET {

// Mean and standard deviation of the cost under a (x) b. The deviation is taken in units of the largest, so that
// nothing overflows or underflows on the way.
template <class T>
struct Spread {
  T mean, largest, deviation;
};

template <class T>
SFR_FN Spread<T> spread_of(Plan<T>& plan) {
  const T* a = plan.rows.weight;
  Spread<T> out;
  T result[1];
  plan.template reduce_entries<Sum>(result, [&](Index i, Index j, Vec<T>(&sums)[1]) {
    sums[0] += a[i] * mass_at(plan.columns, j) * plan.cost_at(i, j);
  });
  out.mean = result[0];
  plan.template reduce_entries<Max>(result, [&](Index i, Index j, Vec<T>(&most)[1]) {
    const Vec<T> there = a[i] * mass_at(plan.columns, j);
    most[0] = vmax<T>(most[0], there > 0 ? vabs<T>(plan.cost_at(i, j) - out.mean) : Vec<T>{});
  });
  out.largest = result[0];
  const T unit = out.largest > 0 ? out.largest : T(1);
  plan.template reduce_entries<Sum>(result, [&](Index i, Index j, Vec<T>(&sums)[1]) {
    const Vec<T> d = (plan.cost_at(i, j) - out.mean) / unit;
    sums[0] += a[i] * mass_at(plan.columns, j) * d * d;
  });
  out.deviation = unit * sqrt_of(result[0]);
  return out;
}

// eps of problem p in units of the cost: within what the type can hold, and 0 where all costs are equal.
template <class T>
SFR_FN T regularisation(const Solve& solve, const Spread<T>& spread, int64_t p) {
  constexpr T negligible = is_single<T> ? T(1e-37) : T(1e-300);
  const SolverOptions& options = solve.options;
  const bool relative = options.relative && !solve.eps_given;
  T eps = solve.eps_given ? static_cast<const T*>(solve.eps_given)[p] : T(options.eps);
  if (relative) eps *= spread.deviation;
  const T least = spread.largest * T(1e-30);
  if (eps < least) eps = least;
  if (eps < negligible) eps = relative ? T(0) : negligible;
  // Costs that differ by rounding alone are equal.
  const T mean = magnitude(spread.mean);
  if (relative && spread.deviation <= 2 * Number<T>::epsilon * mean) {
    const T reach = T(options.reach_a > 0 ? options.reach_a : options.reach_b);
    eps = reach > 0 ? T(options.eps) * (mean > 0 ? mean : reach) : T(0);
  }
  return eps;
}

// Is std the deviation that this eps was made of? Where all costs are equal, their mean stands for it.
template <class T>
SFR_FN bool is_deviation(Plan<T>& plan, T std) {
  const T *a = plan.rows.weight, mass = plan.rows.total * plan.columns.total, per_std = 1 / std;
  T square[1];
  plan.template reduce_entries<Sum>(square, [&](Index i, Index j, Vec<T>(&sums)[1]) {
    const Vec<T> z = plan.centred(i, j) * per_std;
    sums[0] += a[i] * mass_at(plan.columns, j) * z * z;
  });
  return square[0] > mass / 2 && square[0] < mass * 2;
}

}  // namespace SFR_TARGET

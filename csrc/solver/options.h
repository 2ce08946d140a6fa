// From a problem's costs and the public options to the eps that it is solved with.
#pragma once

#include "../contracts/sinkhorn.h"
#include "passes.h"
#include "strategy.h"

namespace SFR_TARGET {

// What is known of the costs between kept patches. Forbidden pairs, whose cost is +inf, count for nothing.
template <class T>
struct Spread {
  T centre = 0;          // the least: no large cost moves it
  T mean = 0;            // under a (x) b, beyond the centre
  T deviation = 0;       // standard
  T evenly = 0;          // standard deviation of the costs between patches whose weights matter, whatever these are
  T others = 1;          // share of a side that its heaviest patch does not have, of the side where that is less
  T allowed = 1;         // mass of a (x) b on the pairs that are allowed
  bool forbids = false;  // there are others
  bool feasible = true;  // no patch that has to be matched is left without a pair
  bool sound = true;     // costs are costs

  // Costs that differ by rounding alone are equal.
  SFR_FN bool flat() const { return deviation <= 2 * Number<T>::epsilon * magnitude(centre + mean); }
};

// Of the pairs that cost no more than `most`: their mass under a (x) b, and whether every patch has one; patches that
// may be left behind need none. The plan is read, though not used: it is to hold something.
template <class T>
struct Within {
  T mass;
  bool all;
};

template <class T, template <class> class Plan>
SFR_FN Within<T> pairs_within(Plan<T>& plan, T most, bool rows_need = true, bool columns_need = true) {
  T *of_rows = plan.rows.right(), *of_columns = plan.columns.right();
  const T* a = plan.rows.weight;
  plan.gather(
      [&](Index i, Index j, Vec<T>) { return plan.cost_at(i, j) <= most ? mass_at(plan.columns, j) : Vec<T>{}; },
      [&](Index i, Index j, Vec<T>) { return plan.cost_at(i, j) <= most ? splat<T>(a[i]) : Vec<T>{}; },  //
      of_rows, of_columns);
  const T mass = plan.sum_patches_of_rows([&](Index i) { return a[i] * of_rows[i]; });
  const T rows = plan.sum_patches_of_rows([&](Index i) { return of_rows[i] > 0 ? T(0) : T(1); });
  const T columns = plan.sum_patches_of_columns([&](Index j) { return of_columns[j] > 0 ? T(0) : T(1); });
  return {mass, (rows == 0 || !rows_need) && (columns == 0 || !columns_need)};
}

template <class T, template <class> class Plan>
SFR_FN Spread<T> spread_of(Plan<T>& plan, const SolverOptions& options) {
  constexpr T infinity = Number<T>::infinity;
  const T* a = plan.rows.weight;
  const Vec<T> none = splat<T>(-infinity);
  Spread<T> out;
  T most[4];  // the least, negative; the largest; something that is no cost; something forbidden
  plan.template reduce_costs<Max>(most, [&](Index i, Index j, Vec<T> c, Vec<T>(&found)[4]) {
    if (!(a[i] > 0)) return;
    const Vec<T> there = mass_at(plan.columns, j), allowed = c < infinity ? there : Vec<T>{};
    found[0] = vmax<T>(found[0], allowed > 0 ? -c : none);
    found[1] = vmax<T>(found[1], allowed > 0 ? c : none);
    found[2] = vmax<T>(found[2], c > -infinity ? none : there);
    found[3] = vmax<T>(found[3], c == infinity ? there : none);
  });
  out.forbids = most[3] > 0;
  out.sound = !(most[2] > 0) && !(out.forbids && plan.of_features);
  if (!out.sound) return out;
  if (out.forbids) {
    plan.clear();
    out.feasible = pairs_within(plan, Number<T>::largest, options.reach_a == 0, options.reach_b == 0).all;
  }
  if (most[1] == -infinity) {
    out.allowed = 0;
    return out;
  }
  T heaviest_row[1], heaviest_column[1];
  plan.template reduce_rows<Max>(heaviest_row, [&](Index i, Vec<T>(&found)[1]) {
    found[0] = vmax<T>(found[0], kept(plan.rows, i, load(plan.rows.weight + i)));
  });
  plan.template reduce_columns<Max>(heaviest_column, [&](Index j, Vec<T>(&found)[1]) {
    found[0] = vmax<T>(found[0], kept(plan.columns, j, load(plan.columns.weight + j)));
  });
  out.others = 1 - (heaviest_row[0] > heaviest_column[0] ? heaviest_row[0] : heaviest_column[0]);
  // In units of the range, so that nothing overflows or underflows on the way.
  out.centre = -most[0];
  const T range = most[1] - out.centre, unit = range > Number<T>::smallest ? range : Number<T>::smallest;
  const T scale = 1 / unit;
  // About the middle of the range; once more about the mean, where that is far from it beside the deviation.
  const auto mass_of = [&](Index i, Index j, Vec<T> c) {
    return c < infinity ? a[i] * mass_at(plan.columns, j) : Vec<T>{};
  };
  const auto apart = [&](Vec<T> c) { return (c - out.centre) * scale; };
  constexpr T middle = T(0.5);
  // All others together weigh less than what an error may be.
  const T rows_matter = T(options.tol) / T(8 * plan.kept_rows),
          columns_matter = T(options.tol) / T(8 * plan.kept_columns);
  T sums[6];
  plan.template reduce_costs<Sum>(sums, [&](Index i, Index j, Vec<T> c, Vec<T>(&found)[6]) {
    const Vec<T> mass = mass_of(i, j, c), x = apart(c), d = x - middle;
    const Vec<T> counts =
        (mass_at(plan.columns, j) > columns_matter) & (mass > 0) ? splat<T>(a[i] > rows_matter) : Vec<T>{};
    found[0] += mass;  // hot: spread
    found[1] += mass > 0 ? mass * x : Vec<T>{};
    found[2] += mass > 0 ? mass * d * d : Vec<T>{};
    found[3] += counts;
    found[4] += counts > 0 ? d : Vec<T>{};
    found[5] += counts > 0 ? d * d : Vec<T>{};
  });
  if (out.forbids) out.allowed = sums[0];
  const T mean = sums[1] / out.allowed, aside = (mean - middle) * (mean - middle) * out.allowed;
  T squares[1] = {sums[2] - aside};
  if (squares[0] < aside)
    plan.template reduce_costs<Sum>(squares, [&](Index i, Index j, Vec<T> c, Vec<T>(&found)[1]) {
      const Vec<T> mass = mass_of(i, j, c), d = apart(c) - mean;
      found[0] += mass > 0 ? mass * d * d : Vec<T>{};
    });
  if (sums[3] > 0) {
    const T off = sums[4] / sums[3], square = sums[5] / sums[3] - off * off;
    out.evenly = square > 0 ? unit * sqrt_of(square) : T(0);
  }
  out.mean = unit * mean;
  out.deviation = unit * sqrt_of(squares[0] / out.allowed);
  return out;
}

// A reach in units of the cost. Far below eps it no longer matters how small it is, and potentials could not hold it.
template <class T>
SFR_FN T reach_of(double reach, T eps) {
  constexpr T least = is_single<T> ? T(1.52587890625e-05) : T(9.094947017729282e-13);  // 2^-16, 2^-40
  const T held = eps * least > Number<T>::smallest ? eps * least : Number<T>::smallest;
  return T(reach) > held ? T(reach) : held;
}

// The least eps that there is: 1 / (eps ln 2) is finite.
template <class T>
constexpr T least_eps = is_single<T> ? T(4.5e-39) : T(1e-308);

// eps of problem p in units of the cost; 0 where all costs are equal and any would do.
template <class T>
SFR_FN T regularisation(const Solve& solve, const Spread<T>& spread, int64_t p) {
  // What potentials of costs without outliers leave to rounding.
  constexpr T held = is_single<T> ? T(5e-5) : T(1e-13);
  const SolverOptions& options = solve.options;
  const bool relative = options.relative && !solve.eps_given;
  T eps = solve.eps_given ? static_cast<const T*>(solve.eps_given)[p] : T(options.eps);
  if (relative) eps *= spread.deviation;
  const bool held_here = !solve.eps_given && options.method != Method::automatic;
  const T least = held_here ? held * spread.deviation : T(0);
  if (eps < least) eps = least;
  // Far above all costs it no longer matters how large eps is, and potentials would round away what costs differ by.
  constexpr T enough = is_single<T> ? T(65536) : T(1073741824);
  T widest = spread.deviation > 0 ? spread.deviation : magnitude(spread.centre + spread.mean);
  if (T(options.reach_a) > widest) widest = T(options.reach_a);
  if (T(options.reach_b) > widest) widest = T(options.reach_b);
  const T most = widest > 0 ? enough * widest : T(1);
  if (!solve.eps_given && eps > most) eps = most;
  // 0 that is given is what a problem with equal costs was given.
  if (eps < least_eps<T> && !(solve.eps_given && eps == 0)) eps = least_eps<T>;
  if (relative && spread.flat()) {
    const T reach = options.reach_a + options.reach_b > 0
                        ? reach_of(options.reach_a > 0 ? options.reach_a : options.reach_b, T(0))
                        : T(0);
    const T size = magnitude(spread.centre + spread.mean);
    eps = reach > 0 || spread.forbids ? T(options.eps) * (size > 0 ? size : reach > 0 ? reach : T(1)) : T(0);
  }
  return eps;
}

// Whether every patch has a pair within `reach` of the least cost, and a quarter of all mass does.
template <class T, template <class> class Plan>
SFR_FN bool spans(Plan<T>& plan, const Spread<T>& spread, T reach) {
  const Within<T> within = pairs_within(plan, spread.centre + reach);
  return within.all && within.mass >= spread.allowed / 64;
}

// Nothing is moved much further than a reach.
template <class T, template <class> class Plan>
SFR_FN CostRange<T> how_far_apart(Plan<T>& plan, const Spread<T>& spread, const SolverOptions& options, T eps) {
  constexpr T beyond = 100, suspicious = T(is_single<T> ? 1 << 16 : 1 << 20);
  // Where nearly all mass of a (x) b lies on few pairs, their deviation says little of how far others are.
  T apart = spread.deviation > spread.mean / 4 ? spread.deviation : spread.mean / 4;
  if (spread.evenly > apart) apart = spread.evenly;
  if (options.reach_a > 0 && apart > beyond * T(options.reach_a)) apart = beyond * T(options.reach_a);
  if (options.reach_b > 0 && apart > beyond * T(options.reach_b)) apart = beyond * T(options.reach_b);
  const T far = apart;
  if (apart / eps > suspicious) {
    plan.clear();
    T below = eps;
    SFR_ROLLED
    for (int k = 0; k < 12; ++k) {
      const T between = sqrt_of(below) * sqrt_of(apart);
      (spans(plan, spread, between) ? apart : below) = between;
    }
    // Mass has further to go than to the nearest.
    constexpr T further = 4;
    apart = further * apart < far ? further * apart : far;
  }
  const bool reach = options.reach_a > 0 || options.reach_b > 0;  // all mass may stay or move
  return {apart, far, reach ? T(1) : spread.others};
}

// What is this far below costs is 0 to any potential: nothing gets there.
template <class T>
constexpr T out_of_sight = is_single<T> ? T(9.094947017729282e-13) : T(8.271806125530277e-25);  // 2^-40, 2^-80

}  // namespace SFR_TARGET

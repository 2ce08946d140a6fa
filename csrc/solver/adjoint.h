// Backward of one solved problem: from the gradients of its two values to those of its costs, weights and eps.
// Formulas: contracts/sinkhorn.h.
#pragma once

#include "newton.h"
#include "options.h"

namespace SFR_TARGET {

// Gradients of what one problem returned.
template <class T>
struct Upstream {
  T transport = 0, entropic = 0, eps = 0;
};

// d/da_i of the two values, before normalisation of the weights; `other` is the sum of the other side's weights.
template <class T>
SFR_FN T weight_gradient(const Marginal<T>& side, Index i, Upstream<T> up, T eps, T other) {
  const T bare = side.bare()[i], step = side.step()[i];
  if (!side.has_reach()) return eps * ((up.transport + up.entropic) * bare + up.transport * step);
  const T reach = side.reach(eps), f = reach * side.over_reach(bare), left = expm1_of(-side.over_reach(bare));
  return up.transport * side.gain() * (1 + left) * (f + eps * step) +
         up.entropic * (reach * -left - eps * (1 + left - other));
}

// Through eps = s std(C). With u = (C - mean) / std and on the pairs that are allowed, deps/dC = s a_i b_j u and
// deps/da_i = s std / 2 sum_j b_j (u^2 - 1), where the masses a_i b_j sum to 1; `pull` is d/deps times s. Added to the
// plan and to both gradients.
template <class T>
SFR_FN void spread_backward(Plan<T>& plan, const Spread<T>& spread, T pull) {
  const Marginal<T>&rows = plan.rows, &columns = plan.columns;
  const T unit = 1 / (rows.total * columns.total * spread.allowed), scale = 1 / spread.deviation;
  T *of_rows = rows.step(), *of_columns = columns.step();  // no longer needed
  const auto apart = [&](Index i, Index j) { return (plan.centred(i, j) - spread.mean) * scale; };
  const auto allowed = [&](Index i, Index j, Vec<T> x) {
    return plan.cost_at(i, j) < Number<T>::infinity ? x : Vec<T>{};
  };
  plan.gather(
      [&](Index i, Index j, Vec<T> gradient) {
        const Vec<T> u = apart(i, j), mass = mass_at(columns, j);
        store(plan.at(i, j), gradient + allowed(i, j, pull * unit * rows.weight[i] * mass * u));
        return allowed(i, j, mass * (u * u - 1));
      },
      [&](Index i, Index j, Vec<T>) {
        const Vec<T> u = apart(i, j);
        return allowed(i, j, rows.weight[i] * (u * u - 1));
      },
      of_rows, of_columns);
  const T slope = pull * spread.deviation / 2 * unit;
  plan.each_patch_of_rows([&](Index i) { rows.gradient()[i] += slope * of_rows[i]; });
  plan.each_patch_of_columns([&](Index j) { columns.gradient()[j] += slope * of_columns[j]; });
}

// d/dC into the plan, and d/da, d/db (before normalisation of the weights) into gradient() of both sides. `spread`:
// where eps follows that of the costs; null elsewhere. Returns d/deps, without what comes from upstream.
template <class T>
SFR_FN T adjoint_backward(Plan<T>& plan, Upstream<T> up, T eps, const Spread<T>* spread) {
  const T mass = plan.evaluate(From::potentials).mass;
  const Marginal<T>&rows = plan.rows, &columns = plan.columns;
  const auto bare = [](const Marginal<T>& side, Index i) {
    store(side.bare() + i, kept(side, i, (load(side.log() + i) - log_weight(side, i)) * T(ln2)));
  };
  plan.each_row([&](Index i) { bare(rows, i); });
  plan.each_column([&](Index j) { bare(columns, j); });
  plan.sync();
  // ln P / (a b) is read off the potentials.
  const T *phi = rows.bare(), *gamma = columns.bare(), *alpha = rows.step(), *beta = columns.step();
  const auto log_ratio = [&](Index i, Index j) {
    return phi[i] + load(gamma + j) - plan.centred(i, j) * (plan.factor * T(ln2));
  };

  if (up.transport != 0) {
    // The plan moves: h = -(P * ln k) 1, k = -(P * ln k)^T 1, and less on a side whose marginal gives way.
    const auto term = [&](Index i, Index j, Vec<T> p) { return p > 0 ? -p * log_ratio(i, j) : Vec<T>{}; };
    plan.gather(term, term, rows.right(), columns.right());
    const auto give_way = [](const Marginal<T>& side, Index i) {
      if (side.has_reach()) side.right()[i] -= side.sum()[i] * side.over_reach(side.bare()[i]);
    };
    if (plan.has_reach()) {
      plan.each_patch_of_rows([&](Index i) { give_way(rows, i); });
      plan.each_patch_of_columns([&](Index j) { give_way(columns, j); });
    }
    solve_system(plan, Rules<T>::adjoint_precision, 4 * int64_t(plan.kept_columns) + 20);
  } else {
    plan.each_row([&](Index i) { store(rows.step() + i, Vec<T>{}); });
    plan.each_column([&](Index j) { store(columns.step() + j, Vec<T>{}); });
    plan.sync();
  }

  // G = P (transport (1 + ln k + alpha + beta) + entropic), and d/deps = <G - transport P, ln k> + ...
  T slope[1];
  plan.template reduce_entries<Sum>(slope, [&](Index i, Index j, Vec<T>(&sums)[1]) {
    const Vec<T> p = load(plan.at(i, j)), log = log_ratio(i, j);
    const Vec<T> moved = up.transport * (log + alpha[i] + load(beta + j)) + up.entropic;
    sums[0] += p > 0 ? p * moved * log : Vec<T>{};
    store(plan.at(i, j), p > 0 ? p * (up.transport + moved) : Vec<T>{});
  });
  slope[0] += up.entropic * (rows.total * columns.total - mass);
  plan.each_patch_of_rows([&](Index i) { rows.gradient()[i] = weight_gradient(rows, i, up, eps, columns.total); });
  plan.each_patch_of_columns(
      [&](Index j) { columns.gradient()[j] = weight_gradient(columns, j, up, eps, rows.total); });
  plan.sync();
  if (spread) spread_backward(plan, *spread, (slope[0] + up.eps) * (eps / spread->deviation));
  return slope[0];
}

}  // namespace SFR_TARGET

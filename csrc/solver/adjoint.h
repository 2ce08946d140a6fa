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

// d/da_i of the two values, before normalisation of the weights; `other` is the sum of the other side's weights,
// `exchange` what is left of the shift and of the system's solution along it (below).
template <class T>
SFR_FN T weight_gradient(const Marginal<T>& side, Index i, Upstream<T> up, T eps, T other, T exchange) {
  const T bare = side.bare()[i], step = side.step()[i];
  if (!side.has_reach()) return eps * ((up.transport + up.entropic) * bare + up.transport * step);
  const T reach = side.reach(eps), over = side.over_reach(bare), kept = exp2_of(-over * T(1 / ln2));
  return up.transport * side.gain() * kept * (reach * side.over_reach_unshifted(bare) + eps * (step + exchange)) -
         up.entropic * (reach * expm1_of(-over) + eps * (kept - other));
}

// Through eps = s std(C). With u = (C - mean) / std and on the pairs that are allowed, deps/dC = s a_i b_j u and
// deps/da_i = s std / 2 sum_j b_j (u^2 - 1), where the masses a_i b_j sum to 1; `rate` is d/deps times s. Added to the
// plan and to both gradients.
template <class T, template <class> class Plan>
SFR_FN void spread_backward(Plan<T>& plan, const Spread<T>& spread, T rate) {
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
        store(plan.at(i, j), gradient + allowed(i, j, rate * unit * rows.weight[i] * mass * u));
        return allowed(i, j, mass * (u * u - 1));
      },
      [&](Index i, Index j, Vec<T>) {
        const Vec<T> u = apart(i, j);
        return allowed(i, j, rows.weight[i] * (u * u - 1));
      },
      of_rows, of_columns);
  const T slope = rate * spread.deviation / 2 * unit;
  plan.each_patch_of_rows([&](Index i) { rows.gradient()[i] += slope * of_rows[i]; });
  plan.each_patch_of_columns([&](Index j) { columns.gradient()[j] += slope * of_columns[j]; });
}

// Through eps = s |mean(C)|, where all costs are equal: weights do not change their mean.
template <class T, template <class> class Plan>
SFR_FN void mean_backward(Plan<T>& plan, const Spread<T>& spread, T rate) {
  const Marginal<T>&rows = plan.rows, &columns = plan.columns;
  const T unit = rate / (rows.total * columns.total * spread.allowed);
  T none[1];
  plan.template reduce_entries<Sum>(none, [&](Index i, Index j, Vec<T>(&)[1]) {
    store(plan.at(i, j),
          load(plan.at(i, j)) +
              unit * rows.weight[i] * (plan.cost_at(i, j) < Number<T>::infinity ? mass_at(columns, j) : Vec<T>{}));
  });
}

// Into gradient() of both sides, those of the product of the weights, which is the plan where eps is 0: the mean cost
// of a patch.
template <class T, template <class> class Plan>
SFR_FN void weights_backward_of_product(Plan<T>& plan, Upstream<T> up) {
  const Marginal<T>&rows = plan.rows, &columns = plan.columns;
  const T rate = up.transport + up.entropic;
  const auto cost = [&](Index i, Index j, Vec<T> mass) {
    return mass > 0 ? rate * mass * plan.centred(i, j) : Vec<T>{};
  };
  plan.gather([&](Index i, Index j, Vec<T>) { return cost(i, j, mass_at(columns, j)); },
              [&](Index i, Index j, Vec<T>) { return cost(i, j, splat<T>(rows.weight[i])); }, rows.gradient(),
              columns.gradient());
}

// log2 of what row or column i of the plan is held in units of: half that of its sum, where that is small. So no entry
// underflows that counts in its row or its column, and the system's diagonal is nowhere small.
template <class T>
SFR_INLINE Vec<T> log_unit(const Marginal<T>& side, Index i) {
  constexpr T small = is_single<T> ? T(-32) : T(-256), least = is_single<T> ? T(-60) : T(-480);
  Vec<T> log = log_weight(side, i);
  if (side.has_reach()) log -= side.over_reach(load(side.bare() + i)) * T(1 / ln2);
  return kept(side, i, -vmax<T>(Vec<T>{}, -vmax<T>((log - small) / 2, splat<T>(least))));
}

template <class T>
struct InUnits {
  T mass;       // of the plan
  bool scaled;  // some unit is not 1
};

// The plan of the potentials, in units of its rows and columns, with the sums over both as the system has them (see
// newton.h).
template <class T, template <class> class Plan>
SFR_FN InUnits<T> plan_in_units(Plan<T>& plan) {
  const Marginal<T>&rows = plan.rows, &columns = plan.columns;
  T of_rows[1], of_columns[1];
  const auto lift = [](const Marginal<T>& side, Index i, Vec<T>(&most)[1]) {
    const Vec<T> log = log_unit(side, i);
    store(side.log() + i, load(side.log() + i) - log);
    most[0] = vmax<T>(most[0], -log);
  };
  plan.template reduce_rows<Max>(of_rows, [&](Index i, Vec<T>(&most)[1]) { lift(rows, i, most); });
  plan.template reduce_columns<Max>(of_columns, [&](Index j, Vec<T>(&most)[1]) { lift(columns, j, most); });
  const bool scaled = of_rows[0] > 0 || of_columns[0] > 0;
  const T mass = plan.evaluate(From::potentials).mass;
  const auto unit = [scaled](const Marginal<T>& side, Index i) {
    store(side.unit() + i, scaled ? exp2<T>(log_unit(side, i)) : splat<T>(1));
  };
  plan.each_row([&](Index i) { unit(rows, i); });
  plan.each_column([&](Index j) { unit(columns, j); });
  plan.sync();
  if (!scaled) return {mass, false};
  plan.gather([&](Index, Index j, Vec<T> q) { return q * load(columns.unit() + j); },
              [&](Index i, Index, Vec<T> q) { return q * rows.unit()[i]; }, rows.sum(), columns.sum());
  const auto in_units = [](const Marginal<T>& side, Index i) {
    store(side.sum() + i, load(side.sum() + i) / load(side.unit() + i));
  };
  T whole[1];
  plan.template reduce_rows<Sum>(whole, [&](Index i, Vec<T>(&sums)[1]) {
    sums[0] += kept(rows, i, load(rows.sum() + i) * load(rows.unit() + i));
    in_units(rows, i);
  });
  plan.each_column([&](Index j) { in_units(columns, j); });
  plan.sync();  // mutant: the next pass has a barrier before it reads; for those to come
  return {whole[0], true};
}

// The system's equations summed over a side are two for the means of alpha and beta under the plan. With reaches far
// above eps these are nearly one: conjugate gradients find what alpha and beta have in common, and nothing of what
// they exchange, (1, -1), which is as large as the shift of the masses is, and cancels it in the weights' gradients. So
// means are taken out of the right sides, and put into the solution in closed form. With s = eps / reach, the right
// sides' sums H and K, f and g without the shift, and det = s_a + s_b + s_a s_b:
//
//     mean(alpha) + mean(beta) = (s_b H + s_a K) / (|P| det)
//     shift / eps + (mean(alpha) - mean(beta)) / 2 =
//         (<P^T 1, g> / reach_b - <P 1, f> / reach_a + (s_b H - s_a K) / 2) / (|P| det) + shift / eps s_a s_b / det
template <class T>
struct Means {
  T of_rows = 0, of_columns = 0;  // sums of the plan over either side: its mass
  T common = 0, exchange = 0;     // the two numbers above
};

template <class T>
SFR_INLINE T in_plan(const Marginal<T>& side, Index i) {
  return side.sum()[i] * side.unit()[i] * side.unit()[i];
}

template <class T, template <class> class Plan>
SFR_FN Means<T> take_means(Plan<T>& plan) {
  const Marginal<T>&rows = plan.rows, &columns = plan.columns;
  const auto right = [](const Marginal<T>& side, Index i) { return side.right()[i] * side.unit()[i]; };
  const auto over = [](const Marginal<T>& side, Index i) {
    return in_plan(side, i) * side.over_reach_unshifted(side.bare()[i]);
  };
  Means<T> out;
  out.of_rows = plan.sum_patches_of_rows([&](Index i) { return in_plan(rows, i); });
  out.of_columns = plan.sum_patches_of_columns([&](Index j) { return in_plan(columns, j); });
  if (!(out.of_rows > 0) || !(out.of_columns > 0)) {
    out.of_rows = 0, out.exchange = plan.shift * T(ln2);
    return out;
  }
  const T h = plan.sum_patches_of_rows([&](Index i) { return right(rows, i); }) / out.of_rows;
  const T k = plan.sum_patches_of_columns([&](Index j) { return right(columns, j); }) / out.of_columns;
  const T f = plan.sum_patches_of_rows([&](Index i) { return over(rows, i); }) / out.of_rows;
  const T g = plan.sum_patches_of_columns([&](Index j) { return over(columns, j); }) / out.of_columns;
  const T a = rows.eps_over_reach, b = columns.eps_over_reach, det = a + b + a * b;
  out.common = (b * h + a * k) / det;
  out.exchange = (g - f + (b * h - a * k) / 2) / det;
  if (a > 0 && b > 0) out.exchange += plan.shift * T(ln2) * (a / (1 + a + a / b));
  plan.each_patch_of_rows([&](Index i) { rows.right()[i] -= rows.sum()[i] * rows.unit()[i] * h; });
  plan.each_patch_of_columns([&](Index j) { columns.right()[j] -= columns.sum()[j] * columns.unit()[j] * k; });
  plan.sync();  // mutant: the next pass has a barrier before it reads; for those to come
  return out;
}

template <class T, template <class> class Plan>
SFR_FN void put_means(Plan<T>& plan, const Means<T>& means) {
  if (!(means.of_rows > 0)) return;
  const auto mean = [](const Marginal<T>& side, Index i) { return in_plan(side, i) * side.step()[i]; };
  const T common = means.common / 2;
  const T of_rows = plan.sum_patches_of_rows([&](Index i) { return mean(plan.rows, i); }) / means.of_rows;
  const T of_columns = plan.sum_patches_of_columns([&](Index j) { return mean(plan.columns, j); }) / means.of_columns;
  plan.each_patch_of_rows([&](Index i) { plan.rows.step()[i] += common - of_rows; });
  plan.each_patch_of_columns([&](Index j) { plan.columns.step()[j] += common - of_columns; });
}

// d/dC into the plan, and d/da, d/db (before normalisation of the weights) into gradient() of both sides. `spread`:
// where eps follows that of the costs; null elsewhere. Returns d/deps, without what comes from upstream.
template <class T, template <class> class Plan>
SFR_FN T adjoint_backward(Plan<T>& plan, Upstream<T> up, T eps, const Spread<T>* spread) {
  const Marginal<T>&rows = plan.rows, &columns = plan.columns;
  const auto bare = [](const Marginal<T>& side, Index i) {
    store(side.bare() + i, kept(side, i, (load(side.log() + i) - log_weight(side, i)) * T(ln2)));
  };
  plan.each_row([&](Index i) { bare(rows, i); });
  plan.each_column([&](Index j) { bare(columns, j); });
  const InUnits<T> held = plan_in_units(plan);
  // ln P / (a b) is read off the potentials.
  const T *phi = rows.bare(), *gamma = columns.bare(), *alpha = rows.step(), *beta = columns.step();
  const T *row_units = rows.unit(), *column_units = columns.unit();
  const auto log_ratio = [&](Index i, Index j) {
    return phi[i] + load(gamma + j) - plan.centred(i, j) * (plan.factor * T(ln2));
  };

  T exchange = 0;
  if (up.transport != 0) {
    // The plan moves: h = -(P * ln k) 1, k = -(P * ln k)^T 1, and less on a side whose marginal gives way.
    const auto term = [&](Index i, Index j, Vec<T> p) { return p > 0 ? -p * log_ratio(i, j) : Vec<T>{}; };
    plan.gather([&](Index i, Index j, Vec<T> q) { return term(i, j, q * load(column_units + j)); },
                [&](Index i, Index j, Vec<T> q) { return term(i, j, q * row_units[i]); }, rows.right(),
                columns.right());
    const auto give_way = [](const Marginal<T>& side, Index i) {
      if (side.has_reach()) side.right()[i] -= side.sum()[i] * side.unit()[i] * side.over_reach(side.bare()[i]);
    };
    Means<T> means;
    if (plan.has_reach()) {
      plan.each_patch_of_rows([&](Index i) { give_way(rows, i); });
      plan.each_patch_of_columns([&](Index j) { give_way(columns, j); });
      plan.sync();  // mutant: the next pass has a barrier before it reads; for those to come
      means = take_means(plan);
      exchange = means.exchange;
    }
    const int64_t most = 4 * int64_t(plan.kept_columns) + 20;
    const auto unit = [](const Marginal<T>& side, Index j) { return load(side.unit() + j); };
    solve_system(plan, Rules<T>::adjoint_precision, most, Rules<T>::worth * plan.factorising_takes(), false, unit);
    const auto out_of_units = [](const Marginal<T>& side, Index i) {
      store(side.step() + i, load(side.step() + i) / load(side.unit() + i));
    };
    if (held.scaled) {
      plan.each_row([&](Index i) { out_of_units(rows, i); });
      plan.each_column([&](Index j) { out_of_units(columns, j); });
    }
    if (plan.has_reach()) {
      plan.sync();  // mutant: the next pass has a barrier before it reads; for those to come
      put_means(plan, means);
    }
  } else {
    plan.each_row([&](Index i) { store(rows.step() + i, Vec<T>{}); });
    plan.each_column([&](Index j) { store(columns.step() + j, Vec<T>{}); });
  }
  plan.sync();

  // G = P (transport (1 + ln k + alpha + beta) + entropic), and d/deps = <G - transport P, ln k> + ...
  T slope[1];
  plan.template reduce_entries<Sum>(slope, [&](Index i, Index j, Vec<T>(&sums)[1]) {
    const Vec<T> p = load(plan.at(i, j)) * (row_units[i] * load(column_units + j)), log = log_ratio(i, j);
    const Vec<T> moved = up.transport * (log + alpha[i] + load(beta + j)) + up.entropic;
    sums[0] += p > 0 ? p * moved * log : Vec<T>{};
    store(plan.at(i, j), p > 0 ? p * (up.transport + moved) : Vec<T>{});
  });
  slope[0] += up.entropic * (rows.total * columns.total - held.mass);
  if (eps > 0) {
    plan.each_patch_of_rows(
        [&](Index i) { rows.gradient()[i] = weight_gradient(rows, i, up, eps, columns.total, exchange); });
    plan.each_patch_of_columns(
        [&](Index j) { columns.gradient()[j] = weight_gradient(columns, j, up, eps, rows.total, -exchange); });
    plan.sync();
  } else {
    weights_backward_of_product(plan, up);
  }
  if (!spread || !(eps > least_eps<T>)) return slope[0];
  const T rate = slope[0] + up.eps, mean = spread->centre + spread->mean;
  if (!spread->flat())
    spread_backward(plan, *spread, rate * (eps / spread->deviation));
  else if (mean != 0)
    mean_backward(plan, *spread, rate * (eps / mean));
  return slope[0];
}

}  // namespace SFR_TARGET

// Backward of one solved problem: from the gradients of its two values to those of its costs and weights.
#pragma once

#include "system.cuh"

namespace sfr::cuda {

// The potentials without the marginals, (F - log2 a) ln2: the scalings' places, which backward does not need otherwise.
namespace row {
constexpr int phi = scale, gradient = right;
}
namespace column {
constexpr int gamma = scale, gradient = right;
}

// Gradients of what one problem returned.
template <class T>
struct Upstream {
  T transport = 0, entropic = 0, eps = 0;
};

// d/da_i of the two values, before normalisation of the weights; `other` is the sum of the other side's weights.
template <class T>
SFR_DEVICE T weight_gradient(const Margin<T>& side, int i, T phi, T alpha, Upstream<T> up, T eps, T mean, T other) {
  if (side.soft == 0) return eps * ((up.transport + up.entropic) * phi + up.transport * alpha);
  if (!(side.weight[i] > 0)) return 0;
  const T f = eps * phi + mean / 2, reach = eps / side.soft, kept = side.bent[i] / side.weight[i];
  return up.transport * side.gain() * kept * (f + eps * alpha) +
         up.entropic * (reach * -expm1_of(-f / reach) - eps * (kept - other));
}

// Through eps = s std(C): deps/dC = s a_i b_j (C_ij - mean) / std, deps/da_i = s sum_j b_j (C_ij - mean)^2 / (2 std),
// with normalised weights; `pull` is d/deps times s / std. Added to plan.P, row::gradient and column::gradient.
template <class T>
SFR_DEVICE void spread_backward(Plan<T>& plan, T pull) {
  const Margin<T>&of_a = plan.row_margin, &of_b = plan.column_margin;
  const T *a = of_a.weight, *b = of_b.weight, unit = 1 / (of_a.total * of_b.total);
  T *rows = plan.of_rows(row::alpha), *columns = plan.of_columns(column::beta);  // no longer needed
  const auto centred = [&](int i, int j) { return plan.cost[int64_t(i) * plan.ld + j] - plan.mean; };
  row_terms<Sum>(
      plan,
      [&](int i, int j) {
        const T c = centred(i, j);
        plan.P[int64_t(i) * plan.ld + j] += pull * unit * a[i] * b[j] * c;
        return b[j] * c * c;
      },
      [&](int i, T sum) { rows[i] = pull / 2 * sum / of_b.total; });
  column_terms<Sum>(plan, [&](int i, int j) {
    const T c = centred(i, j);
    return a[i] * c * c;
  });
  exchange_columns<Sum>(plan);
  each_column_sum<Sum>(plan, [&](int j, T sum) { columns[j] = pull / 2 * sum / of_a.total; });
  // The sum of weights that are not normalised does not matter to std.
  T along_a = 0, along_b[1] = {};
  if (of_a.soft > 0) {
    plan.each_row([&](int i) { along_a += a[i] / of_a.total * rows[i]; });
    along_a = over_team<Sum>(plan.team, plan.board, along_a);
  }
  if (of_b.soft > 0) {
    plan.each_column([&](int j) { along_b[0] += b[j] / of_b.total * columns[j]; });
    over_block<Sum>(plan.team, plan.board, along_b);
  }
  plan.each_row([&](int i) { plan.of_rows(row::gradient)[i] += (rows[i] - along_a) / of_a.total; });
  plan.each_column([&](int j) { plan.of_columns(column::gradient)[j] += (columns[j] - along_b[0]) / of_b.total; });
}

// d/dC into plan.P, and d/da, d/db (before normalisation of the weights) into row::gradient, column::gradient.
// `relative`: eps is `options_eps` standard deviations of the cost. Returns d/deps, without what comes from upstream.
template <class T>
SFR_DEVICE T adjoint_backward(Plan<T>& plan, Upstream<T> up, T eps, bool relative, T options_eps) {
  Team& team = plan.team;
  const T mass = evaluate<From::potentials>(plan).mass;
  T *phi = plan.of_rows(row::phi), *gamma = plan.of_columns(column::gamma);
  T *alpha = plan.of_rows(row::alpha), *beta = plan.of_columns(column::beta);
  const Margin<T>&rows = plan.row_margin, &columns = plan.column_margin;
  const auto bare = [](T log, T weight) { return weight > 0 ? (log - log2_of(weight)) * T(ln2) : T(0); };
  plan.each_row([&](int i) { phi[i] = bare(plan.of_rows(row::log)[i], rows.weight[i]); });
  plan.each_column([&](int j) { gamma[j] = bare(plan.of_columns(column::log)[j], columns.weight[j]); });
  team.sync();
  // ln P / (a b) is read off the potentials.
  const auto log_ratio = [&](int i, int j) {
    return phi[i] + gamma[j] - (plan.cost[int64_t(i) * plan.ld + j] - plan.mean) * (plan.factor * T(ln2));
  };

  if (up.transport != 0) {
    // The plan moves: h = -(P * ln k) 1, k = -(P * ln k)^T 1, and less on a side whose marginal gives way.
    T *h = plan.of_rows(row::right), *k = plan.of_columns(column::right);
    gather(
        plan,
        [&](int i, int j) {
          const T p = plan.P[int64_t(i) * plan.ld + j];
          return p > 0 ? -p * log_ratio(i, j) : T(0);
        },
        h, k);
    const auto give_way = [](const Margin<T>& side, T sum, T phi) {
      return sum * (side.soft * phi + side.offset * T(ln2));
    };
    if (plan.soft()) {
      plan.each_row([&](int i) { h[i] -= give_way(rows, plan.of_rows(row::sum)[i], phi[i]); });
      plan.each_column([&](int j) { k[j] -= give_way(columns, plan.of_columns(column::sum)[j], gamma[j]); });
      team.sync();
    }
    solve_system(plan, sizeof(T) == 4 ? T(1e-6) : T(1e-13), 4 * int64_t(plan.M) + 20);
  } else {
    plan.each_row([&](int i) { alpha[i] = 0; });
    plan.each_column([&](int j) { beta[j] = 0; });
    team.sync();
  }

  // G = P (transport (1 + ln k + alpha + beta) + entropic), and d/deps = <G - transport P, ln k> + ...
  T slope = 0;
  plan.each_entry([&](int i, int j) {
    T* at = plan.P + int64_t(i) * plan.ld + j;
    const T p = *at, log = log_ratio(i, j);
    const T moved = up.transport * (log + alpha[i] + beta[j]) + up.entropic;
    *at = p > 0 ? p * (up.transport + moved) : T(0);
    slope += p > 0 ? p * moved * log : T(0);
  });
  slope = over_team<Sum>(team, plan.board, slope) + up.entropic * (rows.total * columns.total - mass);
  plan.each_row([&](int i) {
    plan.of_rows(row::gradient)[i] = weight_gradient(rows, i, phi[i], alpha[i], up, eps, plan.mean, columns.total);
  });
  plan.each_column([&](int j) {
    plan.of_columns(column::gradient)[j] =
        weight_gradient(columns, j, gamma[j], beta[j], up, eps, plan.mean, rows.total);
  });
  if (relative && eps > 0) {
    team.sync();
    spread_backward(plan, (slope + up.eps) * options_eps * options_eps / eps);
  }
  return slope;
}

}  // namespace sfr::cuda

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

// Gradients of one problem's values.
template <class T>
struct Upstream {
  T transport = 0, entropic = 0;
};

// d/dC into plan.P, and d/da, d/db (before normalisation of the weights) into row::gradient, column::gradient.
// `relative`: eps is `options_eps` standard deviations of the cost.
template <class T>
SFR_DEVICE void adjoint_backward(Plan<T>& plan, Upstream<T> up, T eps, bool relative, T options_eps) {
  Team& team = plan.team;
  const Evaluation<T> evaluation = evaluate<From::potentials>(plan);
  T *phi = plan.of_rows(row::phi), *gamma = plan.of_columns(column::gamma);
  T *alpha = plan.of_rows(row::alpha), *beta = plan.of_columns(column::beta);
  const T *a = plan.row_weight, *b = plan.column_weight;
  const auto bare = [](T log, T weight) { return weight > 0 ? (log - log2_of(weight)) * T(ln2) : T(0); };
  plan.each_row([&](int i) { phi[i] = bare(plan.of_rows(row::log)[i], a[i]); });
  plan.each_column([&](int j) { gamma[j] = bare(plan.of_columns(column::log)[j], b[j]); });
  team.sync();
  const auto centred = [&](int i, int j) { return plan.cost[int64_t(i) * plan.ld + j] - plan.mean; };
  // ln P / (a b) is read off the potentials.
  const auto log_ratio = [&](int i, int j) { return phi[i] + gamma[j] - centred(i, j) * (plan.factor * T(ln2)); };

  if (up.transport != 0) {
    // The plan moves: h = -(P * ln k) 1, k = -(P * ln k)^T 1.
    gather(
        plan,
        [&](int i, int j) {
          const T p = plan.P[int64_t(i) * plan.ld + j];
          return p > 0 ? -p * log_ratio(i, j) : T(0);
        },
        plan.of_rows(row::right), plan.of_columns(column::right));
    solve_system(plan, sizeof(T) == 4 ? T(1e-6) : T(1e-13), 4 * int64_t(plan.M) + 20);
  } else {
    plan.each_row([&](int i) { alpha[i] = 0; });
    plan.each_column([&](int j) { beta[j] = 0; });
    team.sync();
  }

  // G = P (transport (1 + ln k + alpha + beta) + entropic), and <G, C - mean>; <a, phi>.
  T sums[2] = {};
  plan.each_entry([&](int i, int j) {
    T* at = plan.P + int64_t(i) * plan.ld + j;
    const T p = *at;
    *at = p > 0 ? p * (up.transport * (1 + log_ratio(i, j) + alpha[i] + beta[j]) + up.entropic) : T(0);
    sums[0] += *at * centred(i, j);
  });
  T *grad_a = plan.of_rows(row::gradient), *grad_b = plan.of_columns(column::gradient);
  plan.each_row([&](int i) {
    grad_a[i] = eps * ((up.transport + up.entropic) * phi[i] + up.transport * alpha[i]);
    sums[1] += a[i] * phi[i];
  });
  T columns[1] = {};
  plan.each_column([&](int j) {
    grad_b[j] = eps * ((up.transport + up.entropic) * gamma[j] + up.transport * beta[j]);
    columns[0] += b[j] * gamma[j];
  });
  over_team<Sum>(team, plan.board, sums);
  over_block<Sum>(team, plan.board, columns);
  if (!relative || eps == 0) return;

  // Through eps = s std(C): d./deps by homogeneity, then deps/dC = s a_i b_j (C_ij - mean) / std,
  // deps/da_i = s sum_j b_j (C_ij - mean)^2 / (2 std), with s / std = s^2 / eps.
  const T dual = (sums[1] + columns[0]) * eps;
  const T slope = (up.transport * evaluation.centred + up.entropic * dual - sums[0]) / eps;
  const T pull = slope * options_eps * options_eps / eps;
  row_terms<Sum>(
      plan,
      [&](int i, int j) {
        const T c = centred(i, j);
        plan.P[int64_t(i) * plan.ld + j] += pull * a[i] * b[j] * c;
        return b[j] * c * c;
      },
      [&](int i, T sum) { grad_a[i] += pull / 2 * sum; });
  column_terms<Sum>(plan, [&](int i, int j) {
    const T c = centred(i, j);
    return a[i] * c * c;
  });
  exchange_columns<Sum>(plan);
  each_column_sum<Sum>(plan, [&](int j, T sum) { grad_b[j] += pull / 2 * sum; });
}

}  // namespace sfr::cuda

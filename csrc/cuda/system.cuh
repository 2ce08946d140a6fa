// The linear system of one plan, which is solved forward (Newton steps) and backward (the plan's own motion):
//
//     diag(P 1) alpha + P beta = h,    P^T alpha + diag(P^T 1) beta = k
//
// Symmetric and positive semi-definite; its null space is the shift (1, -1) of the potentials. A side with a reach has
// its diagonal times 1 + eps / reach, and then there is no null space. alpha is eliminated;
// what is left, diag(P^T 1) - P^T diag(1 / (P 1)) P, is solved by conjugate gradients with a diagonal preconditioner:
// one pair of matrix-vector products a step, as much as an iteration of Sinkhorn's. h and k are row::right,
// column::right.
#pragma once

#include "plan.cuh"

namespace sfr::cuda {

// Sums over rows and over columns of term(i, j); no rows_out: not wanted.
template <class T, class Term>
SFR_DEVICE void gather(Plan<T>& plan, Term&& term, T* rows_out, T* columns_out) {
  if (rows_out) row_terms<Sum>(plan, term, [&](int i, T sum) { rows_out[i] = sum; });
  column_terms<Sum>(plan, term);
  exchange_columns<Sum>(plan);
  each_column_sum<Sum>(plan, [&](int j, T sum) { columns_out[j] = sum; });
  plan.team.sync();
}

// alpha = (h - P beta) / (P 1); no h: 0.
template <class T>
SFR_DEVICE void eliminate_rows(const Plan<T>& plan, const T* beta, const T* h) {
  T* alpha = plan.of_rows(row::alpha);
  const T* sum = plan.of_rows(row::sum);
  const Margin<T>& rows = plan.row_margin;
  row_products(plan, beta, [&](int i, T s) {
    alpha[i] = rows.weight[i] > 0 ? ((h ? h[i] : T(0)) - s) / (rows.gain() * sum[i]) : T(0);
  });
  plan.team.sync();
}

// Solves from 0, with the constant mode projected out, until the residual has fallen by `goal`, or float32 has no more
// to give, or after `limit` steps; keeps the best. Returns the number of steps. Every block does the same work on the
// vectors over the columns, each entry by the same thread all along.
template <class T>
SFR_DEVICE int64_t solve_system(Plan<T>& plan, T goal, int64_t limit) {
  constexpr int patience = sizeof(T) == 4 ? 25 : 200;  // steps without progress; float32 soon has no more to give
  Team& team = plan.team;
  const T* b = plan.column_margin.weight;
  const T row_gain = plan.row_margin.gain(), gain = plan.column_margin.gain();
  const T modes = plan.soft() ? T(INFINITY) : T(plan.kept_columns);  // a mean over them is the constant mode
  T *r = plan.of_columns(column::residual), *p = plan.of_columns(column::direction);
  T *q = plan.of_columns(column::product), *d = plan.of_columns(column::diagonal);
  T *beta = plan.of_columns(column::beta), *best = plan.of_columns(column::best);
  const T *k = plan.of_columns(column::right), *sum = plan.of_columns(column::sum);
  const T *h = plan.of_rows(row::right), *row_sum = plan.of_rows(row::sum);

  gather(
      plan,
      [&](int i, int j) {
        const T x = plan.P[int64_t(i) * plan.ld + j];
        return x > 0 ? x * x / (row_gain * row_sum[i]) : T(0);
      },
      static_cast<T*>(nullptr), d);
  plan.each_row([&](int i) {
    plan.of_rows(row::alpha)[i] = plan.row_margin.weight[i] > 0 ? h[i] / (row_gain * row_sum[i]) : T(0);
  });
  team.sync();
  column_products(plan, plan.of_rows(row::alpha));
  exchange_columns<Sum>(plan);
  T total[1] = {};
  each_column_sum<Sum>(plan, [&](int j, T s) {
    const T whole = gain * sum[j], diagonal = whole - d[j], floor = whole * T(1e-6);
    d[j] = b[j] > 0 ? 1 / (diagonal > floor ? diagonal : floor) : T(0);
    r[j] = b[j] > 0 ? k[j] - s : T(0);
    beta[j] = best[j] = 0;
    total[0] += r[j];
  });
  over_block<Sum>(team, plan.board, total);
  T mean = total[0] / modes, start[1] = {};
  plan.each_column([&](int j) {
    r[j] = b[j] > 0 ? r[j] - mean : T(0);
    p[j] = r[j] * d[j];
    start[0] += r[j] * p[j];
  });
  over_block<Sum>(team, plan.board, start);
  T energy = start[0], least = energy;
  const T wanted = goal * goal * energy;
  int stale = 0;
  int64_t step = 0;
  for (bool go = energy > 0 && limit > 0; go; ++step) {
    eliminate_rows(plan, p, static_cast<const T*>(nullptr));
    column_products(plan, plan.of_rows(row::alpha));
    exchange_columns<Sum>(plan);
    T dots[3] = {};  // p.q, sum of q, sum of r
    each_column_sum<Sum>(plan, [&](int j, T s) {
      q[j] = b[j] > 0 ? gain * sum[j] * p[j] + s : T(0);
      dots[0] += p[j] * q[j];
      dots[1] += q[j];
      dots[2] += r[j];
    });
    over_block<Sum>(team, plan.board, dots);
    const T length = energy / dots[0];
    if (!(dots[0] > 0) || !(length > 0)) {
      ++step;
      break;
    }
    mean = (dots[2] - length * dots[1]) / modes;
    T next[1] = {};
    plan.each_column([&](int j) {
      beta[j] += length * p[j];
      r[j] = b[j] > 0 ? r[j] - length * q[j] - mean : T(0);
      next[0] += r[j] * r[j] * d[j];
    });
    over_block<Sum>(team, plan.board, next);
    const bool better = next[0] < least;
    stale = better && next[0] < least * T(0.9) ? 0 : stale + 1;
    if (better) least = next[0];
    const T ratio = next[0] / energy;
    plan.each_column([&](int j) {
      if (better) best[j] = beta[j];
      p[j] = r[j] * d[j] + ratio * p[j];
    });
    team.sync();
    energy = next[0];
    go = energy > wanted && stale < patience && step + 1 < limit;
  }
  plan.each_column([&](int j) { beta[j] = best[j]; });
  team.sync();
  eliminate_rows(plan, beta, h);
  return step;
}

}  // namespace sfr::cuda

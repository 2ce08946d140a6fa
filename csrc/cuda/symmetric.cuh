// Iterations for the problem of a set of patches with itself: C = C^T and a = b, so f = g, and the rows are all there
// is. The rules are those of csrc/cpu/symmetric.h; what goes on around them is the solver's.
#pragma once

#include "scaling.cuh"

namespace sfr::cuda {

// A vector over the rows to the columns, which are the same patches. A barrier before and after.
template <class T>
SFR_DEVICE void rows_to_columns(Plan<T>& plan, const T* rows, T* columns) {
  Team& team = plan.team;
  if (team.blocks == 1) {
    team.sync();
    plan.each_column([&](int j) { columns[j] = rows[j]; });
  } else {
    const int turn = team.exchange();
    T* mine = plan.board.of_block(turn, team.blocks, team.block);
    team.sync();
    plan.each_row([&](int i) { mine[plan.first + i] = rows[i]; });
    team.meet();
    plan.each_column([&](int j) { columns[j] = plan.board.of_block(turn, team.blocks, j / plan.slab)[j]; });
  }
  team.sync();
}

// Both potentials become the mean of the rows' and the columns'.
template <class T>
SFR_DEVICE void meet_halfway(Plan<T>& plan) {
  T *F = plan.of_rows(row::log), *G = plan.of_columns(column::log);
  plan.each_row([&](int i) { F[i] = (F[i] + G[plan.first + i]) / 2; });
  rows_to_columns(plan, F, G);
}

// Near the solution every step halves the error: one that does not has met rounding.
template <class T>
SFR_DEVICE bool stalls(T error, T last) {
  return error < T(1e-3) && !(error < last * T(0.95));
}

// v <- sqrt(v w / (P v)), which is the mean of a potential and its update, until the marginal is within tol, at the
// edge of the scalings' range, or no longer gets nearer, which is looked at every few iterations. Leaves v in both
// scalings.
template <class T>
SFR_DEVICE void scale_symmetric(Plan<T>& plan, T tol, int64_t max_iter, int64_t& n_iter) {
  constexpr int every = 4;
  const Margin<T>& rows = plan.row_margin;
  T *u = plan.of_rows(row::scale), *v = plan.of_columns(column::scale);
  T last = T(INFINITY);
#pragma unroll 1
  for (int n = 1;; ++n) {
    ++n_iter;
    const bool look = n % every == 0 || n_iter >= max_iter;
    T seen[3] = {};  // error, edge, mass
    row_products(plan, v, [&](int i, T s) {
      if (!(rows.weight[i] > 0)) return;
      const T w = rows.goal_at(i, u[i]), next = relaxed(rows, u[i], s, w, T(1));
      if (look) {
        seen[0] += 2 * magnitude(u[i] * s - w);
        seen[1] += out_of_range(next);
        seen[2] += u[i] * s;
      }
      u[i] = sqrt_of(u[i] * next);
    });
    rows_to_columns(plan, u, v);
    if (!look) continue;
    over_team<Sum>(plan.team, plan.board, seen);
    const T error = plan.soft() ? seen[0] / seen[2] : seen[0];
    if (!(error > tol) || stalls(error, last) || n_iter >= max_iter || seen[1] > 0) return;
    last = error;
  }
}

}  // namespace sfr::cuda

// Solving the problem of a set of patches with itself: C = C^T and a = b, so f = g, and one side is all there is.
#pragma once

#include "scaling.h"
#include "solver.h"

namespace sfr::cpu::SFR_ISA {

// Both potentials become the mean of the rows' and the columns'.
template <class T>
void meet_halfway(const Team& team, Plan<T>& plan) {
  if (team.rank == 0)
    for (int64_t i = 0; i < plan.rows.count; ++i)
      plan.rows.log[i] = plan.columns.log[i] = (plan.rows.log[i] + plan.columns.log[i]) / 2;
  team.barrier();
}

// Near the solution every step halves the error: one that does not has met rounding.
template <class T>
bool stalls(T error, T last) {
  return error < T(1e-3) && !(error < last * T(0.95));
}

// v <- sqrt(v w / (P v)), which is the mean of a potential and its update, until the marginal is within tol, at the
// edge of the scalings' range, or no longer gets nearer. Leaves v in both scalings.
template <class T>
void scale_symmetric(const Team& team, Plan<T>& plan, T tol, int64_t max_iter, int64_t& n_iter) {
  Margin<T>&rows = plan.rows, &columns = plan.columns;
  T last = T(__builtin_inf());
  for (bool stop = false; !stop;) {
    ++n_iter;
    team.blocks(plan.blocks(), [&](int64_t b) {
      Vec<T> error{}, edge{}, mass{};
      for (int64_t i = b * plan.block(); i < plan.block_end(b); i += lanes<T>) {
        const Vec<T> bias = load(rows.bias + i);
        const Vec<T> s = row_products<lanes<T>>(plan.P + i * plan.ld, plan.ld, columns.scale) + bias;
        const Vec<T> v = load(rows.scale + i), w = rows.goal_at(i, v), next = relaxed<T>(rows, v, s, w, T(1));
        error += vabs<T>(v * s - w);
        mass += v * s - bias;
        store(rows.scale + i, vsqrt<T>(v * next));
        edge += out_of_range<T>(next);
      }
      plan.row_part[b] = sum_lanes<T>(error);
      plan.row_part2[b] = sum_lanes<T>(edge);
      plan.row_part3[b] = sum_lanes<T>(mass);
    });
    team.barrier();
    const T unit = plan.soft() ? sum_parts(plan.row_part3, plan.blocks()) : T(1);
    const T error = 2 * sum_parts(plan.row_part, plan.blocks()) / unit;
    stop = !(error > tol) || stalls(error, last) || n_iter >= max_iter || sum_parts(plan.row_part2, plan.blocks()) > 0;
    last = error;
    if (team.rank == 0) std::memcpy(columns.scale, rows.scale, sizeof(T) * rows.count);
    team.barrier();
  }
}

// From columns.log to a plan within tol, or as near as max_iter and rounding allow.
template <class T>
Solution<T> solve_symmetric(const Team& team, Plan<T>& plan, T tol, int64_t max_iter) {
  Solution<T> out;
  update_rows(team, plan);
  meet_halfway(team, plan);
  for (T last = T(__builtin_inf());;) {
    out.plan = evaluate<From::potentials>(team, plan);
    if (!(out.plan.error > tol) || out.n_iter >= max_iter || stalls(out.plan.error, last)) return out;
    if (out.plan.cold) {
      ++out.n_iter;
      update_rows(team, plan);
      meet_halfway(team, plan);
      last = T(__builtin_inf());
    } else {
      last = out.plan.error;
      scale_symmetric(team, plan, tol, max_iter, out.n_iter);
      absorb(team, plan);
    }
  }
}

}  // namespace sfr::cpu::SFR_ISA

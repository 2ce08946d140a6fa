// The passes over the plan of one problem that the solver is made of (../solver/passes.h), in warps and blocks.
#pragma once

#include "../solver/iterations.h"
#include "products.cuh"

namespace sfr::cuda {

// Exact update of F in the log domain: F_i = log2 a_i - log2 sum_j 2^(G_j - S_ij).
template <class T>
SFR_DEVICE void Plan<T>::update_rows() {
  const T* G = columns.log();
  T *most = rows.sum(), *F = rows.log();
  const auto exponent = [&](T entry, T log) { return log - (entry - centre) * factor; };
  row_terms<Max, false>(
      *this, cost, G, [](int) { return T(0); }, [&](int, int, T, T entry, T log, bool) { return exponent(entry, log); },
      [&](int i, T x) { most[i] = vmax<T>(x, Number<T>::lowest); });
  team.sync();
  row_terms<Sum, false>(
      *this, cost, G, [&](int i) { return most[i]; },
      [&](int, int, T least, T entry, T log, bool) {
        return exp2_of(exponent(entry, log) - least);  // hot: row updated
      },
      [&](int i, T sum) {
        F[i] = rows.weight[i] > 0 ? rows.updated(log2_of(rows.weight[i]), most[i], sum) : Max::nothing<T>();
      });
  team.sync();
}

// Exact update of G: G_j = log2 b_j - log2 sum_i 2^(F_i - S_ij).
template <class T>
SFR_DEVICE void Plan<T>::update_columns() {
  const T* F = rows.log();
  T *most = columns.sum(), *G = columns.log();
  column_terms<Max>(*this, cost, [&](int i, int, T c) { return F[i] - (c - centre) * factor; });
  exchange_columns<Max>(*this);
  each_column_sum<Max>(*this, [&](int j, T x) { most[j] = vmax<T>(x, Number<T>::lowest); });
  team.sync();
  column_terms<Sum>(*this, cost, [&](int i, int j, T c) { return exp2_of(F[i] - (c - centre) * factor - most[j]); });
  exchange_columns<Sum>(*this);
  each_column_sum<Sum>(*this, [&](int j, T sum) {
    G[j] = columns.weight[j] > 0 ? columns.updated(log2_of(columns.weight[j]), most[j], sum) : Max::nothing<T>();
  });
  team.sync();
}

// A vector over the rows to the columns, which are the same patches. A barrier before and after.
template <class T>
SFR_DEVICE void rows_to_columns(Plan<T>& plan, const T* of_rows, T* of_columns) {
  Team& team = plan.team;
  if (team.blocks == 1) {
    team.sync();
    plan.each_column([&](int j) { of_columns[j] = of_rows[j]; });
  } else {
    const int turn = team.exchange();
    T* mine = plan.buffer.of_block(turn, team.blocks, team.block);
    team.sync();
    plan.each_row([&](int i) { mine[plan.first + i] = of_rows[i]; });
    team.grid_barrier();
    plan.each_column([&](int j) { of_columns[j] = plan.buffer.of_block(turn, team.blocks, j / plan.slab)[j]; });
  }
  team.sync();
}

// Both potentials of a symmetric problem become the mean of the rows' and the columns'.
template <class T>
SFR_DEVICE void Plan<T>::average() {
  T *F = rows.log(), *G = columns.log();
  each_row([&](int i) { F[i] = (F[i] + G[first + i]) / 2; });
  rows_to_columns(*this, F, G);
}

// Compares a sum over the plan with what it should be at the potentials and scalings as they are: adds to the error,
// the relative error and the underflow.
template <bool exact, class T>
SFR_DEVICE void judge_sum(const Marginal<T>& side, int i, T sum, T log, T scale, T& error, T& relative, T& underflow) {
  if (!(side.weight[i] > 0)) return;
  if (side.has_reach())
    side.reach_target[i] = side.target_under_reach(log2_of(side.weight[i]), exact ? log : log + log2_of(scale));
  const T target = side.target()[i];
  const T apart = magnitude(sum - target);
  error += apart;
  if (!(sum > side.nothing() || target > side.nothing())) return;
  relative += apart / target;
  const T least = side.has_reach() ? Rules<T>::least_mass : T(0);
  if (sum < target * Rules<T>::least_mass || target < sum * least) underflow += 1;
}

// From the sums over the plan, and the errors, relative errors and underflows of both sides.
template <bool exact, class Plan, class T>
SFR_DEVICE Evaluation<T> evaluation(const Plan& plan, T value, T mass, const T (&of_rows)[3],
                                    const T (&of_columns)[3]) {
  const Marginal<T>&rows = plan.rows, &columns = plan.columns;
  Evaluation<T> result;
  result.mass = mass;
  result.value = plan.has_reach() ? value : value / mass;
  result.error = error_of_both(rows, columns, of_rows[0], of_columns[0], mass);
  result.relative =
      of_rows[1] / (T(plan.kept_rows) * rows.gain()) + of_columns[1] / (T(plan.kept_columns) * columns.gain());
  result.underflow = of_rows[2] + of_columns[2] > 0;
  result.exact = exact;
  return result;
}

template <class T>
template <From from>
SFR_DEVICE Evaluation<T> Plan<T>::evaluate_from() {
  constexpr bool exact = from == From::potentials;
  const T *F = rows.log(), *G = columns.log(), *u = rows.scale(), *v = columns.scale();
  T sums[5] = {};  // value, mass, error, relative error, underflow
  const auto judge = [&](const Marginal<T>& side, int i, T sum, T log, T scale) {
    judge_sum<exact>(side, i, sum, log, scale, sums[2], sums[3], sums[4]);
  };
  row_terms<Sum, true>(
      *this, exact ? cost : P, exact ? G : v, [&](int i) { return exact ? F[i] : u[i]; },
      [&](int, int, T of_row, T entry, T of_column, bool counts) {
        if constexpr (!exact) return entry * (of_row * of_column);
        const T p = exp2_of(of_row + of_column - (entry - centre) * factor);  // hot: evaluated
        sums[0] += counts && p > 0 ? p * entry : T(0);
        return p;
      },
      [&](int i, T sum) {
        rows.sum()[i] = sum;
        sums[1] += sum;
        judge(rows, i, sum, F[i], u[i]);
      });
  team.sync();
  column_terms<Sum>(*this, P, [](int, int, T entry) { return entry; });
  exchange_columns<Sum>(*this, sums);
  const T of_rows[3] = {sums[2], sums[3], sums[4]};
  sums[2] = sums[3] = sums[4] = 0;
  each_column_sum<Sum>(*this, [&](int j, T sum) {
    columns.sum()[j] = sum;
    judge(columns, j, sum, G[j], v[j]);
  });
  T of_columns[3] = {sums[2], sums[3], sums[4]};
  over_block<Sum>(team, buffer, of_columns);
  return evaluation<exact>(*this, sums[0], sums[1], of_rows, of_columns);
}

template <class T>
SFR_DEVICE Evaluation<T> Plan<T>::evaluate(From from) {
  if (from == From::columns || from == From::halfway) update_rows();
  if (from == From::halfway) average();
  if (from != From::scalings) return evaluate_from<From::potentials>();
  const Evaluation<T> out = evaluate_from<From::scalings>();
  absorb();
  return out;
}

template <class T>
SFR_DEVICE void Plan<T>::absorb() {
  const auto move = [](T* log, T* scale) {
    *log += log2_of(*scale);
    *scale = 1;
  };
  each_row([&](int i) { move(rows.log() + i, rows.scale() + i); });
  each_column([&](int j) { move(columns.log() + j, columns.scale() + j); });
  team.sync();
}

template <class T>
SFR_DEVICE ErrorSample<T> Plan<T>::scale_rows(bool sample, T omega) {
  T *u = rows.scale(), *v = columns.scale();
  T seen[3] = {};  // error, mass, at the edge
  row_products(*this, v, [&](int i, T s) {
    if (!(rows.weight[i] > 0)) return;
    const T a = rows.target_at(i, u[i]), next = relaxed<T>(rows, u[i], s, a, omega);
    if (sample) {
      seen[0] += magnitude(u[i] * s - a);
      seen[1] += u[i] * s;
      seen[2] += is_at_edge<T>(next);
    }
    u[i] = next;  // hot: row scaled
  });
  team.sync();
  column_products(*this, u);
  if (sample)
    exchange_columns<Sum>(*this, seen);
  else
    exchange_columns<Sum>(*this);
  return {seen[0], seen[1], seen[2] > 0};
}

// The columns' half of an iteration, by what the rows' has left in the partial sums.
template <class Plan, class T>
SFR_DEVICE ErrorSample<T> scale_columns_of(Plan& plan, bool sample, T omega) {
  const Marginal<T>& columns = plan.columns;
  T* v = columns.scale();
  T left[2] = {};  // error, at the edge
  each_column_sum<Sum>(plan, [&](int j, T t) {
    if (!(columns.weight[j] > 0)) return;
    const T next = relaxed<T>(columns, v[j], t, columns.target_at(j, v[j]), omega);
    if (sample) {
      left[0] += magnitude(next * t - columns.target_at(j, next));
      left[1] += is_at_edge<T>(next);
    }
    v[j] = next;  // hot: column scaled
  });
  if (sample)
    plan.template over_threads<Sum>(left);
  else
    plan.team.sync();
  return {left[0], T(0), left[1] > 0};
}

template <class T>
SFR_DEVICE ErrorSample<T> Plan<T>::scale_columns(bool sample, T omega) {
  return scale_columns_of(*this, sample, omega);
}

template <class T>
SFR_DEVICE ErrorSample<T> Plan<T>::scale_halfway(bool sample) {
  T *u = rows.scale(), *v = columns.scale();
  T seen[3] = {};  // error, mass, at the edge
  row_products(*this, v, [&](int i, T s) {
    if (!(rows.weight[i] > 0)) return;
    const T w = rows.target_at(i, u[i]), next = relaxed<T>(rows, u[i], s, w, T(1));
    if (sample) {
      seen[0] += magnitude(u[i] * s - w);
      seen[1] += u[i] * s;
      seen[2] += is_at_edge<T>(next);
    }
    u[i] = sqrt_of(u[i] * next);
  });
  rows_to_columns(*this, u, v);
  if (sample) over_team<Sum>(team, buffer, seen);
  return {seen[0], seen[1], seen[2] > 0};
}

template <class T>
SFR_DEVICE void Plan<T>::eliminate_rows(const T* v, const T* right) {
  T* step = rows.step();
  const T* sum = rows.sum();
  row_products(*this, v, [&](int i, T s) {
    step[i] = sum[i] > Rules<T>::nothing ? ((right ? right[i] : T(0)) - s) / (rows.gain() * sum[i]) : T(0);
  });
  team.sync();
}

// The rows' step, and P^T of it in the partial sums.
template <class T>
SFR_DEVICE void Plan<T>::eliminate(const T* v, const T* right) {
  eliminate_rows(v, right);
  column_products(*this, rows.step());
  exchange_columns<Sum>(*this);
}

template <class T>
template <class Op, int K, class F>
SFR_DEVICE void Plan<T>::reduce_column_products(T (&out)[K], F&& f) {
  Base::template clear<Op>(out);
  each_column_sum<Sum>(*this, [&](int j, T s) { f(j, s, out); });
  over_block<Op>(team, buffer, out);
}

template <class T>
template <class RowTerm, class ColumnTerm>
SFR_DEVICE void Plan<T>::gather(RowTerm&& row_term, ColumnTerm&& column_term, T* of_rows, T* of_columns) {
  row_terms<Sum, false>(
      *this, P, columns.weight, [](int) { return T(0); },
      [&](int i, int j, T, T entry, T, bool) { return row_term(i, j, entry); },
      [&](int i, T sum) { of_rows[i] = sum; });
  team.sync();  // mutant: no column's term reads what a row's term has written
  gather_columns(column_term, of_columns);
}

template <class T>
template <class Term>
SFR_DEVICE void Plan<T>::gather_columns(Term&& term, T* of_columns) {
  column_terms<Sum>(*this, P, term);
  exchange_columns<Sum>(*this);
  each_column_sum<Sum>(*this, [&](int j, T sum) { of_columns[j] = sum; });
  team.sync();
}

}  // namespace sfr::cuda

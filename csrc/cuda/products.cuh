// Products of a plan with vectors, and sums over its rows and columns: what the passes are made of.
#pragma once

#include "plan.cuh"

namespace sfr::cuda {

// f(i, (P v)_i), once for each row of the slab, by one lane.
template <class T, class F>
SFR_DEVICE void row_products(const Plan<T>& plan, const T* v, F&& f) {
  constexpr int run = 16 / int(sizeof(T));
  struct alignas(16) Run {
    T at[run];
  };
  const int lanes = plan.cover.lanes, runs = plan.ld / run;
#pragma unroll 1
  for (int base = 0; base < plan.rows.count; base += plan.row_groups) {
    const int i = base + plan.row_group;
    T sums[run] = {};
    if (i < plan.rows.count) {
      const Run* P = reinterpret_cast<const Run*>(plan.P + int64_t(i) * plan.ld);
      const Run* x = reinterpret_cast<const Run*>(v);
#pragma unroll 4
      for (int k = plan.row_lane; k < runs; k += lanes) {
        const Run p = P[k], q = x[k];
#pragma unroll
        for (int n = 0; n < run; ++n) sums[n] += p.at[n] * q.at[n];  // hot: row
      }
    }
    T sum = sums[0];
#pragma unroll
    for (int n = 1; n < run; ++n) sum += sums[n];
    sum = over_lanes<Sum>(sum, lanes);
    if (i < plan.rows.count && plan.row_lane == 0) f(i, sum);
  }
}

// This block's partial results over rows of term(i, j), to be exchanged.
template <class Op, class T, class Term>
SFR_DEVICE void column_terms(const Plan<T>& plan, Term&& term) {
  const Cover& cover = plan.cover;
  if (plan.slice >= cover.slices) return;
  const int begin = plan.slice * cover.slice_rows, step = cover.slices > 1 ? cover.width : plan.team.size;
  const int end = begin + cover.slice_rows < plan.rows.count ? begin + cover.slice_rows : plan.rows.count;
#pragma unroll 1
  for (int j = plan.column; j < plan.columns.count; j += step) {
    T parts[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) parts[k] = Op::template nothing<T>();
    int i = begin;
    for (; i + 4 <= end; i += 4)
#pragma unroll
      for (int k = 0; k < 4; ++k) parts[k] = Op()(parts[k], term(i + k, j));
    for (; i < end; ++i) parts[0] = Op()(parts[0], term(i, j));
    plan.partial[plan.slice * cover.width + j] = Op()(Op()(parts[0], parts[1]), Op()(parts[2], parts[3]));
  }
}

// Those of P^T u.
template <class T>
SFR_DEVICE void column_products(const Plan<T>& plan, const T* u) {
  column_terms<Sum>(plan, [&](int i, int j) { return plan.P[int64_t(i) * plan.ld + j] * u[i]; });  // hot: column
}

// The partial sums of this block's slices for column j.
template <class Op, class T>
SFR_DEVICE T of_slices(const Plan<T>& plan, int j) {
  T sum = plan.partial[j];
#pragma unroll 1
  for (int s = 1; s < plan.cover.slices; ++s) sum = Op()(sum, plan.partial[s * plan.cover.width + j]);  // hot: slice
  return sum;
}

// Makes the partial sums known to the whole team, for `each_column_sum`. A barrier.
template <class Op, class T>
SFR_DEVICE void exchange_columns(Plan<T>& plan) {
  Team& team = plan.team;
  team.sync();
  if (team.blocks == 1) return;
  T* mine = plan.buffer.of_block(team.exchange(), team.blocks, team.block);
  plan.each_column([&](int j) { mine[j] = of_slices<Op>(plan, j); });
  team.grid_barrier();
}

// The same, and x becomes its sum over the team.
template <class Op, int count, class T>
SFR_DEVICE void exchange_columns(Plan<T>& plan, T (&x)[count]) {
  Team& team = plan.team;
  over_block<Sum>(team, plan.buffer, x);
  if (team.blocks == 1) return;
  const int turn = team.exchange();
  T* mine = plan.buffer.of_block(turn, team.blocks, team.block);
  plan.each_column([&](int j) { mine[j] = of_slices<Op>(plan, j); });
  put_scalars(team, plan.buffer, turn, x);
  team.grid_barrier();
  add_scalars<Sum>(team, plan.buffer, turn, x);
}

// f(j, sum) for every column, by the same thread each time; after `exchange_columns`.
template <class Op, class T, class F>
SFR_DEVICE void each_column_sum(const Plan<T>& plan, F&& f) {
  const Team& team = plan.team;
  if (team.blocks == 1) {
    plan.each_column([&](int j) { f(j, of_slices<Op>(plan, j)); });
    return;
  }
  const int turn = team.exchange() ^ 1;  // the one that the last barrier was about
  plan.each_column([&](int j) {
    T sum = plan.buffer.of_block(turn, team.blocks, 0)[j];
#pragma unroll 1
    for (int b = 1; b < team.blocks; ++b) sum = Op()(sum, plan.buffer.of_block(turn, team.blocks, b)[j]);
    f(j, sum);
  });
}

// f(i, op over j of term(i, j)) for every row of the slab: a warp to a row.
template <class Op, class T, class Term, class F>
SFR_DEVICE void row_terms(const Plan<T>& plan, Term&& term, F&& f) {
  const Team& team = plan.team;
#pragma unroll 1
  for (int i = team.warp(); i < plan.rows.count; i += team.warps()) {
    T sum = Op::template nothing<T>();
#pragma unroll 1
    for (int j = team.lane(); j < plan.columns.count; j += warp_threads) sum = Op()(sum, term(i, j));
    sum = over_lanes<Op>(sum, warp_threads);
    if (team.lane() == 0) f(i, sum);
  }
}

}  // namespace sfr::cuda

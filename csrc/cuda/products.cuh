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

// Calls f(j, begin, end) for each quad of this thread's, columns j to j + 3, with the rows of its slice. What f returns
// of each column is the slice's partial result, to be exchanged.
template <class T, class F>
SFR_DEVICE void each_quad(const Plan<T>& plan, F&& f) {
  const Cover& cover = plan.cover;
  if (plan.slice >= cover.slices) return;
  const int begin = plan.slice * cover.slice_rows, step = cover.slices > 1 ? cover.quads() : plan.team.size;
  const int end = begin + cover.slice_rows < plan.rows.count ? begin + cover.slice_rows : plan.rows.count;
#pragma unroll 1
  for (int quad = plan.quad; quad < cover.quads(); quad += step) {
    const Four<T> found = f(4 * quad, begin, end);
    store_vector(plan.partial + plan.slice * cover.width + 4 * quad, found);
  }
}

// This block's partial results over rows of term(i, j, entry), of the plan's entries or the costs.
template <class Op, class T, class Term>
SFR_DEVICE void column_terms(const Plan<T>& plan, const T* entries, Term&& term) {
  each_quad(plan, [&](int j, int begin, int end) {
    Four<T> out;
#pragma unroll
    for (int k = 0; k < 4; ++k) out.at[k] = Op::template nothing<T>();
    const int columns = plan.columns.count - j;
    const T* row = plan.row_of(entries, begin) + j;
#pragma unroll 4
    for (int i = begin; i < end; ++i, row += plan.ld) {
      Four<T> four;
      if (columns >= 4) {
        four = load4(row);
      } else {  // what lies behind the last cost nobody has written
#pragma unroll
        for (int k = 0; k < 4; ++k) four.at[k] = k < columns ? row[k] : T(0);
      }
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int column = k < columns ? j + k : j;
        out.at[k] = Op()(out.at[k], term(i, column, four.at[k]));
      }
    }
    return out;
  });
}

// Those of P^T u.
template <class T>
SFR_DEVICE void column_products(const Plan<T>& plan, const T* u) {
  each_quad(plan, [&](int j, int begin, int end) {
    Four<T> out = {};
    const T* row = plan.row_of(plan.P, begin) + j;
    const auto add = [&](T scale) {
      const Four<T> p = load4(row);
#pragma unroll
      for (int k = 0; k < 4; ++k) out.at[k] += p.at[k] * scale;  // hot: column
      row += plan.ld;
    };
    int i = begin;
#pragma unroll 2
    for (; i + 4 <= end; i += 4) {
      const Four<T> scales = load4(u + i);
#pragma unroll
      for (int k = 0; k < 4; ++k) add(scales.at[k]);
    }
#pragma unroll 1
    for (; i < end; ++i) add(u[i]);
    return out;
  });
}

// The partial sums of this block's slices for column j.
template <class Op, class T>
SFR_DEVICE T of_slices(const Plan<T>& plan, int j) {
  T sum = plan.partial[j];
#pragma unroll 4
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
#pragma unroll 8
    for (int b = 1; b < team.blocks; ++b) sum = Op()(sum, plan.buffer.of_block(turn, team.blocks, b)[j]);
    f(j, sum);
  });
}

// f(i, op over j of term(i, j, read(row(i), j), counts)) for every row of the slab; see each_entry_of_rows. Where a row
// is used again it does not count.
template <class Op, class T, class Row, class Read, class Term, class F>
SFR_DEVICE void row_terms(const Plan<T>& plan, Row&& row, Read&& read, Term&& term, F&& f) {
  const Team& team = plan.team;
  const int rows = plan.rows.count;
#pragma unroll 1
  for (int first = team.warp() * rows_together; first < rows; first += team.warps() * rows_together) {
    T terms[rows_together];
#pragma unroll
    for (int r = 0; r < rows_together; ++r) terms[r] = Op::template nothing<T>();
    each_entry_of_rows(team.lane(), first, rows, plan.columns.count, row, read, [&](int r, int i, int j, auto found) {
      terms[r] = Op()(terms[r], term(i, j, found, first + r < rows));
    });
    constexpr int lanes = warp_threads / rows_together;
    const T own = folded<Op, warp_threads / 2>(terms, team.lane());
    const int i = first + team.lane() / lanes;
    if (team.lane() % lanes == 0 && i < rows) f(i, own);
  }
}

}  // namespace sfr::cuda

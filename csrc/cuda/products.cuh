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
  // What follows from a thread's place is found anew in each pass: else it takes registers of all others.
  const int group = afresh(plan.row_group), lanes = plan.cover.lanes, runs = plan.ld / run;
#pragma unroll 1
  for (int base = 0; base < plan.rows.count; base += plan.row_groups) {
    const int i = base + group;
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
  const int slice = afresh(plan.slice), quads = cover.quads();  // as above
  if (slice >= cover.slices) return;
  const int begin = slice * cover.slice_rows, step = cover.slices > 1 ? quads : plan.team.size;
  const int end = begin + cover.slice_rows < plan.rows.count ? begin + cover.slice_rows : plan.rows.count;
#pragma unroll 1
  for (int quad = plan.quad; quad < quads; quad += step) {
    const Four<T> found = f(4 * quad, begin, end);
    store_vector(plan.partial + slice * cover.width + 4 * quad, found);
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
      const Four<T> four = load4(row);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int column = k < columns ? j + k : j;
        out.at[k] = Op()(out.at[k], term(i, column, four.at[k]));  // hot: column summed
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

// f(i, op over j of term(i, j, row(i), entry, of_column, counts)) for every row of the slab, of its entries in a
// matrix, the plan or the costs, and of a vector over the columns. A lane is at four neighbouring columns of several
// rows, which it reads 16 bytes at a time, all before the first of it is used. In the place of rows behind the last one
// that one is used again: it must come to the same, and does not count; nor do columns behind the last one, where all
// is 0. `stores`: terms are the plan's entries from now on.
template <class Op, bool stores, class T, class Row, class Term, class F>
SFR_DEVICE void row_terms(const Plan<T>& plan, const T* matrix, const T* vector, Row&& row, Term&& term, F&& f) {
  const Team& team = plan.team;
  const int rows = plan.rows.count, columns = plan.columns.count;
#pragma unroll 1
  for (int first = team.warp() * rows_together; first < rows; first += team.warps() * rows_together) {
    int at[rows_together];
    T terms[rows_together];
    decltype(row(0)) of_row[rows_together];
#pragma unroll
    for (int r = 0; r < rows_together; ++r) {
      at[r] = first + r < rows ? first + r : rows - 1;
      of_row[r] = row(at[r]);
      terms[r] = Op::template nothing<T>();
    }
#pragma unroll 1
    for (int base = 0; base < columns; base += 4 * warp_threads) {
      const int j = base + 4 * team.lane(), left = columns - j;
      Four<T> of_column = {}, found[rows_together] = {};
      if (left > 0) {
        of_column = load4(vector + j);
#pragma unroll
        for (int r = 0; r < rows_together; ++r) found[r] = load4(plan.row_of(matrix, at[r]) + j);
      }
      sync_warp();  // mutant: the compiler would ask for a row when it needs it, and wait for each
      if (left > 0)
#pragma unroll
        for (int r = 0; r < rows_together; ++r) {
          Four<T> results;
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            const bool inside = k < left;
            const T result = term(at[r], j + k, of_row[r], found[r].at[k], of_column.at[k], inside && first + r < rows);
            results.at[k] = inside ? result : T(0);
            terms[r] = inside ? Op()(terms[r], result) : terms[r];
          }
          if constexpr (stores) store_vector(plan.at(at[r], j), results);
        }
    }
    constexpr int lanes = warp_threads / rows_together;
    const T own = folded<Op, warp_threads / 2>(terms, team.lane());
    const int i = first + team.lane() / lanes;
    if (team.lane() % lanes == 0 && i < rows) f(i, own);
  }
}

}  // namespace sfr::cuda

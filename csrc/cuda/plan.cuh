// The plan of one problem, and the passes over it that everything else is made of: evaluation from the potentials, a
// pair of matrix-vector products, and sums of a function of its entries. csrc/cpu/plan.h has the same on the CPU, with
// the same conventions: powers of two inside, P_ij = 2^(F_i + G_j - S_ij) with S = (C - mean) log2(e) / eps and
// F = f log2(e) / eps + log2 a.
//
// A team of several blocks splits the rows: each block holds a slab of P. Vectors over the rows are the slab's, vectors
// over the columns are held by every block, and what a block knows of the columns' sums is exchanged. A patch of weight
// 0 stays where it is: its potential is -inf, its row or column of P is 0, and nobody looks at its sums.
#pragma once

#include "../contracts/sinkhorn.h"
#include "pairwise.cuh"

namespace sfr::cuda {

constexpr double ln2 = 0.69314718055994530942;

// Vectors over the rows of a slab, and over the columns. Those of the linear system (system.cuh) stand here too, since
// all of them lie in one piece of memory. A problem with a reach has one more.
namespace row {
enum { log, scale, sum, alpha, right, count, bent = count };
}
namespace column {
enum { log, scale, sum, beta, right, residual, direction, product, diagonal, best, count, bent = count };
}

// How the threads of a block cover a slab; follows from its shape and the size of the team.
struct Cover {
  int lanes;       // that share a row in products, a power of two
  int width;       // columns in whole warps
  int slices;      // of the rows, summed by different warps
  int slice_rows;  // a multiple of 4

  SFR_BOTH Cover(int rows, int columns, int threads, bool streamed) {
    lanes = 1;
    while (lanes < warp_threads && rows * lanes * 2 <= threads) lanes *= 2;
    if (streamed) lanes = warp_threads;  // neighbouring lanes then read neighbouring addresses
    width = (columns + warp_threads - 1) / warp_threads * warp_threads;
    slices = threads > width ? threads / width : 1;
    slice_rows = ((rows + slices - 1) / slices + 3) / 4 * 4;
  }

  // Length of a row of P: whole groups of 4 columns, runs of 16 bytes, an odd number of them for each lane, so that the
  // lanes of a warp meet in no bank of shared memory.
  template <class T>
  SFR_BOTH int row_length(int columns) const {
    const int run = 16 / int(sizeof(T)), runs = (columns + 3) / 4 * 4 / run;
    const int each = (runs + lanes - 1) / lanes;
    const bool spread = lanes < 8;
    return (spread ? (each | 1) * lanes : runs) * run;
  }
};

// One side's marginal.
template <class T>
struct Margin {
  T* weight = nullptr;  // 0 where a patch is removed
  // A side with a reach: the plan's marginal bends to a e^(-f / reach).
  T total = 1;        // sum of the weights, 1 without a reach
  T soft = 0;         // eps / reach; 0: the marginal is met
  T offset = 0;       // mean / (2 reach) in powers of two: f is that of C, F that of C - mean
  T* bent = nullptr;  // the marginal bent by the potentials, where there is a patch

  // Gives the side a reach, in units of the cost like eps and mean; whoever calls gives the weights their own sum.
  SFR_DEVICE void bend(T reach, T eps, T mean, T sum_of_weights) {
    soft = eps / reach;
    offset = mean / (2 * reach) * T(1 / ln2);
    total = sum_of_weights;
  }

  // What the plan's marginal should be.
  SFR_DEVICE T goal(int i) const { return soft > 0 ? bent[i] : weight[i]; }
  // Where the potentials stand at `log`.
  SFR_DEVICE void bend_to(int i, T log) const {
    const T start = log2_of(weight[i]);
    bent[i] = exp2_of(start - soft * (log - start) - offset);
  }
  // ... and where a scaling of x more brings it.
  SFR_DEVICE T goal_at(int i, T x) const { return soft > 0 ? bent[i] * exp2_of(-soft * log2_of(x)) : weight[i]; }
  // How much faster than the marginal its distance from the goal follows the potential.
  SFR_DEVICE T gain() const { return 1 + soft; }
};

template <class T>
struct Plan {
  Team& team;
  int N, M;         // of the whole problem
  int slab;         // rows of a block, but for the last
  int first, rows;  // of this one
  Cover cover;
  int ld;         // row length of P and of the cost
  const T* cost;  // [rows][ld] of the slab
  T* P;           // likewise; padding 0
  Margin<T> row_margin, column_margin;
  int kept_columns;
  T *row_vectors, *column_vectors;
  int row_stride, column_stride;
  T* partial;  // [slices][width]
  Board<T> board;
  T mean = 0, factor = 0;  // S = (C - mean) factor
  // This thread's place in the cover: in products by rows, and in sums over columns.
  int row_lane, row_group, row_groups, slice, column;

  SFR_DEVICE Plan(Team& of, const Cover& by) : team(of), cover(by) {
    row_lane = team.rank & (cover.lanes - 1);
    row_group = team.rank / cover.lanes;
    row_groups = team.size / cover.lanes;
    slice = cover.slices > 1 ? team.rank / cover.width : 0;
    column = team.rank - slice * cover.width;
  }
  // Is there a reach?
  SFR_DEVICE bool soft() const { return row_margin.soft > 0 || column_margin.soft > 0; }
  SFR_DEVICE T* of_rows(int k) const { return row_vectors + k * row_stride; }
  SFR_DEVICE T* of_columns(int k) const { return column_vectors + k * column_stride; }

  template <class F>
  SFR_DEVICE void each_row(F&& f) const {
#pragma unroll 1
    for (int i = team.rank; i < rows; i += team.size) f(i);
  }
  template <class F>
  SFR_DEVICE void each_column(F&& f) const {
#pragma unroll 1
    for (int j = team.rank; j < M; j += team.size) f(j);
  }
  // Entries with neighbouring lanes on neighbouring columns, a warp to a row.
  template <class F>
  SFR_DEVICE void each_entry(F&& f) const {
#pragma unroll 1
    for (int i = team.warp(); i < rows; i += team.warps())
#pragma unroll 1
      for (int j = team.lane(); j < M; j += warp_threads) f(i, j);
  }
};

// f(i, (P v)_i), once for each row of the slab, by one lane.
template <class T, class F>
SFR_DEVICE void row_products(const Plan<T>& plan, const T* v, F&& f) {
  constexpr int run = 16 / int(sizeof(T));
  struct alignas(16) Run {
    T at[run];
  };
  const int lanes = plan.cover.lanes, runs = plan.ld / run;
#pragma unroll 1
  for (int base = 0; base < plan.rows; base += plan.row_groups) {
    const int i = base + plan.row_group;
    T sums[run] = {};
    if (i < plan.rows) {
      const Run* P = reinterpret_cast<const Run*>(plan.P + int64_t(i) * plan.ld);
      const Run* x = reinterpret_cast<const Run*>(v);
#pragma unroll 4
      for (int k = plan.row_lane; k < runs; k += lanes) {
        const Run p = P[k], q = x[k];
#pragma unroll
        for (int n = 0; n < run; ++n) sums[n] += p.at[n] * q.at[n];
      }
    }
    T sum = sums[0];
#pragma unroll
    for (int n = 1; n < run; ++n) sum += sums[n];
    sum = over_lanes<Sum>(sum, lanes);
    if (i < plan.rows && plan.row_lane == 0) f(i, sum);
  }
}

// This block's partial results over rows of term(i, j), to be exchanged.
template <class Op, class T, class Term>
SFR_DEVICE void column_terms(const Plan<T>& plan, Term&& term) {
  const Cover& cover = plan.cover;
  if (plan.slice >= cover.slices) return;
  const int begin = plan.slice * cover.slice_rows, step = cover.slices > 1 ? cover.width : plan.team.size;
  const int end = begin + cover.slice_rows < plan.rows ? begin + cover.slice_rows : plan.rows;
#pragma unroll 1
  for (int j = plan.column; j < plan.M; j += step) {
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
  column_terms<Sum>(plan, [&](int i, int j) { return plan.P[int64_t(i) * plan.ld + j] * u[i]; });
}

// The partial sums of this block's slices for column j.
template <class Op, class T>
SFR_DEVICE T of_slices(const Plan<T>& plan, int j) {
  T sum = plan.partial[j];
#pragma unroll 1
  for (int s = 1; s < plan.cover.slices; ++s) sum = Op()(sum, plan.partial[s * plan.cover.width + j]);
  return sum;
}

// Makes the partial sums known to the whole team, for `each_column_sum`. A barrier.
template <class Op, class T>
SFR_DEVICE void exchange_columns(Plan<T>& plan) {
  Team& team = plan.team;
  team.sync();
  if (team.blocks == 1) return;
  T* mine = plan.board.of_block(team.exchange(), team.blocks, team.block);
  plan.each_column([&](int j) { mine[j] = of_slices<Op>(plan, j); });
  team.meet();
}

// The same, and x becomes its sum over the team.
template <class Op, int count, class T>
SFR_DEVICE void exchange_columns(Plan<T>& plan, T (&x)[count]) {
  Team& team = plan.team;
  over_block<Sum>(team, plan.board, x);
  if (team.blocks == 1) return;
  const int turn = team.exchange();
  T* mine = plan.board.of_block(turn, team.blocks, team.block);
  plan.each_column([&](int j) { mine[j] = of_slices<Op>(plan, j); });
  put_scalars(team, plan.board, turn, x);
  team.meet();
  add_scalars<Sum>(team, plan.board, turn, x);
}

// f(j, sum) for every column, by the same thread each time; after `exchange_columns`.
template <class Op, class T, class F>
SFR_DEVICE void each_column_sum(const Plan<T>& plan, F&& f) {
  const Team& team = plan.team;
  if (team.blocks == 1) {
    plan.each_column([&](int j) { f(j, of_slices<Op>(plan, j)); });
    return;
  }
  const int turn = team.exchange() ^ 1;  // the one that the last meeting was about
  plan.each_column([&](int j) {
    T sum = plan.board.of_block(turn, team.blocks, 0)[j];
#pragma unroll 1
    for (int b = 1; b < team.blocks; ++b) sum = Op()(sum, plan.board.of_block(turn, team.blocks, b)[j]);
    f(j, sum);
  });
}

// f(i, op over j of term(i, j)) for every row of the slab: a warp to a row.
template <class Op, class T, class Term, class F>
SFR_DEVICE void row_terms(const Plan<T>& plan, Term&& term, F&& f) {
  const Team& team = plan.team;
#pragma unroll 1
  for (int i = team.warp(); i < plan.rows; i += team.warps()) {
    T sum = Op::template nothing<T>();
#pragma unroll 1
    for (int j = team.lane(); j < plan.M; j += warp_threads) sum = Op()(sum, term(i, j));
    sum = over_lanes<Op>(sum, warp_threads);
    if (team.lane() == 0) f(i, sum);
  }
}

// What one wants to know of a plan.
template <class T>
struct Evaluation {
  T value = 0;        // <P, C> / sum(P): what rounding does to the mass does nothing to it; with a reach <P, C>
  T mass = 0;         // sum(P)
  T error = 0;        // L1 error of both marginals, with a reach in units of the mass
  bool cold = false;  // some patch holds so little of its mass that scaling could not bring it back
};

enum class From {
  potentials,  // P = 2^(F + G - S): what the potentials mean, to the last bit
  scalings,    // P <- u P v: the same up to rounding, without exponentials; the value is left out
};

template <class T>
SFR_DEVICE T magnitude(T x) {
  return x < 0 ? -x : x;
}

// P, its marginals (row::sum, column::sum), and its evaluation.
template <From from, class T>
SFR_DEVICE Evaluation<T> evaluate(Plan<T>& plan) {
  constexpr bool exact = from == From::potentials;
  const Team& team = plan.team;
  const T *F = plan.of_rows(row::log), *G = plan.of_columns(column::log);
  const T *u = plan.of_rows(row::scale), *v = plan.of_columns(column::scale);
  T sums[4] = {};  // value, mass, error, cold
  const auto judge = [&](const Margin<T>& side, int i, T sum, T log, T scale) {
    if (!(side.weight[i] > 0)) return;
    if (side.soft > 0) side.bend_to(i, exact ? log : log + log2_of(scale));
    const T goal = side.goal(i);
    sums[2] += magnitude(sum - goal);
    if (sum < goal * T(1e-6)) sums[3] += 1;
  };
  row_terms<Sum>(
      plan,
      [&](int i, int j) {
        T* P = plan.P + int64_t(i) * plan.ld + j;
        if constexpr (exact) {
          const T c = plan.cost[int64_t(i) * plan.ld + j];
          *P = exp2_of(F[i] + G[j] - (c - plan.mean) * plan.factor);
          sums[0] += *P * c;
        } else {
          *P *= u[i] * v[j];
        }
        sums[1] += *P;
        return *P;
      },
      [&](int i, T sum) {
        plan.of_rows(row::sum)[i] = sum;
        judge(plan.row_margin, i, sum, F[i], u[i]);
      });
  team.sync();
  column_terms<Sum>(plan, [&](int i, int j) { return plan.P[int64_t(i) * plan.ld + j]; });
  exchange_columns<Sum>(plan, sums);
  const T of_rows[2] = {sums[2], sums[3]};
  sums[2] = sums[3] = 0;
  each_column_sum<Sum>(plan, [&](int j, T sum) {
    plan.of_columns(column::sum)[j] = sum;
    judge(plan.column_margin, j, sum, G[j], v[j]);
  });
  T of_columns[2] = {sums[2], sums[3]};
  over_block<Sum>(plan.team, plan.board, of_columns);
  Evaluation<T> result;
  result.mass = sums[1];
  result.value = plan.soft() ? sums[0] : sums[0] / sums[1];
  result.error = of_rows[0] + of_columns[0];
  if (plan.soft() && result.error > 0) result.error /= result.mass;
  result.cold = of_rows[1] + of_columns[1] > 0;
  return result;
}

// The scalings move into the potentials.
template <class T>
SFR_DEVICE void absorb(const Plan<T>& plan) {
  const auto move = [](T* log, T* scale) {
    *log += log2_of(*scale);
    *scale = 1;
  };
  plan.each_row([&](int i) { move(plan.of_rows(row::log) + i, plan.of_rows(row::scale) + i); });
  plan.each_column([&](int j) { move(plan.of_columns(column::log) + j, plan.of_columns(column::scale) + j); });
  plan.team.sync();
}

}  // namespace sfr::cuda

// A plan in shared memory whose entries the threads also hold in registers while products of it are taken again and
// again: in iterations, and in steps of conjugate gradients. All other passes are those of passes.cuh.
//
// A warp holds some rows and all columns of them. Products by rows meet within 8 lanes, those by columns in the partial
// sums that other plans have of slices: one from each warp. Vectors are shared by all; two barriers an iteration.
#pragma once

#include "passes.cuh"

namespace sfr::cuda {

// What a thread holds; apart from the plan's description, as in tile_plan.cuh. 0 outside of the problem.
template <class T>
struct HeldEntries {
  Four<T> quads[HeldShape::tile_rows][HeldShape::quads];
  T last[HeldShape::tile_rows];
};

template <class T>
struct HeldPlan : Plan<T> {
  using Base = Plan<T>;
  using Base::buffer, Base::columns, Base::ld, Base::partial, Base::rows, Base::team;

  static constexpr int R = HeldShape::tile_rows, quads = HeldShape::quads;
  static constexpr int row_lanes = 8, most_rows = 8;  // lanes of a row, each of which has one of a tile's rows
  static_assert(R < most_rows && quads % 2 == 0);

  Base& whole;
  HeldEntries<T>& entries;
  int share, group;      // of its warp's lanes
  int row0;              // the tile's first row, and its columns:
  int column0, column1;  // the first of a quad, and the one beside the quads

  SFR_DEVICE HeldPlan(Team& known, Base& plan, HeldEntries<T>& of) : Base(known, plan), whole(plan), entries(of) {
    share = team.lane() % row_lanes, group = team.lane() / row_lanes;
    row0 = (team.warp() * HeldShape::groups + group) * R;
    column0 = 4 * share, column1 = HeldShape::of_quads + share;
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const bool kept = row0 + r < rows.count;
#pragma unroll
      for (int q = 0; q < quads; ++q) {
        entries.quads[r][q] = Four<T>{};
        if (kept && column(q) < ld) entries.quads[r][q] = load4(Base::at(row0 + r, column(q)));
      }
      entries.last[r] = kept && column1 < ld ? *Base::at(row0 + r, column1) : T(0);
    }
  }

  SFR_DEVICE int column(int quad) const { return column0 + HeldShape::quad_columns * quad; }
  // The lane's own row: one of the tile's, but for the last lane's, which has none.
  SFR_DEVICE int own_row() const { return row0 + share; }
  SFR_DEVICE bool owns_row() const { return share < R && own_row() < rows.count; }
  SFR_DEVICE T own(const T* of_rows) const { return owns_row() ? of_rows[own_row()] : T(0); }

  // What each thread has, over all of them: `over_block` without its loops.
  template <class Op, int K>
  SFR_DEVICE void over_threads(T (&x)[K]) {
    over_all_lanes<Op, K>(x);
    T* parts = buffer.warps + team.turn * most_warps * most_scalars;
    team.turn ^= 1;
    if (team.lane() == 0)
#pragma unroll
      for (int k = 0; k < K; ++k) parts[team.warp() * most_scalars + k] = x[k];
    team.sync();
#pragma unroll
    for (int k = 0; k < K; ++k) {
      x[k] = parts[k];
#pragma unroll
      for (int w = 1; w < HeldShape::warps; ++w) x[k] = Op()(x[k], parts[w * most_scalars + k]);
    }
  }

  // Of columns, each has a thread of its own.
  template <class F>
  SFR_DEVICE void each_column(F&& f) const {
    if (team.rank < columns.count) f(team.rank);
  }
  template <class Op, int K, class F>
  SFR_DEVICE void reduce_columns(T (&out)[K], F&& f) {
    Base::Base::template clear<Op>(out);
    each_column([&](int j) { f(j, out); });
    over_threads<Op>(out);
  }
  template <class Op, int K, class F>
  SFR_DEVICE void reduce_column_products(T (&out)[K], F&& f) {
    Base::Base::template clear<Op>(out);
    each_column_sum<Sum>(*this, [&](int j, T s) { f(j, s, out); });
    over_threads<Op>(out);
  }
  template <class Term>
  SFR_DEVICE void gather_columns(Term&& term, T* of_columns) {
    whole.gather_columns(term, of_columns);
  }

  // (P v) of the lane's own row.
  SFR_DEVICE T row_product(const T* v) const {
    T sums[most_rows] = {};
    const auto add = [&](int r, T entry, T x) { sums[r] += entry * x; };  // hot: held row
#pragma unroll
    for (int q = 0; q < quads; ++q) {
      const Four<T> x = load4(v + column(q));
#pragma unroll
      for (int r = 0; r < R; ++r) {
        const Four<T>& four = entries.quads[r][q];
#pragma unroll
        for (int k = 0; k < 4; ++k) add(r, four.at[k], x.at[k]);
      }
    }
    const T x = v[column1];
#pragma unroll
    for (int r = 0; r < R; ++r) add(r, entries.last[r], x);
    return folded<Sum, row_lanes / 2>(sums, team.lane());
  }

  // The warp's part of P^T u, from each lane's own entry of u.
  SFR_DEVICE void column_products(T own) const {
    T u[R];
#pragma unroll
    for (int r = 0; r < R; ++r) u[r] = shuffle(own, (team.lane() & ~(row_lanes - 1)) | r);
    T* parts = partial + team.warp() * HeldShape::columns;
    const auto add = [&](T& sum, T entry, int r) { sum += entry * u[r]; };  // hot: held column
    const auto product = [&](int q) {
      Four<T> sum = {};
#pragma unroll
      for (int r = 0; r < R; ++r) {
        const Four<T>& four = entries.quads[r][q];
#pragma unroll
        for (int k = 0; k < 4; ++k) add(sum.at[k], four.at[k], r);
      }
      return sum;
    };
    // Over the four groups: each step halves what a lane has to do with.
    const bool upper = group & 1, odd = group & 2;
    struct alignas(2 * sizeof(T)) Two {
      T at[2];
    };
#pragma unroll
    for (int q = 0; q < quads / 2; ++q) {
      const Four<T> low = product(q), high = product(q + quads / 2);
      T half[4];
      Two two;
#pragma unroll
      for (int k = 0; k < 4; ++k)
        half[k] = (upper ? high.at[k] : low.at[k]) + shuffle_xor(upper ? low.at[k] : high.at[k], row_lanes);
#pragma unroll
      for (int k = 0; k < 2; ++k)
        two.at[k] = (odd ? half[2 + k] : half[k]) + shuffle_xor(odd ? half[k] : half[2 + k], 2 * row_lanes);
      *reinterpret_cast<Two*>(parts + column(q + (upper ? quads / 2 : 0)) + (odd ? 2 : 0)) = two;
    }
    T last = 0;
#pragma unroll
    for (int r = 0; r < R; ++r) add(last, entries.last[r], r);
    last += shuffle_xor(last, row_lanes);
    last += shuffle_xor(last, 2 * row_lanes);
    if (group == 0) parts[column1] = last;
  }

  SFR_DEVICE ErrorSample<T> scale_rows(bool sample, T omega) {
    const T weight = own(rows.weight), u = own(rows.scale());  // no plan that is held has a reach
    const T s = row_product(columns.scale());
    const bool kept = weight > 0;
    const T scaled = relaxed<T>(rows, u, s, weight, omega), next = kept ? scaled : u;
    T seen[3] = {};  // error, mass, at the edge
    if (sample && kept) {
      seen[0] = magnitude(u * s - weight);
      seen[1] = u * s;
      seen[2] = is_at_edge<T>(scaled);
    }
    if (owns_row()) rows.scale()[own_row()] = next;  // hot: held row scaled
    column_products(next);
    if (sample)
      over_threads<Sum>(seen);
    else
      team.sync();
    return {seen[0], seen[1], seen[2] > 0};
  }
  SFR_DEVICE ErrorSample<T> scale_columns(bool sample, T omega) { return scale_columns_of(*this, sample, omega); }

  // The lane's own row of the step.
  SFR_DEVICE T own_step(const T* v, const T* right) {
    const T sum = own(rows.sum()), h = right ? own(right) : T(0), s = row_product(v);
    const T step = sum > Rules<T>::nothing ? quotient<T>(h - s, rows.gain() * sum) : T(0);
    if (owns_row()) rows.step()[own_row()] = step;
    return step;
  }
  SFR_DEVICE void eliminate_rows(const T* v, const T* right) {
    own_step(v, right);
    team.sync();
  }
  SFR_DEVICE void eliminate(const T* v, const T* right) {
    column_products(own_step(v, right));
    team.sync();
  }
};

// The warps' sums of the thread's own column.
template <class Op, class T, class F>
SFR_DEVICE void each_column_sum(const HeldPlan<T>& plan, F&& f) {
  plan.each_column([&](int j) {
    T sum = plan.partial[j];
#pragma unroll
    for (int w = 1; w < most_warps; ++w) sum = Op()(sum, plan.partial[w * HeldShape::columns + j]);  // hot: held sum
    f(j, sum);
  });
}

// A plan whose entries threads may hold.
template <class T>
struct NearPlan : Plan<T> {
  bool held;  // there is room for it

  SFR_DEVICE NearPlan(const Plan<T>& plan, bool is_held) : Plan<T>(plan), held(is_held) {}

  template <class F>
  SFR_DEVICE auto with_products(const F& f) {
    if (held) {
      Team& team = Plan<T>::team;
      Team known = team;
      known.size = HeldShape::threads, known.barrier = whole_barrier;  // constants from here on
      HeldEntries<T> entries;
      HeldPlan<T> plan(known, *this, entries);
      const auto result = f(plan);
      team.turn = known.turn;
      return result;
    }
    return f(*this);
  }
};

}  // namespace sfr::cuda

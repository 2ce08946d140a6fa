// A plan that lies in registers, of a problem small enough: each thread of a few warps holds a tile of the plan and of
// the costs. The passes of passes.cuh once more, for this plan.
//
// What blocks are to a plan in several slabs, warps are to this one: each holds some rows and all columns. It has its
// own copy of every vector over the columns, and reads no rows but its own, so that lanes meet within their warp alone;
// the columns' sums over all rows are exchanged, which takes one barrier, and comes to the same bits in each warp.
// Where one warp has all rows, there is nothing to exchange.
#pragma once

#include "pairwise.cuh"
#include "passes.cuh"

namespace sfr::cuda {

// What a thread holds of its problem. Apart from the plan: what is known of that when it is compiled, such as that
// there is no reach, the compiler sees before it has found that no index into these varies.
template <class T>
struct TileEntries {
  static constexpr TileShape shape = tiles64;
  static constexpr int rows = shape.tile_rows, columns = 4 * shape.groups;
  // 0 outside of the problem, where potentials are -inf and everything else is 0.
  T P[rows][columns], C[rows][columns];
  T total[shape.groups];  // of the lane's own columns, after an exchange
};

template <class T>
struct TilePlan : AnyPlan<T, TilePlan<T>> {
  using Base = AnyPlan<T, TilePlan<T>>;
  using Base::centre, Base::columns, Base::factor, Base::has_reach, Base::rows;

  static constexpr TileShape shape = tiles64;
  static constexpr int R = shape.tile_rows, E = 4 * shape.groups;  // of a tile
  static constexpr int own_columns = shape.groups;                 // of a lane, next to each other
  static constexpr int row_lanes = 8, same_row = row_lanes / R;  // lanes of a row; those with the same row of their own
  static_assert(R == 4 && shape.groups == 2, "the order in which lanes halve their sums");

  TileEntries<T>& entries;
  T* partial;
  const T* cost;  // [rows][ld], as they were loaded
  T* spare;       // likewise: room for the plan
  int ld;
  int turn = 0;
  bool alone;  // one warp
  int lane, warp;
  int row0, column0;  // the first of the tile
  int own_row, own_column;

  SFR_DEVICE TilePlan(const Team& team, TileEntries<T>& of)
      : entries(of), alone(team.warps() == 1), lane(team.lane()), warp(team.warp()) {
    const int share = lane % row_lanes, group = lane / row_lanes;
    row0 = (warp * 4 + group) * R;
    column0 = share * 4;
    own_row = row0 + share / same_row;
    own_column = column0 + 32 * (group & 1) + 2 * (group >> 1);
    clear();
  }

  SFR_DEVICE bool owns_row() const { return lane % same_row == 0; }  // else a neighbour does

  // Entry (r, e) of the tile.
  SFR_DEVICE int row(int r) const { return row0 + r; }
  SFR_DEVICE int column(int e) const { return column0 + e / 4 * 32 + e % 4; }
  SFR_DEVICE bool inside(int r, int e) const { return row(r) < rows.count && column(e) < columns.count; }
  SFR_DEVICE T* at(int i, int j) { return &entries.P[i - row0][(j - column0) / 32 * 4 + (j - column0) % 4]; }
  SFR_DEVICE T cost_at(int i, int j) const { return entries.C[i - row0][(j - column0) / 32 * 4 + (j - column0) % 4]; }
  SFR_DEVICE T centred(int i, int j) const { return cost_at(i, j) - centre; }
  template <class F>
  SFR_DEVICE void each_entry(F&& f) const {
#pragma unroll
    for (int r = 0; r < R; ++r)
#pragma unroll
      for (int e = 0; e < E; ++e)
        if (inside(r, e)) f(r, e);
  }

  SFR_DEVICE bool has_columns() const { return warp == 0; }
  SFR_DEVICE bool reports() const { return warp == 0 && lane == 0; }
  SFR_DEVICE void sync() const { sync_warp(); }
  SFR_DEVICE void sync_solvers() const {
    if (alone)
      sync_warp();
    else
      sync_threads(solvers_barrier, shape.threads());
  }
  SFR_DEVICE void clear() {
#pragma unroll
    for (int r = 0; r < R; ++r)
#pragma unroll
      for (int e = 0; e < E; ++e) entries.P[r][e] = 0;
  }
  SFR_DEVICE void load(const T* from, T (&tile)[R][E]) const {
#pragma unroll
    for (int r = 0; r < R; ++r)
#pragma unroll
      for (int e = 0; e < E; ++e) tile[r][e] = inside(r, e) ? from[row(r) * ld + column(e)] : T(0);
  }
  template <class F>
  SFR_DEVICE auto with_products(const F& f) {
    return f(*this);
  }
  // Those who solve, as others describe them.
  SFR_DEVICE Team solvers() const {
    Team all;
    all.rank = warp * warp_threads + lane;
    all.size = alone ? warp_threads : shape.threads();
    all.barrier = solvers_barrier;
    return all;
  }
  // Functions are called: what the tile holds is loaded again after them, so that it takes no registers meanwhile.
  SFR_DEVICE Cholesky<T> cholesky() const {
    return Cholesky<T>(Base::factors->memory, solvers(), Base::factorised(spare, ld));
  }
  SFR_DEVICE void load_again() {
    load(spare, entries.P);
    load(cost, entries.C);
  }
  SFR_DEVICE void factorise(const T* null, bool loose) {
    leave(spare, ld);
    cholesky().factorise(null, loose);
    load_again();
  }
  SFR_DEVICE void solve_factorised(const T* right, T* out) {
    Cholesky<T> factors = cholesky();
    factors.solve(right);
    load_again();
    each_column([&](int j) { out[j] = factors.solution(j); });
    sync_warp();
  }
  // The plan to where others read it.
  SFR_DEVICE void leave(T* out, int ld) const {
    each_entry([&](int r, int e) { out[row(r) * ld + column(e)] = entries.P[r][e]; });
  }

  template <class F>
  SFR_DEVICE void each_row(F&& f) const {
    if (own_row < rows.count && owns_row()) f(own_row);
  }
  template <class F>
  SFR_DEVICE void each_column(F&& f) const {
#pragma unroll
    for (int k = 0; k < own_columns; ++k)
      if (own_column + k < columns.count) f(own_column + k);
  }
  template <class Op, int K, class F>
  SFR_DEVICE void reduce_rows(T (&out)[K], F&& f) {
    Base::template clear<Op>(out);
    each_row([&](int i) { f(i, out); });
    over_warps<Op>(out);
  }
  template <class Op, int K, class F>
  SFR_DEVICE void reduce_columns(T (&out)[K], F&& f) {
    Base::template clear<Op>(out);
    each_column([&](int j) { f(j, out); });
    over_warp<Op>(out);
  }
  template <class Op, int K, class F>
  SFR_DEVICE void reduce_column_products(T (&out)[K], F&& f) {
    Base::template clear<Op>(out);
    each_column([&](int j) { f(j, entries.total[j - own_column], out); });
    over_warp<Op>(out);
  }
  template <class Op, int K, class F>
  SFR_DEVICE void reduce_entries(T (&out)[K], F&& f) {
    Base::template clear<Op>(out);
    each_entry([&](int r, int e) { f(row(r), column(e), out); });
    over_warps<Op>(out);
  }
  template <class Op, int K, class F>
  SFR_DEVICE void reduce_costs(T (&out)[K], F&& f) {
    reduce_entries<Op>(out, [&](int i, int j, T(&found)[K]) { f(i, j, cost_at(i, j), found); });
  }

  // Of a vector: what lies at the tile's rows, at its columns, or at the lane's own columns.
  struct OfRows {
    T at[R];
  };
  struct OfColumns {
    T at[E];
  };
  struct alignas(sizeof(T) * own_columns) Own {
    T at[own_columns];
  };
  SFR_DEVICE Own own(const T* v) const { return *reinterpret_cast<const Own*>(v + own_column); }
  SFR_DEVICE OfRows at_rows(const T* v) const {
    OfRows out;
    const Four<T> four = load4(v + row0);
#pragma unroll
    for (int r = 0; r < R; ++r) out.at[r] = four.at[r];
    return out;
  }
  SFR_DEVICE OfColumns at_columns(const T* v) const {
    OfColumns out;
#pragma unroll
    for (int e = 0; e < E; e += 4) {
      const Four<T> four = load4(v + column0 + 8 * e);
#pragma unroll
      for (int k = 0; k < 4; ++k) out.at[e + k] = four.at[k];
    }
    return out;
  }

  // From one value of each row of the tile to the lane's own row, over all its columns.
  template <class Op>
  SFR_DEVICE T of_own_row(const OfRows& x) const {
    return folded<Op, row_lanes / 2>(x.at, lane);
  }
  // ... and what the owners have back to all.
  SFR_DEVICE OfRows to_rows(T own) const {
    OfRows out;
#pragma unroll
    for (int r = 0; r < R; ++r) out.at[r] = shuffle(own, (lane & 24) | (r * same_row));
    return out;
  }
  template <class Op, class Term>
  SFR_DEVICE T row_terms(Term&& term) const {
    OfRows x;
#pragma unroll
    for (int r = 0; r < R; ++r) {
      T some[2] = {Op::template nothing<T>(), Op::template nothing<T>()};
#pragma unroll
      for (int e = 0; e < E; ++e) some[e % 2] = Op()(some[e % 2], term(r, e));
      x.at[r] = Op()(some[0], some[1]);
    }
    return of_own_row<Op>(x);
  }
  SFR_DEVICE T row_product(const T* v) const {
    const OfColumns x = at_columns(v);
    OfRows s;
#pragma unroll
    for (int r = 0; r < R; ++r) {
      T some[2] = {};
#pragma unroll
      for (int e = 0; e < E; ++e) some[e % 2] += entries.P[r][e] * x.at[e];  // hot: tile row
      s.at[r] = some[0] + some[1];
    }
    return of_own_row<Sum>(s);
  }

  // Over all rows: from one value of each column of the tile to `entries.total`, and x becomes its sum over all
  // threads. A barrier.
  template <class Op, int K>
  SFR_DEVICE void exchange(const OfColumns& q, T* x) {
    const bool upper = lane & 8, odd = lane & 16;
    T half[E / 2];
#pragma unroll
    for (int e = 0; e < E / 2; ++e)
      half[e] = Op()(upper ? q.at[E / 2 + e] : q.at[e], shuffle_xor(upper ? q.at[e] : q.at[E / 2 + e], 8));
#pragma unroll
    for (int k = 0; k < own_columns; ++k)
      entries.total[k] =
          Op()(odd ? half[own_columns + k] : half[k], shuffle_xor(odd ? half[k] : half[own_columns + k], 16));
    over_all_lanes<Sum, K>(x);
    if (alone) return sync_warp();  // mutant: the shuffles above are barriers too, but order no memory
    T* parts = next_parts();
    Own in_warp;
#pragma unroll
    for (int k = 0; k < own_columns; ++k) in_warp.at[k] = entries.total[k];
    *reinterpret_cast<Own*>(parts + warp * each + own_column) = in_warp;
    put_scalars<K>(parts, x);
    sync_solvers();
    Own of_warp[shape.warps];
#pragma unroll
    for (int w = 0; w < shape.warps; ++w) of_warp[w] = own(parts + w * each);
#pragma unroll
    for (int k = 0; k < own_columns; ++k)
      entries.total[k] = Op()(Op()(of_warp[0].at[k], of_warp[1].at[k]), Op()(of_warp[2].at[k], of_warp[3].at[k]));
    take_scalars<Sum, K>(parts, x);
  }
  template <class Op, class Term>
  SFR_DEVICE OfColumns column_terms(Term&& term) const {
    OfColumns q;
#pragma unroll
    for (int e = 0; e < E; ++e) {
      q.at[e] = Op::template nothing<T>();
#pragma unroll
      for (int r = 0; r < R; ++r) q.at[e] = Op()(q.at[e], term(r, e));
    }
    return q;
  }
  // Those of P^T u.
  SFR_DEVICE OfColumns column_products(T own) const {
    const OfRows u = to_rows(own);
    OfColumns q;
#pragma unroll
    for (int e = 0; e < E; ++e) {
      q.at[e] = entries.P[0][e] * u.at[0];
#pragma unroll
      for (int r = 1; r < R; ++r) q.at[e] += entries.P[r][e] * u.at[r];  // hot: tile column
    }
    return q;
  }
  template <class Op>
  SFR_DEVICE void exchange(const OfColumns& q) {
    exchange<Op, 0>(q, nullptr);
  }
  template <class Op, int K>
  SFR_DEVICE void exchange(const OfColumns& q, T (&x)[K]) {
    exchange<Op, K>(q, static_cast<T*>(x));
  }

  // What the warps have to say to each other: sums over columns, and scalars beside them.
  static constexpr int each = shape.columns() + most_scalars;
  SFR_DEVICE T* next_parts() {
    T* parts = partial + turn * shape.warps * each;
    turn ^= 1;
    return parts;
  }
  template <int K>
  SFR_DEVICE void put_scalars(T* parts, const T* x) const {
    if (lane == 0)
#pragma unroll
      for (int k = 0; k < K; ++k) parts[warp * each + shape.columns() + k] = x[k];
  }
  template <class Op, int K>
  SFR_DEVICE void take_scalars(const T* parts, T* x) const {
#pragma unroll
    for (int k = 0; k < K; ++k) {
      x[k] = parts[shape.columns() + k];
#pragma unroll
      for (int w = 1; w < shape.warps; ++w) x[k] = Op()(x[k], parts[w * each + shape.columns() + k]);
    }
  }
  template <class Op, int K>
  SFR_DEVICE void over_warps(T (&x)[K]) {
    over_all_lanes<Op, K>(x);
    if (alone) return sync_warp();  // mutant: the shuffles above are barriers too, but order no memory
    T* parts = next_parts();
    put_scalars<K>(parts, x);
    sync_solvers();
    take_scalars<Op, K>(parts, x);
  }

  // Over the lanes of a warp, which has all columns.
  template <class Op, int K>
  static SFR_DEVICE void over_warp(T (&out)[K]) {
    over_all_lanes<Op, K>(out);
    sync_warp();
  }

  // Passes.

  SFR_DEVICE T exponent(T log, int r, int e) const { return log - (entries.C[r][e] - centre) * factor; }

  SFR_DEVICE void update_rows() {
    const OfColumns G = at_columns(columns.log());
    const T most = vmax<T>(row_terms<Max>([&](int r, int e) { return exponent(G.at[e], r, e); }), Number<T>::lowest);
    const OfRows least = to_rows(most);
    const T sum = row_terms<Sum>([&](int r, int e) { return exp2_of(exponent(G.at[e], r, e) - least.at[r]); });
    each_row([&](int i) {
      const T weight = rows.weight[i];
      rows.log()[i] = weight > 0 ? rows.updated(log2_of(weight), most, sum) : Max::nothing<T>();
    });
    sync_warp();
  }

  SFR_DEVICE void update_columns() {
    const OfRows F = at_rows(rows.log());
    T* most = columns.sum();
    exchange<Max>(column_terms<Max>([&](int r, int e) { return exponent(F.at[r], r, e); }));
    each_column([&](int j) { most[j] = vmax<T>(entries.total[j - own_column], Number<T>::lowest); });
    sync_warp();
    const OfColumns least = at_columns(most);
    exchange<Sum>(column_terms<Sum>([&](int r, int e) { return exp2_of(exponent(F.at[r], r, e) - least.at[e]); }));
    each_column([&](int j) {
      const T weight = columns.weight[j];
      columns.log()[j] =
          weight > 0 ? columns.updated(log2_of(weight), most[j], entries.total[j - own_column]) : Max::nothing<T>();
    });
    sync_warp();
  }

  // A vector over the rows to the columns, which are the same patches.
  SFR_DEVICE void rows_to_columns(const T* of_rows, T* of_columns) {
    sync_solvers();
    each_column([&](int j) { of_columns[j] = of_rows[j]; });
    sync_solvers();
  }
  SFR_DEVICE void average() {
    T *F = rows.log(), *G = columns.log();
    each_row([&](int i) { F[i] = (F[i] + G[i]) / 2; });
    rows_to_columns(F, G);
  }

  template <From from>
  SFR_DEVICE Evaluation<T> evaluate_from() {
    constexpr bool exact = from == From::potentials;
    const OfRows x = at_rows(exact ? rows.log() : rows.scale());
    const OfColumns y = at_columns(exact ? columns.log() : columns.scale());
    T sums[5] = {};  // value, mass, error, relative error, underflow
    const T sum = row_terms<Sum>([&](int r, int e) {
      T p;
      if constexpr (exact) {
        p = exp2_of(x.at[r] + y.at[e] - (entries.C[r][e] - centre) * factor);  // hot: tile evaluated
        if (p > 0) sums[0] += p * entries.C[r][e];
      } else {
        p = entries.P[r][e] * (x.at[r] * y.at[e]);
      }
      entries.P[r][e] = p;
      sums[1] += p;
      return p;
    });
    each_row([&](int i) {
      rows.sum()[i] = sum;
      judge_sum<exact>(rows, i, sum, rows.log()[i], rows.scale()[i], sums[2], sums[3], sums[4]);
    });
    exchange<Sum>(column_terms<Sum>([&](int r, int e) { return entries.P[r][e]; }), sums);
    const T of_rows[3] = {sums[2], sums[3], sums[4]};
    T of_columns[3] = {};
    each_column([&](int j) {
      const T sum_of_column = entries.total[j - own_column];
      columns.sum()[j] = sum_of_column;
      judge_sum<exact>(columns, j, sum_of_column, columns.log()[j], columns.scale()[j], of_columns[0], of_columns[1],
                       of_columns[2]);
    });
    over_warp<Sum>(of_columns);
    return evaluation<exact>(*this, sums[0], sums[1], of_rows, of_columns);
  }

  SFR_DEVICE Evaluation<T> evaluate(From from) {
    if (from == From::columns || from == From::halfway) update_rows();
    if (from == From::halfway) average();
    if (from != From::scalings) return evaluate_from<From::potentials>();
    const Evaluation<T> out = evaluate_from<From::scalings>();
    absorb();
    return out;
  }

  SFR_DEVICE void absorb() {
    const auto move = [](T* log, T* scale) {
      *log += log2_of(*scale);
      *scale = 1;
    };
    each_row([&](int i) { move(rows.log() + i, rows.scale() + i); });
    each_column([&](int j) { move(columns.log() + j, columns.scale() + j); });
    sync_warp();
  }

  // One update of the lane's own row, which it shares with others; `seen`: error, mass, at the edge. `average`: the
  // mean of both scalings, for a symmetric problem.
  SFR_DEVICE T scale_own_row(bool sample, T omega, bool average, T (&seen)[3]) {
    const T weight = rows.weight[own_row], u = rows.scale()[own_row], a = rows.target_at(own_row, u);
    const T s = row_product(columns.scale());
    const bool kept = weight > 0;
    const T scaled = relaxed<T>(rows, u, s, a, omega);
    if (sample && kept && owns_row()) {
      seen[0] += magnitude(u * s - a);
      seen[1] += u * s;
      seen[2] += is_at_edge<T>(scaled);
    }
    const T next = !kept ? u : average ? sqrt_of(u * scaled) : scaled;
    sync_warp();
    if (owns_row()) rows.scale()[own_row] = next;  // hot: tile row scaled
    return next;
  }

  SFR_DEVICE ErrorSample<T> scale_rows(bool sample, T omega) {
    T seen[3] = {};
    const OfColumns q = column_products(scale_own_row(sample, omega, false, seen));
    if (sample)
      exchange<Sum>(q, seen);
    else
      exchange<Sum>(q);
    return {seen[0], seen[1], seen[2] > 0};
  }

  SFR_DEVICE ErrorSample<T> scale_columns(bool sample, T omega) {
    T left[2] = {};  // error, at the edge
    const Own weight = own(columns.weight), v = own(columns.scale());
    Own next;
#pragma unroll
    for (int k = 0; k < own_columns; ++k) {
      const int j = own_column + k;
      const bool kept = weight.at[k] > 0;
      const T target = columns.has_reach() ? columns.target_at(j, v.at[k]) : weight.at[k];
      const T scaled = relaxed<T>(columns, v.at[k], entries.total[k], target, omega);
      next.at[k] = kept ? scaled : v.at[k];
    }
    if (sample)
#pragma unroll
      for (int k = 0; k < own_columns; ++k) {
        const T scaled = next.at[k];
        const T target = columns.has_reach() ? columns.target_at(own_column + k, scaled) : weight.at[k];
        left[0] += weight.at[k] > 0 ? magnitude(scaled * entries.total[k] - target) : T(0);
        left[1] += weight.at[k] > 0 ? is_at_edge<T>(scaled) : T(0);
      }
    *reinterpret_cast<Own*>(columns.scale() + own_column) = next;  // hot: tile column scaled
    if (sample)
      over_warp<Sum>(left);
    else
      sync_warp();
    return {left[0], T(0), left[1] > 0};
  }

  SFR_DEVICE ErrorSample<T> scale_halfway(bool sample) {
    T seen[3] = {};
    scale_own_row(sample, T(1), true, seen);
    rows_to_columns(rows.scale(), columns.scale());
    if (sample) over_warps<Sum>(seen);
    return {seen[0], seen[1], seen[2] > 0};
  }

  // The lane's own row of the step.
  SFR_DEVICE T own_step(const T* v, const T* right) {
    const T sum = rows.sum()[own_row], h = right ? right[own_row] : T(0);
    const T s = row_product(v);
    const T step = sum > Rules<T>::nothing ? quotient<T>(h - s, rows.gain() * sum) : T(0);
    if (owns_row()) rows.step()[own_row] = step;  // hot: tile step
    return step;
  }
  SFR_DEVICE void eliminate_rows(const T* v, const T* right) {
    own_step(v, right);
    sync_warp();  // mutant: what comes next reads no row but its own; this is for those to come
  }
  SFR_DEVICE void eliminate(const T* v, const T* right) { exchange<Sum>(column_products(own_step(v, right))); }

  template <class RowTerm, class ColumnTerm>
  SFR_DEVICE void gather(RowTerm&& row_term, ColumnTerm&& column_term, T* of_rows, T* of_columns) {
    const T sum = row_terms<Sum>(
        [&](int r, int e) { return inside(r, e) ? T(row_term(row(r), column(e), entries.P[r][e])) : T(0); });
    gather_columns(column_term, of_columns);
    each_row([&](int i) { of_rows[i] = sum; });
    sync_warp();  // mutant: callers have another barrier before they look
  }
  template <class Term>
  SFR_DEVICE void gather_columns(Term&& term, T* of_columns) {
    exchange<Sum>(column_terms<Sum>(
        [&](int r, int e) { return inside(r, e) ? T(term(row(r), column(e), entries.P[r][e])) : T(0); }));
    each_column([&](int j) { of_columns[j] = entries.total[j - own_column]; });
    sync_warp();  // mutant: callers have another barrier before they look
  }
};

}  // namespace sfr::cuda

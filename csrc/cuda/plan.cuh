// The plan of one problem as one thread sees it, and what is done to its vectors. csrc/cpu/plan.h has the same on the
// CPU, with the same conventions: powers of two inside, P_ij = 2^(F_i + G_j - S_ij) with S = (C - centre) log2(e) / eps
// and F = f log2(e) / eps + log2 a.
//
// A team of several blocks splits the rows: each block holds a slab of P. Vectors over the rows are the slab's, vectors
// over the columns are held by every block, and what a block knows of the columns' sums is exchanged. A patch of weight
// 0 stays where it is: its potential is -inf, its row or column of P is 0, and nobody looks at its sums.
#pragma once

#include "../contracts/sinkhorn.h"
#include "../solver/marginal.h"
#include "../solver/strategy.h"
#include "cholesky.cuh"

namespace sfr::cuda {

// How the threads of a block cover a slab; follows from its shape and the size of the team.
struct Cover {
  int lanes;       // that share a row in products, a power of two
  int width;       // columns in whole quads: 4 neighbours, which one thread sums
  int slices;      // of the rows, summed by different threads
  int slice_rows;  // a multiple of 4

  SFR_BOTH Cover(int rows, int columns, int threads, bool streamed) {
    lanes = 1;
    while (lanes < warp_threads && rows * lanes * 2 <= threads) lanes *= 2;
    if (streamed) lanes = warp_threads;  // neighbouring lanes then read neighbouring addresses
    width = (columns + 3) / 4 * 4;
    slices = threads > quads() ? threads / quads() : 1;
    slice_rows = ((rows + slices - 1) / slices + 3) / 4 * 4;
    slices = (rows + slice_rows - 1) / slice_rows;
  }

  SFR_BOTH int quads() const { return width / 4; }

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

template <class T>
SFR_DEVICE T log_weight(const Marginal<T>& side, int i) {
  return side.weight[i] > 0 ? log2_of(side.weight[i]) : -T(INFINITY);
}
template <class T>
SFR_DEVICE T log_weight_of(const Marginal<T>& side, int i) {
  return log2_of(side.weight[i]);
}
template <class T>
SFR_DEVICE T mass_at(const Marginal<T>& side, int i) {
  return side.weight[i];
}
// x at patches that are kept, 0 at those of weight 0.
template <class T>
SFR_DEVICE T kept(const Marginal<T>& side, int i, T x) {
  return side.weight[i] > 0 ? x : T(0);
}
template <class T>
SFR_DEVICE void scale_weight(const Marginal<T>& side, int i, T by) {
  side.weight[i] *= by;
}

// Where a plan's system is factorised, and the iterations that it takes; 0: nowhere.
struct FactorRoom {
  Arena memory;
  int64_t price;
};

// What every plan has: the problem's state, and what is done to its vectors alone, whatever its threads (Self) share of
// them.
template <class T, class Self>
struct AnyPlan {
  int all_rows, all_columns, kept_rows, kept_columns;
  bool light;  // some kept patch weighs next to nothing
  bool of_features;
  int first = 0;  // row of the slab
  Marginal<T> rows, columns;
  ReductionBuffer<T> buffer;
  T centre = 0, factor = 0;  // S = (C - centre) factor
  T shift = 0;               // on top of the rows' potentials, and below the columns', in powers of two

  SFR_DEVICE Self& self() { return static_cast<Self&>(*this); }
  SFR_DEVICE const Self& self() const { return static_cast<const Self&>(*this); }

  // The linear system, factorised.
  const FactorRoom* factors;
  SFR_DEVICE int64_t factorising_takes() const { return factors->price; }
  SFR_DEVICE FactorisedPlan<T> factorised(const T* entries, int ld) const {
    FactorisedPlan<T> plan;
    plan.entries = entries, plan.ld = ld;
    plan.rows = int(rows.count), plan.columns = int(columns.count);
    plan.row_sum = rows.sum(), plan.column_sum = columns.sum();
    plan.row_gain = rows.gain(), plan.column_gain = columns.gain();
    plan.of_rows = kept_rows < kept_columns;
    plan.has_reach = has_reach();
    return plan;
  }
  // A side without a patch: then no patch is kept on either.
  SFR_DEVICE bool empty() const { return kept_columns == 0; }
  SFR_DEVICE bool has_reach() const { return rows.has_reach() || columns.has_reach(); }

  template <class F>
  SFR_DEVICE void each_patch_of_rows(F&& f) const {
    self().each_row([&](int i) {
      if (rows.weight[i] > 0) f(i);
    });
  }
  template <class F>
  SFR_DEVICE void each_patch_of_columns(F&& f) const {
    self().each_column([&](int j) {
      if (columns.weight[j] > 0) f(j);
    });
  }
  template <class F>
  SFR_DEVICE T sum_patches_of_rows(F&& f) {
    T sum[1];
    self().template reduce_rows<Sum>(sum, [&](int i, T(&sums)[1]) {
      if (rows.weight[i] > 0) sums[0] += f(i);
    });
    return sum[0];
  }
  template <class F>
  SFR_DEVICE T sum_patches_of_columns(F&& f) {
    T sum[1];
    self().template reduce_columns<Sum>(sum, [&](int j, T(&sums)[1]) {
      if (columns.weight[j] > 0) sums[0] += f(j);
    });
    return sum[0];
  }

  SFR_DEVICE int row_index(int i) const { return first + i; }
  SFR_DEVICE int column_index(int j) const { return j; }
  SFR_DEVICE void clear_removed_rows(T* out) const {
    self().each_row([&](int i) {
      if (!(rows.weight[i] > 0)) out[first + i] = 0;
    });
  }
  SFR_DEVICE void clear_removed_columns(T* out) const {
    self().each_column([&](int j) {
      if (!(columns.weight[j] > 0)) out[j] = 0;
    });
  }
  SFR_DEVICE void fill_rows(T* out, T value) const {
    self().each_row([&](int i) { out[first + i] = value; });
  }
  SFR_DEVICE void fill_columns(T* out, T value) const {
    self().each_column([&](int j) { out[j] = value; });
  }

 protected:
  template <class Op, int K>
  static SFR_DEVICE void clear(T (&out)[K]) {
#pragma unroll
    for (int k = 0; k < K; ++k) out[k] = Op::template nothing<T>();
  }
};

// The plan of all blocks of a team, and its sums over rows, where one block has all of it.
template <class T>
struct GatheredPlan {
  T *entries, *row_sum;

  SFR_BOTH GatheredPlan(Arena& arena, int rows, int ld) {
    entries = arena.take<T>(int64_t(rows) * ld);
    row_sum = arena.take<T>(rows);
  }
};

template <class T>
struct Plan : AnyPlan<T, Plan<T>> {
  using Base = AnyPlan<T, Plan<T>>;
  using Base::buffer, Base::centre, Base::columns, Base::factor, Base::first, Base::has_reach, Base::kept_columns,
      Base::kept_rows, Base::rows;
  Team& team;
  int slab;  // rows of a block, but for the last
  Cover cover;
  int ld;         // row length of P and of the cost
  const T* cost;  // [rows.count][ld] of the slab
  T* P;           // likewise; padding 0
  T* partial;     // [slices][width]
  // This thread's place in the cover: in products by rows, and in sums over columns.
  int row_lane, row_group, row_groups, slice, quad;

  SFR_DEVICE Plan(Team& of, const Cover& by) : team(of), cover(by) {
    row_lane = team.rank & (cover.lanes - 1);
    row_group = team.rank / cover.lanes;
    row_groups = team.size / cover.lanes;
    slice = cover.slices > 1 ? team.rank / cover.quads() : 0;
    quad = team.rank - slice * cover.quads();
  }
  // The same plan of another description of its team.
  SFR_DEVICE Plan(Team& of, const Plan& plan)
      : Base(plan),
        team(of),
        slab(plan.slab),
        cover(plan.cover),
        ld(plan.ld),
        cost(plan.cost),
        P(plan.P),
        partial(plan.partial),
        row_lane(plan.row_lane),
        row_group(plan.row_group),
        row_groups(plan.row_groups),
        slice(plan.slice),
        quad(plan.quad) {}
  SFR_DEVICE void clear() const {
#pragma unroll 1
    for (int i = team.warp(); i < rows.count; i += team.warps())
#pragma unroll 1
      for (int j = team.lane(); j < ld; j += warp_threads) *at(i, j) = 0;
    team.sync();
  }
  SFR_DEVICE bool has_columns() const { return team.block == 0; }
  SFR_DEVICE bool reports() const { return team.rank == 0 && team.block == 0; }
  SFR_DEVICE void sync() const { team.sync(); }
  // Of one block.
  template <class Op, int K>
  SFR_DEVICE void over_threads(T (&x)[K]) {
    over_block<Op>(team, buffer, x);
  }
  // f of this plan, or of one that is the same and whose products are faster to take again and again.
  template <class F>
  SFR_DEVICE auto with_products(const F& f) {
    return f(*this);
  }
  // Of several blocks one does it, with what the others have put beside the factors.
  SFR_DEVICE Cholesky<T> cholesky() const {
    FactorisedPlan<T> whole = Base::factorised(P, ld);
    Arena memory = Base::factors->memory;
    if (team.blocks > 1) {
      const GatheredPlan<T> all(memory, Base::all_rows, ld);
      whole.entries = all.entries, whole.row_sum = all.row_sum, whole.rows = Base::all_rows;
    }
    return Cholesky<T>(memory, team, whole);
  }
  SFR_DEVICE void factorise(const T* null, bool loose) {
    if (team.blocks > 1) {
      Arena memory = Base::factors->memory;
      const GatheredPlan<T> all(memory, Base::all_rows, ld);
      map_entries(team, int(rows.count), int(columns.count), P, ld, all.entries + int64_t(first) * ld, ld,
                  [](int, int, T entry) { return entry; });
      each_row([&](int i) { all.row_sum[first + i] = rows.sum()[i]; });
      team.grid_barrier();
    }
    if (team.block == 0) cholesky().factorise(null, loose);
  }
  SFR_DEVICE void solve_factorised(const T* right, T* out) {
    Cholesky<T> factors = cholesky();
    if (team.block == 0) factors.solve(right);
    team.grid_barrier();
    each_column([&](int j) { out[j] = factors.solution(j); });
    team.grid_barrier();
  }
  // The plan to where others read it: it lies there.
  SFR_DEVICE void leave(T*, int) const {}

  SFR_DEVICE const T* row_of(const T* matrix, int i) const { return matrix + int64_t(i) * ld; }
  SFR_DEVICE T* at(int i, int j) const { return P + int64_t(i) * ld + j; }
  SFR_DEVICE T cost_at(int i, int j) const { return cost[int64_t(i) * ld + j]; }
  SFR_DEVICE T centred(int i, int j) const { return cost_at(i, j) - centre; }

  // Passes: passes.cuh.
  SFR_DEVICE Evaluation<T> evaluate(From from);
  template <From from>
  SFR_DEVICE Evaluation<T> evaluate_from();
  SFR_DEVICE void update_rows();
  SFR_DEVICE void update_columns();
  SFR_DEVICE void average();
  SFR_DEVICE void absorb();
  SFR_DEVICE ErrorSample<T> scale_rows(bool sample, T omega);
  SFR_DEVICE ErrorSample<T> scale_columns(bool sample, T omega);
  SFR_DEVICE ErrorSample<T> scale_halfway(bool sample);
  SFR_DEVICE void eliminate(const T* v, const T* right);
  SFR_DEVICE void eliminate_rows(const T* v, const T* right);
  template <class RowTerm, class ColumnTerm>
  SFR_DEVICE void gather(RowTerm&& row_term, ColumnTerm&& column_term, T* of_rows, T* of_columns);
  template <class Term>
  SFR_DEVICE void gather_columns(Term&& term, T* of_columns);

  template <class F>
  SFR_DEVICE void each_row(F&& f) const {
#pragma unroll 1
    for (int i = team.rank; i < rows.count; i += team.size) f(i);
  }
  template <class F>
  SFR_DEVICE void each_column(F&& f) const {
#pragma unroll 1
    for (int j = team.rank; j < columns.count; j += team.size) f(j);
  }
  // Every block has all columns: what they come to is known in each.
  template <class Op, int K, class F>
  SFR_DEVICE void reduce_rows(T (&out)[K], F&& f) {
    Base::template clear<Op>(out);
    each_row([&](int i) { f(i, out); });
    over_team<Op>(team, buffer, out);
  }
  template <class Op, int K, class F>
  SFR_DEVICE void reduce_columns(T (&out)[K], F&& f) {
    Base::template clear<Op>(out);
    each_column([&](int j) { f(j, out); });
    over_block<Op>(team, buffer, out);
  }
  template <class Op, int K, class F>
  SFR_DEVICE void reduce_column_products(T (&out)[K], F&& f);

  // Four neighbours of a lane in each of a few rows, which are all on their way before the first is used.
  template <class Op, int K, class F>
  SFR_DEVICE void reduce_costs(T (&out)[K], F&& f) {
    Base::template clear<Op>(out);
#pragma unroll 1
    for (int i = team.warp() * rows_together; i < rows.count; i += team.warps() * rows_together)
#pragma unroll 1
      for (int base = 0; base < columns.count; base += 4 * warp_threads) {
        const int j = base + 4 * team.lane(), left = columns.count - j;
        const bool whole = left >= 4 && i + rows_together <= rows.count;
        Four<T> found[rows_together] = {};
        if (whole)
#pragma unroll
          for (int r = 0; r < rows_together; ++r) found[r] = load4(row_of(cost, i + r) + j);
        sync_warp();  // mutant: see row_terms
        if (whole) {
#pragma unroll
          for (int r = 0; r < rows_together; ++r)
#pragma unroll
            for (int k = 0; k < 4; ++k) f(i + r, j + k, found[r].at[k], out);
        } else {
#pragma unroll 1
          for (int r = 0; r < rows_together && i + r < rows.count; ++r)
#pragma unroll 1
            for (int k = 0; k < 4 && k < left; ++k) f(i + r, j + k, cost_at(i + r, j + k), out);
        }
      }
    over_team<Op>(team, buffer, out);
  }
  // Entries with neighbouring lanes on neighbouring columns, a warp to a few rows.
  template <class Op, int K, class F>
  SFR_DEVICE void reduce_entries(T (&out)[K], F&& f) {
    Base::template clear<Op>(out);
#pragma unroll 1
    for (int i = team.warp() * rows_together; i < rows.count; i += team.warps() * rows_together) {
      const int left = rows.count - i;
#pragma unroll 1
      for (int j = team.lane(); j < columns.count; j += warp_threads)
        if (left >= rows_together)
#pragma unroll
          for (int r = 0; r < rows_together; ++r) f(i + r, j, out);
        else
#pragma unroll 1
          for (int r = 0; r < left; ++r) f(i + r, j, out);
    }
    over_team<Op>(team, buffer, out);
  }
};

// 8 lanes share `tile_rows` rows, and have 4 neighbouring columns each of every 32.
struct TileShape {
  int warps, tile_rows, groups;  // of columns

  constexpr SFR_BOTH int rows() const { return warps * 4 * tile_rows; }
  constexpr SFR_BOTH int columns() const { return 32 * groups; }
  constexpr SFR_BOTH int threads() const { return warps * warp_threads; }
  // Vectors over the rows, and over the columns of one warp, with the weights; sums over columns, twice, with what is
  // summed beside them.
  template <class T>
  constexpr SFR_BOTH int64_t row_entries() const {
    return int64_t(Marginal<T>::of_rows + 1) * rows();
  }
  template <class T>
  constexpr SFR_BOTH int64_t column_entries() const {
    return int64_t(Marginal<T>::of_columns + 1) * columns();
  }
  constexpr SFR_BOTH int64_t partial_entries() const { return 2 * int64_t(warps) * (columns() + most_scalars); }
};

constexpr TileShape tiles64{4, 4, 2};  // up to 64 x 64

// What 8 warps hold of a plan that lies in shared memory: 8 lanes share 7 rows, and each has 4 neighbouring columns of
// every 32, and one of 8 more. 14 x 14 patches are 28 times 7.
struct HeldShape {
  static constexpr int warps = most_warps, threads = warps * warp_threads;
  static constexpr int groups = 4, tile_rows = 7, quads = 6;  // groups of a warp's lanes
  static constexpr int quad_columns = 32, of_quads = quad_columns * quads;
  static constexpr int rows = warps * groups * tile_rows, columns = of_quads + 8;
  static constexpr int entries_of_sums = warps * columns;
};

}  // namespace sfr::cuda

// The plan of one problem in a workspace, as one thread sees it, and what is done to its vectors.
//
// Everything is in powers of two: P_ij = 2^(F_i + G_j - S_ij), with S = (C - centre) log2(e) / eps and the marginals
// absorbed, F = f log2(e) / eps + log2 a. Rows are padded to whole vectors with zeros; in the vectors the padding holds
// a one-patch problem that is solved already (marginal 1, scaling 1, and `bias` adds 1 to its product), so that no loop
// knows of it.
#pragma once

#include <initializer_list>
#include <type_traits>

#include "../solver/marginal.h"
#include "../solver/strategy.h"
#include "cholesky.h"
#include "features.h"
#include "team.h"

namespace sfr::cpu::SFR_ISA {

// Rows in a block of the team's work; a small problem is one block. A multiple of every vector's lanes.
constexpr int64_t block_rows = 32, single_block_rows = 96;
// Up to so many rows and columns the plan is kept in both orientations, which together still fit an L1 cache.
constexpr int64_t small_side = 64;
// Columns in a block, likewise.
constexpr int64_t block_columns = 64;
static_assert(block_rows % lanes<float> == 0 && single_block_rows % lanes<float> == 0 &&
              small_side % lanes<float> == 0 && block_columns % lanes<float> == 0);
// Numbers that a block, or rank 0, leaves to be added.
constexpr int64_t most_parts = 8;

struct Sum {
  template <class T>
  static SFR_INLINE Vec<T> nothing() {
    return Vec<T>{};
  }
  template <class T>
  static T over_lanes(Vec<T> x) {
    return sum_lanes<T>(x);
  }
  template <class V>
  static SFR_INLINE V both(V x, V y) {
    return x + y;
  }
};

struct Max {
  template <class T>
  static SFR_INLINE Vec<T> nothing() {
    return splat<T>(-Number<T>::infinity);
  }
  template <class T>
  static T over_lanes(Vec<T> x) {
    return max_lanes<T>(x);
  }
  template <class V>
  static SFR_INLINE V both(V x, V y) {
    return x > y ? x : y;
  }
};

// The vectors of a side that only this device has, behind those of Marginal.
template <class T>
struct Extra {
  static constexpr int of_side = Marginal<T>::of_columns + 3;
};
template <class T>
SFR_INLINE T* log_weights(const Marginal<T>& side) {  // log2 of the marginal; padding -inf: no mass
  return side.vectors + Marginal<T>::of_columns * side.stride;
}
template <class T>
SFR_INLINE T* biases(const Marginal<T>& side) {  // 0; padding 1
  return side.vectors + (Marginal<T>::of_columns + 1) * side.stride;
}

template <class T>
SFR_INLINE Vec<T> log_weight(const Marginal<T>& side, int64_t i) {
  return load(log_weights(side) + i);
}
template <class T>
SFR_INLINE T log_weight_of(const Marginal<T>& side, int64_t i) {
  return log_weights(side)[i];
}
template <class T>
SFR_INLINE Vec<T> bias(const Marginal<T>& side, int64_t i) {
  return load(biases(side) + i);
}
// x at kept patches, 0 in the padding.
template <class T>
SFR_INLINE Vec<T> kept(const Marginal<T>& side, int64_t i, Vec<T> x) {
  return bias(side, i) > 0 ? Vec<T>{} : x;
}
// The marginal, with 0 in the padding.
template <class T>
SFR_INLINE Vec<T> mass_at(const Marginal<T>& side, int64_t i) {
  return load(side.weight + i) - bias(side, i);
}
template <class T>
void scale_weight(const Marginal<T>& side, int64_t i, T by) {
  log_weights(side)[i] += log2_of(by);
  side.weight[i] *= by;
}

// Where a team's plan lies.
template <class T>
struct PlanMemory {
  T *P = nullptr, *transposed = nullptr, *rows = nullptr, *columns = nullptr;
  T *partial = nullptr, *row_parts = nullptr, *column_parts = nullptr, *scalars = nullptr;
  Cholesky<T> cholesky;

  void reserve(Arena& arena, int64_t n, int64_t m) {
    const int64_t size = whole_vectors<T>(n), blocks = size / block_rows + 1, wide = padded<T>(m);
    P = arena.take<T>(size * wide);
    transposed = arena.take<T>(small_side * small_side);
    rows = arena.take<T>(size * (1 + Extra<T>::of_side));
    columns = arena.take<T>(wide * (1 + Extra<T>::of_side));
    partial = arena.take<T>(blocks * wide);
    row_parts = arena.take<T>(blocks * most_parts);
    column_parts = arena.take<T>((wide / block_columns + 1) * most_parts);
    scalars = arena.take<T>(2 * most_parts);
    cholesky.reserve(arena, n, m);
  }
};

// Which patches of a side are kept, and how many there are.
struct Kept {
  const int32_t* list = nullptr;  // null: all of them
  int64_t count = 0, all = 0;
  bool light = false;  // some of them weigh next to nothing

  int64_t index(int64_t i) const { return list ? list[i] : i; }
};

template <class T>
struct Plan {
  const Team& team;
  Kept row_patches, column_patches;
  int64_t all_rows, all_columns, kept_rows, kept_columns;
  bool light;  // some kept patch weighs next to nothing
  bool of_features = false;
  const T* cost;  // [rows.count][ld]
  T* P;           // [rows.stride][ld]
  T* transposed;  // [ld][rows.stride], of a small plan
  int64_t ld;
  T centre = 0, factor = 0;  // S = (C - centre) factor
  T shift = 0;               // on top of the rows' potentials, and below the columns', in powers of two
  Marginal<T> rows, columns;
  T* partial;                   // [blocks][ld] sums over the rows of a block
  T *row_parts, *column_parts;  // [blocks][most_parts]
  T* scalars;                   // [2][most_parts] of rank 0, for all
  Cholesky<T> cholesky;
  int turn = 0;

  // Of costs [a.count][ld] and of weights that lie in memory.rows and memory.columns.
  Plan(const Team& of, const PlanMemory<T>& memory, const T* costs, const Kept& a, const Kept& b)
      : team(of),
        row_patches(a),
        column_patches(b),
        all_rows(a.all),
        all_columns(b.all),
        kept_rows(a.count),
        kept_columns(a.count > 0 ? b.count : 0),
        light(a.light || b.light),
        cost(costs),
        P(memory.P),
        transposed(memory.transposed),
        ld(padded<T>(b.count)),
        partial(memory.partial),
        row_parts(memory.row_parts),
        column_parts(memory.column_parts),
        scalars(memory.scalars),
        cholesky(memory.cholesky) {
    place(rows, memory.rows, a.count, whole_vectors<T>(a.count));
    place(columns, memory.columns, b.count, ld);
    if (team.rank == 0) {
      pad(rows);
      pad(columns);
      for (int64_t k = rows.count * ld; k < rows.stride * ld; ++k) P[k] = 0;
    }
    team.barrier();
  }

  // By the patches that are left of it: a problem has the bits of one that never had the others.
  bool small() const { return rows.stride <= small_side && ld <= small_side; }
  // A side without a patch.
  bool empty() const { return kept_columns == 0; }
  void clear() const {
    for (int64_t k = 0; team.rank == 0 && k < rows.count * ld; ++k) P[k] = 0;
  }
  bool has_reach() const { return rows.has_reach() || columns.has_reach(); }
  bool reports() const { return team.rank == 0; }
  static constexpr bool has_columns() { return true; }
  void sync() const { team.barrier(); }

  int64_t block() const { return rows.stride <= single_block_rows ? rows.stride : block_rows; }
  int64_t blocks() const { return (rows.stride + block() - 1) / block(); }
  int64_t block_end(int64_t b) const { return least((b + 1) * block(), rows.stride); }
  int64_t kept_end(int64_t b) const { return least((b + 1) * block(), rows.count); }
  int64_t column_blocks() const { return (ld + block_columns - 1) / block_columns; }

  // Calls f(j) for every vector of the columns in a block.
  template <class F>
  SFR_INLINE void for_columns(int64_t block, F&& f) const {
    const int64_t end = least((block + 1) * block_columns, ld);
    for (int64_t j = block * block_columns; j < end; j += lanes<T>) f(j);
  }
  // The blocks' partial sums of the columns at j, in order.
  SFR_INLINE Vec<T> column_sum(int64_t j) const {
    Vec<T> sum = bias(columns, j);
    for (int64_t b = 0, n = blocks(); b < n; ++b) sum += load(partial + b * ld + j);
    return sum;
  }

  SFR_INLINE T* at(int64_t i, int64_t j) const { return P + i * ld + j; }
  SFR_INLINE Vec<T> cost_at(int64_t i, int64_t j) const { return load(cost + i * ld + j); }
  SFR_INLINE Vec<T> centred(int64_t i, int64_t j) const { return cost_at(i, j) - centre; }

  // Passes: passes.h.
  Evaluation<T> evaluate(From from);
  template <From from>
  Evaluation<T> evaluate_from();
  template <bool keep>
  void update_rows();
  void update_columns();
  void average();
  void absorb();
  ErrorSample<T> scale_rows(bool sample, T omega);
  ErrorSample<T> scale_columns(bool sample, T omega);
  ErrorSample<T> scale_halfway(bool sample);
  void eliminate(const T* v, const T* right);
  void eliminate_rows(const T* v, const T* right) { eliminate(v, right); }
  template <class RowTerm, class ColumnTerm>
  void gather(RowTerm&& row_term, ColumnTerm&& column_term, T* of_rows, T* of_columns);
  template <class Term>
  void gather_columns(Term&& term, T* of_columns);
  template <class Op, int K, class F>
  void reduce_entries(T (&out)[K], F&& f);
  template <class Op, int K, class F>
  void reduce_costs(T (&out)[K], F&& f) {
    reduce_entries<Op>(out, [&](Index i, Index j, Vec<T>(&found)[K]) { f(i, j, cost_at(i, j), found); });
  }

  template <class F>
  auto with_products(const F& f) {
    return f(*this);
  }
  // The linear system, factorised.
  int64_t factorising_takes() const { return iterations_of_factorising(rows.count, columns.count); }
  void factorise(const T* null, bool loose) { cholesky.factorise(*this, null, loose); }
  void solve_factorised(const T* right, T* out) { cholesky.solve(*this, right, out); }

  // Vectors are short: rank 0 does them.
  template <class F>
  void each_row(F&& f) const {
    each(rows, f);
  }
  template <class F>
  void each_column(F&& f) const {
    each(columns, f);
  }
  template <class Op, int K, class F>
  void reduce_rows(T (&out)[K], F&& f) {
    reduce<Op>(rows.stride, out, f);
  }
  template <class Op, int K, class F>
  void reduce_columns(T (&out)[K], F&& f) {
    reduce<Op>(columns.stride, out, f);
  }
  template <class Op, int K, class F>
  void reduce_column_products(T (&out)[K], F&& f) {
    reduce<Op>(columns.stride, out, [&](int64_t j, Vec<T>(&sums)[K]) { f(j, column_sum(j) - bias(columns, j), sums); });
  }

  template <class F>
  void each_patch_of_rows(F&& f) const {
    for (int64_t i = 0; team.rank == 0 && i < rows.count; ++i) f(i);
  }
  template <class F>
  void each_patch_of_columns(F&& f) const {
    for (int64_t j = 0; team.rank == 0 && j < columns.count; ++j) f(j);
  }
  template <class F>
  T sum_patches_of_rows(F&& f) {
    return sum_patches(rows.count, f);
  }
  template <class F>
  T sum_patches_of_columns(F&& f) {
    return sum_patches(columns.count, f);
  }

  int64_t row_index(int64_t i) const { return row_patches.index(i); }
  int64_t column_index(int64_t j) const { return column_patches.index(j); }
  void clear_removed_rows(T* out) const {
    if (row_patches.list) fill_rows(out, T(0));
  }
  void clear_removed_columns(T* out) const {
    if (column_patches.list) fill_columns(out, T(0));
  }
  void fill_rows(T* out, T value) const {
    for (int64_t i = 0; team.rank == 0 && i < all_rows; ++i) out[i] = value;
  }
  void fill_columns(T* out, T value) const {
    for (int64_t j = 0; team.rank == 0 && j < all_columns; ++j) out[j] = value;
  }

 private:
  static int64_t least(int64_t x, int64_t y) { return x < y ? x : y; }

  static void place(Marginal<T>& side, T* memory, int64_t count, int64_t size) {
    side.count = count;
    side.stride = size;
    side.weight = memory;
    side.vectors = memory + size;
    side.reach_target = side.vectors + (Extra<T>::of_side - 1) * size;
  }
  static void pad(const Marginal<T>& side) {
    for (int64_t i = side.count; i < side.stride; ++i) side.weight[i] = 1;
    for (int64_t i = 0; i < side.stride; i += lanes<T>) store(log_weights(side) + i, log2<T>(load(side.weight + i)));
    for (int64_t i = 0; i < side.stride; ++i) {
      biases(side)[i] = i < side.count ? T(0) : T(1);
      if (i >= side.count) log_weights(side)[i] = -Number<T>::infinity;
    }
  }

  template <class F>
  void each(const Marginal<T>& side, F&& f) const {
    for (int64_t i = 0; team.rank == 0 && i < side.stride; i += lanes<T>) f(i);
  }

  // What rank 0 found, for all: a slot is written again after another barrier.
  template <int K, class F>
  void tell(T (&out)[K], F&& find) {
    if (team.size == 1) return find(out);
    T* slot = scalars + turn * most_parts;
    turn ^= 1;
    if (team.rank == 0) {
      find(out);
      for (int k = 0; k < K; ++k) slot[k] = out[k];
    }
    team.barrier();
    for (int k = 0; k < K; ++k) out[k] = slot[k];
  }
  template <class Op, int K, class F>
  void reduce(int64_t size, T (&out)[K], F&& f) {
    static_assert(K <= most_parts);
    tell(out, [&](T(&found)[K]) {
      Vec<T> sums[K];
      for (int k = 0; k < K; ++k) sums[k] = Op::template nothing<T>();
      for (int64_t i = 0; i < size; i += lanes<T>) f(i, sums);
      for (int k = 0; k < K; ++k) found[k] = Op::template over_lanes<T>(sums[k]);
    });
  }
  template <class F>
  T sum_patches(int64_t count, F&& f) {
    T out[1];
    tell(out, [&](T(&found)[1]) {
      found[0] = 0;
      for (int64_t i = 0; i < count; ++i) found[0] += f(i);
    });
    return out[0];
  }
};

}  // namespace sfr::cpu::SFR_ISA

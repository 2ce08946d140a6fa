// The plan of one problem, and the three passes over it that everything else is made of: evaluation from the
// potentials, a pair of matrix-vector products, and sums of a function of its entries.
//
// Inside, everything is in powers of two: P_ij = 2^(F_i + G_j - S_ij), with S = (C - mean) log2(e) / eps and the
// marginals absorbed, F = f log2(e) / eps + log2 a. Rows are padded to whole vectors with zeros; in the vectors
// the padding holds a one-patch problem that is solved already (marginal 1, scaling 1, and `bias` adds 1 to its
// product), so that no loop knows of it.
#pragma once

#include <initializer_list>
#include <type_traits>

#include "../contracts/sinkhorn.h"
#include "features.h"
#include "team.h"

namespace sfr::cpu::SFR_ISA {

// Rows in a block of the team's work; a small problem is one block. A multiple of every vector's lanes.
constexpr int64_t block_rows = 32, single_block_rows = 96;
// Up to so many rows and columns the plan is kept in both orientations, which together still fit an L1 cache.
constexpr int64_t small_side = 64;
// Columns in a block, likewise.
constexpr int64_t block_columns = 64;

constexpr double ln2 = 0.69314718055994530942;

template <class T>
T exponential(T x) {
  return T(__builtin_exp(double(x)));
}
template <class T>
T exponential_minus_1(T x) {
  return T(__builtin_expm1(double(x)));
}

// One side's vectors, each `size` long.
template <class T>
struct Margin {
  int64_t count = 0, size = 0;
  T* weight = nullptr;      // marginal; padding 1
  T* log_weight = nullptr;  // log2 of it; padding -inf: no mass
  T* bias = nullptr;        // 0; padding 1
  T* log = nullptr;         // F or G
  T* scale = nullptr;       // scaling u or v
  T* sum = nullptr;         // marginal of the plan, of P * S, ...
  // A side with a reach: the plan's marginal bends to a e^(-f / reach).
  T total = 1;        // sum of the weights, 1 without a reach
  T soft = 0;         // eps / reach; 0: the marginal is met
  T offset = 0;       // mean / (2 reach) in powers of two: f is that of C, F that of C - mean
  T* bent = nullptr;  // the marginal bent by the potentials; padding 1

  void reserve(Arena& arena, int64_t length) {
    for (T** v : {&weight, &log_weight, &bias, &log, &scale, &sum, &bent}) *v = arena.take<T>(length);
  }

  // From `count` normalised weights already in `weight`.
  void set(int64_t n, int64_t length) {
    count = n;
    size = length;
    total = 1;
    soft = offset = 0;
    for (int64_t i = n; i < size; ++i) weight[i] = 1;
    for (int64_t i = 0; i < size; i += lanes<T>) store(log_weight + i, log2<T>(load(weight + i)));
    for (int64_t i = 0; i < size; ++i) {
      bias[i] = i < n ? T(0) : T(1);
      scale[i] = 1;
      if (i >= n) log_weight[i] = -T(__builtin_inf());
    }
  }

  // Gives the side a reach, in units of the cost like eps and mean, and its weights their own sum.
  void bend(T reach, T eps, T mean, T sum_of_weights) {
    soft = eps / reach;
    offset = mean / (2 * reach) * T(1 / ln2);
    total = sum_of_weights;
    const T log_total = T(__builtin_log2(double(total)));
    for (int64_t i = 0; i < count; ++i) {
      weight[i] *= total;
      log_weight[i] += log_total;
    }
  }

  // What the plan's marginal should be.
  const T* goal() const { return soft > 0 ? bent : weight; }
  // Where the potentials stand at `log`.
  SFR_INLINE void bend_to(int64_t i, Vec<T> log) {
    const Vec<T> start = load(log_weight + i);
    const Vec<T> now = exp2<T>(start - soft * (log - start) - offset);
    store(bent + i, load(bias + i) > 0 ? splat<T>(1) : now);
  }
  // ... and where a scaling of x more brings it.
  SFR_INLINE Vec<T> goal_at(int64_t i, Vec<T> x) const {
    return soft > 0 ? load(bent + i) * exp2<T>(-soft * log2<T>(x)) : load(weight + i);
  }
  // How much faster than the marginal its distance from the goal follows the potential.
  T gain() const { return 1 + soft; }
};

template <class T>
struct Plan {
  const T* cost = nullptr;  // [N][ld]
  T* P = nullptr;           // [rows.size][ld]
  T* transposed = nullptr;  // [ld][rows.size], of a small plan
  int64_t ld = 0;
  T mean = 0, factor = 0;  // S = (C - mean) factor
  Margin<T> rows, columns;
  T* partial = nullptr;  // [blocks][ld] sums over the rows of a block
  // Scalars of each block of rows, of each block of columns.
  T *row_part = nullptr, *row_part2 = nullptr, *row_part3 = nullptr, *row_part4 = nullptr;
  T *column_part = nullptr, *column_part2 = nullptr;

  void reserve(Arena& arena, int64_t n, int64_t m) {
    const int64_t size = whole_vectors<T>(n), most = size / block_rows + 1, wide = padded<T>(m);
    P = arena.take<T>(size * wide);
    transposed = arena.take<T>(small_side * small_side);
    rows.reserve(arena, size);
    columns.reserve(arena, wide);
    partial = arena.take<T>(most * wide);
    for (T** part : {&row_part, &row_part2, &row_part3, &row_part4}) *part = arena.take<T>(most);
    for (T** part : {&column_part, &column_part2}) *part = arena.take<T>(wide / block_columns + 1);
  }

  void set(const T* costs, int64_t n, int64_t m, int64_t stride) {
    cost = costs;
    ld = stride;
    rows.set(n, whole_vectors<T>(n));
    columns.set(m, stride);
    for (int64_t k = n * ld; k < rows.size * ld; ++k) P[k] = 0;
  }

  // By the patches that are left of it: a problem has the bits of one that never had the others.
  bool small() const { return rows.size <= small_side && ld <= small_side; }
  // Is there a reach?
  bool soft() const { return rows.soft > 0 || columns.soft > 0; }
  int64_t block() const { return rows.size <= single_block_rows ? rows.size : block_rows; }
  int64_t blocks() const { return (rows.size + block() - 1) / block(); }
  int64_t column_blocks() const { return (ld + block_columns - 1) / block_columns; }
  int64_t block_end(int64_t b) const {
    const int64_t end = (b + 1) * block();
    return end < rows.size ? end : rows.size;
  }
};

template <class T>
T sum_parts(const T* part, int64_t count) {
  T sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += part[i];
  return sum;
}

// Calls f(j) for every vector of the columns in a block.
template <class T, class F>
SFR_INLINE void for_columns(const Plan<T>& plan, int64_t block, F&& f) {
  const int64_t begin = block * block_columns, end = begin + block_columns;
  for (int64_t j = begin; j < (end < plan.ld ? end : plan.ld); j += lanes<T>) f(j);
}

// The blocks' partial sums of the columns at j, in order.
template <class T>
SFR_INLINE Vec<T> column_sum(const Plan<T>& plan, int64_t j) {
  Vec<T> sum = load(plan.columns.bias + j);
  for (int64_t b = 0; b < plan.blocks(); ++b) sum += load(plan.partial + b * plan.ld + j);
  return sum;
}

// (P v)_r for R rows, in the first R lanes.
template <int R, class T>
SFR_INLINE Vec<T> row_products(const T* P, int64_t ld, const T* v) {
  constexpr int L = lanes<T>, U = R >= 8 ? 1 : 2;
  Vec<T> sum[U][L];
  for (int k = 0; k < U; ++k)
    for (int r = 0; r < L; ++r) sum[k][r] = Vec<T>{};
  int64_t j = 0;
  for (; j + U * L <= ld; j += U * L)
    for (int k = 0; k < U; ++k) {
      const Vec<T> x = load(v + j + k * L);
      for (int r = 0; r < R; ++r) sum[k][r] += load(P + r * ld + j + k * L) * x;
    }
  for (; j < ld; j += L) {
    const Vec<T> x = load(v + j);
    for (int r = 0; r < R; ++r) sum[0][r] += load(P + r * ld + j) * x;
  }
  if constexpr (U == 2)
    for (int r = 0; r < R; ++r) sum[0][r] += sum[1][r];
  return sum_rows<T>(sum[0]);
}

// partial += u_r P_r for R rows.
template <int R, class T>
SFR_INLINE void add_rows(const T* P, int64_t ld, const T* u, T* partial, bool first) {
  for (int64_t j = 0; j < ld; j += lanes<T>) {
    Vec<T> sum = first ? Vec<T>{} : load(partial + j);
    for (int r = 0; r < R; ++r) sum += u[r] * load(P + r * ld + j);
    store(partial + j, sum);
  }
}

// out = sum_i x_i A_i over `count` rows of K vectors, the sums in registers: as many of them side by side as it takes
// to hide the latency of an addition.
template <int K, class T>
void combine_vectors(const T* A, int64_t ld, const T* x, int64_t count, T* out) {
  constexpr int L = lanes<T>, chains = K > 6 ? 1 : K > 3 ? 2 : 4;
  Vec<T> sum[chains][K];
  for (int c = 0; c < chains; ++c)
    for (int k = 0; k < K; ++k) sum[c][k] = Vec<T>{};
  int64_t i = 0;
  for (; i + chains <= count; i += chains)
    for (int c = 0; c < chains; ++c)
      for (int k = 0; k < K; ++k) sum[c][k] += x[i + c] * load(A + (i + c) * ld + k * L);
  for (; i < count; ++i)
    for (int k = 0; k < K; ++k) sum[0][k] += x[i] * load(A + i * ld + k * L);
  for (int c = 1; c < chains; ++c)
    for (int k = 0; k < K; ++k) sum[0][k] += sum[c][k];
  for (int k = 0; k < K; ++k) store(out + k * L, sum[0][k]);
}

// The same for any number of vectors.
template <class T>
SFR_INLINE void combine(const T* A, int64_t ld, const T* x, int64_t count, int64_t vectors, T* out) {
  constexpr int most = 8;
  const auto part = [&](auto width, int64_t k) {
    combine_vectors<decltype(width)::value>(A + k * lanes<T>, ld, x, count, out + k * lanes<T>);
  };
  int64_t k = 0;
  for (; k + most <= vectors; k += most) part(std::integral_constant<int, most>{}, k);
  switch (vectors - k) {
    case 1:
      return part(std::integral_constant<int, 1>{}, k);
    case 2:
      return part(std::integral_constant<int, 2>{}, k);
    case 3:
      return part(std::integral_constant<int, 3>{}, k);
    case 4:
      return part(std::integral_constant<int, 4>{}, k);
    case 5:
      return part(std::integral_constant<int, 5>{}, k);
    case 6:
      return part(std::integral_constant<int, 6>{}, k);
    case 7:
      return part(std::integral_constant<int, 7>{}, k);
    default:
      return;
  }
}

// A pair of matrix-vector products of a small plan: neither has sums across lanes.
template <class T, class Between>
SFR_INLINE void small_product_pair(const Plan<T>& plan, const T* v, Between&& between) {
  constexpr int L = lanes<T>;
  const int64_t size = plan.rows.size, used = whole_vectors<T>(plan.columns.count);
  alignas(64) T u[small_side];
  combine(plan.transposed, size, v, plan.columns.count, size / L, u);
  for (int64_t i = 0; i < size; i += L) store(u + i, between(i, load(u + i) + load(plan.rows.bias + i)));
  combine(plan.P, plan.ld, u, plan.rows.count, used / L, plan.partial);
  for (int64_t j = used; j < plan.ld; j += L) store(plan.partial + j, Vec<T>{});
}

// A pair of matrix-vector products in one reading of a block of P: s = P v, then u = between(i, s) for the rows
// i, i+1, ... in the lanes, then partial = P^T u. `between` sees s of the padding as `bias`.
template <class T, class Between>
SFR_INLINE void product_pair(const Plan<T>& plan, int64_t block, const T* v, Between&& between) {
  if (plan.small()) return small_product_pair(plan, v, between);
  constexpr int L = lanes<T>;
  T* partial = plan.partial + block * plan.ld;
  const int64_t begin = block * plan.block(), end = plan.block_end(block);
  for (int64_t i = begin; i < end; i += L) {
    const T* P = plan.P + i * plan.ld;
    T u[L];
    const auto rows = [&](auto count) {
      constexpr int R = decltype(count)::value;
      store(u, between(i, row_products<R>(P, plan.ld, v) + load(plan.rows.bias + i)));
      add_rows<R>(P, plan.ld, u, partial, i == begin);
    };
    // The last group may hold few rows: the smallest of 1, 2, 4, ... that covers them.
    const int64_t left = plan.rows.count - i;
    if (left > L / 2) {
      rows(std::integral_constant<int, L>{});
    } else if (L >= 4 && left > L / 4) {
      rows(std::integral_constant<int, (L / 2 > 0 ? L / 2 : 1)>{});
    } else if (L >= 8 && left > L / 8) {
      rows(std::integral_constant<int, (L / 4 > 0 ? L / 4 : 1)>{});
    } else {
      rows(std::integral_constant<int, (L / 8 > 0 ? L / 8 : 1)>{});
    }
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

template <class T>
SFR_INLINE Vec<T> is_cold(Vec<T> sum, Vec<T> weight) {
  return sum < weight * T(1e-6) ? splat<T>(1) : Vec<T>{};
}

// L rows of P from row i on, as columns of what is transposed.
template <class T>
void transpose_rows(const Plan<T>& plan, int64_t i) {
  constexpr int L = lanes<T>;
  for (int64_t j = 0; j < plan.columns.count; j += L) {
    Vec<T> square[L];
    for (int r = 0; r < L; ++r) square[r] = load(plan.P + (i + r) * plan.ld + j);
    transpose<T>(square);
    for (int r = 0; r < L; ++r) store(plan.transposed + (j + r) * plan.rows.size + i, square[r]);
  }
}

enum class From {
  potentials,  // P = 2^(F + G - S): what the potentials mean, to the last bit
  scalings,    // P <- u P v: the same up to rounding, without exponentials; the value is left out
};

// P, its marginals (rows.sum, columns.sum), and its evaluation.
template <From from, class T>
Evaluation<T> evaluate(const Team& team, Plan<T>& plan) {
  constexpr int L = lanes<T>;
  constexpr bool exact = from == From::potentials;
  // What the side's marginal should be at the potentials and scalings as they are.
  const auto goal_now = [](Margin<T>& side, int64_t i) {
    if (side.soft > 0) side.bend_to(i, load(side.log + i) + (exact ? Vec<T>{} : log2<T>(load(side.scale + i))));
    return load(side.goal() + i);
  };
  team.blocks(plan.blocks(), [&](int64_t b) {
    T* partial = plan.partial + b * plan.ld;
    Vec<T> value{}, mass{}, error{}, cold{};
    const int64_t begin = b * plan.block(), end = plan.block_end(b);
    for (int64_t j = 0; j < plan.ld; j += L) store(partial + j, Vec<T>{});
    for (int64_t i = begin; i < end; i += L) {
      Vec<T> sums[L] = {};
      for (int64_t r = 0; r < L && i + r < plan.rows.count; ++r) {
        const T* cost = plan.cost + (i + r) * plan.ld;
        T* P = plan.P + (i + r) * plan.ld;
        const T log = plan.rows.log[i + r], u = plan.rows.scale[i + r];
        Vec<T> sum{};
        for (int64_t j = 0; j < plan.ld; j += L) {
          Vec<T> p;
          if constexpr (exact) {
            const Vec<T> c = load(cost + j);
            p = exp2<T>(log + load(plan.columns.log + j) - (c - plan.mean) * plan.factor);
            value += p * c;
          } else {
            p = load(P + j) * (u * load(plan.columns.scale + j));
          }
          store(P + j, p);
          sum += p;
          store(partial + j, load(partial + j) + p);
        }
        sums[r] = sum;
        mass += sum;
      }
      if (plan.small()) transpose_rows(plan, i);
      const Vec<T> s = sum_rows<T>(sums) + load(plan.rows.bias + i), goal = goal_now(plan.rows, i);
      store(plan.rows.sum + i, s);
      error += vabs<T>(s - goal);
      cold += is_cold<T>(s, goal);
    }
    plan.row_part[b] = sum_lanes<T>(value);
    plan.row_part2[b] = sum_lanes<T>(error);
    plan.row_part3[b] = sum_lanes<T>(cold);
    plan.row_part4[b] = sum_lanes<T>(mass);
  });
  team.barrier();
  team.blocks(plan.column_blocks(), [&](int64_t b) {
    Vec<T> error{}, cold{};
    for_columns(plan, b, [&](int64_t j) {
      const Vec<T> t = column_sum(plan, j), goal = goal_now(plan.columns, j);
      store(plan.columns.sum + j, t);
      error += vabs<T>(t - goal);
      cold += is_cold<T>(t, goal);
    });
    plan.column_part[b] = sum_lanes<T>(error);
    plan.column_part2[b] = sum_lanes<T>(cold);
  });
  team.barrier();
  Evaluation<T> result;
  result.mass = sum_parts(plan.row_part4, plan.blocks());
  result.value = sum_parts(plan.row_part, plan.blocks()) / (plan.soft() ? T(1) : result.mass);
  result.error = sum_parts(plan.row_part2, plan.blocks()) + sum_parts(plan.column_part, plan.column_blocks());
  if (plan.soft() && result.error > 0) result.error /= result.mass;
  result.cold = sum_parts(plan.row_part3, plan.blocks()) + sum_parts(plan.column_part2, plan.column_blocks()) > 0;
  team.barrier();
  return result;
}

// The scalings move into the potentials.
template <class T>
void absorb(const Team& team, Plan<T>& plan) {
  for (Margin<T>* side : {&plan.rows, &plan.columns})
    team.blocks((side->size + block_columns - 1) / block_columns, [&](int64_t b) {
      const int64_t end = (b + 1) * block_columns < side->size ? (b + 1) * block_columns : side->size;
      for (int64_t i = b * block_columns; i < end; i += lanes<T>) {
        store(side->log + i, load(side->log + i) + log2<T>(load(side->scale + i)));
        store(side->scale + i, splat<T>(1));
      }
    });
  team.barrier();
}

}  // namespace sfr::cpu::SFR_ISA

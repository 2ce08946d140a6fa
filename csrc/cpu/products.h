// Products of a plan with vectors: all of the solver's time that is not exponentials.
#pragma once

#include "plan.h"

namespace sfr::cpu::SFR_ISA {

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
  const int64_t size = plan.rows.stride, used = whole_vectors<T>(plan.columns.count);
  alignas(64) T u[small_side];
  combine(plan.transposed, size, v, plan.columns.count, size / L, u);
  for (int64_t i = 0; i < size; i += L) store(u + i, between(i, load(u + i) + bias(plan.rows, i)));
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
      store(u, between(i, row_products<R>(P, plan.ld, v) + bias(plan.rows, i)));
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

}  // namespace sfr::cpu::SFR_ISA

// The linear system of a plan (../solver/newton.h), factorised, where one block has all of it. ../cpu/cholesky.h has
// the formulas and the rules, which are the same; here the factor is a triangle by rows, each of which lacks its
// pivot's inverse root.
//
// In float64, which most GPUs do slowly, and in functions of their own, whose registers weigh on nothing else: this is
// for systems that conjugate gradients would take too long for.
#pragma once

#include "../solver/marginal.h"
#include "../solver/strategy.h"
#include "team.cuh"

namespace sfr::cuda {

template <class T>
class Cholesky {
 public:
  static constexpr int most_patches = 64;  // of the side that has fewer: its triangle takes 16 KB

  // Of the plan P, [rows][ld], in memory that has been reserved.
  SFR_DEVICE Cholesky(Arena memory, const Team& team, const Marginal<T>& rows, const Marginal<T>& columns, const T* P,
                      int ld)
      : team_(team),
        P_(P),
        row_sum_(rows.sum()),
        column_sum_(columns.sum()),
        row_gain_(rows.gain()),
        column_gain_(columns.gain()),
        ld_(ld),
        rows_(int(rows.count)),
        columns_(int(columns.count)),
        has_null_(!rows.has_reach() && !columns.has_reach()) {
    place(memory);
  }
  static SFR_BOTH void reserve(Arena& arena, int rows, int columns) {
    Cholesky measured(rows, columns);
    measured.place(arena);
  }

  // `null`: the columns' part of the null vector, which a plan with a reach does not have. Barriers before and after.
  __device__ __noinline__ void factorise(const T* null, bool loose) const {
    team_.sync();
    set_scale(row_sum_, row_gain_, rows_, of_rows() ? scale_ : other_scale_);
    set_scale(column_sum_, column_gain_, columns_, of_rows() ? other_scale_ : scale_);
    each(columns_, [&](int j) { carried_[j] = double(null[j]); });
    team_.sync();
    // The null vector in units of the matrix, and what makes its length 1: each warp finds that.
    by_warps([&](int j) {
      double x = 0;
      if (has_null_ && scale_[j] > 0)
        x = of_rows() ? scale_[j] * along_row(j) : carried_[j] * sqrt_of(double(column_sum_[j]));
      if (team_.lane() == 0) x_[j] = x;
    });
    team_.sync();
    double norm = 0;
#pragma unroll 1
    for (int j = team_.lane(); j < size(); j += warp_threads) norm += x_[j] * x_[j];
    norm = over_lanes<Sum>(norm, warp_threads);
    const double by = norm > 0 ? 1 / norm : 0;

    // Entry (j, i) of the plan as the side that is factorised sees it.
    const int64_t along = of_rows() ? ld_ : 1, across = of_rows() ? 1 : ld_;
    const int others = of_rows() ? columns_ : rows_;
    by_warps([&](int j) {
      double* to = row(j);
#pragma unroll 1
      for (int k = j + team_.lane(); k < size(); k += warp_threads) {
        double sum = 0;
#pragma unroll 4
        for (int i = 0; i < others; ++i) {
          const T* entries = P_ + i * across;
          sum += (double(entries[j * along]) * other_scale_[i]) * (double(entries[k * along]) * other_scale_[i]);
        }
        to[k] = (j == k ? 1 : 0) + by * (x_[j] * x_[k]) - scale_[j] * scale_[k] * sum;
      }
    });

    constexpr double least_pivot = is_single<T> ? 1e-6 : 1e-13;
#pragma unroll 1
    for (int p = 0; p < size(); ++p) {
      team_.sync();
      const double *pivots = row(p), pivot = pivots[p];
      const bool none = !(pivot > least_pivot);
      const double inverse = none && !loose ? 0 : 1 / sqrt_of(none ? least_pivot : pivot);
      if (team_.rank == 0) inverse_[p] = inverse;
#pragma unroll 1
      for (int j = p + 1 + team_.warp(); j < size(); j += team_.warps()) {
        const double y = inverse * (inverse * pivots[j]);
        double* to = row(j);
#pragma unroll 2
        for (int k = j + team_.lane(); k < size(); k += warp_threads) to[k] -= y * pivots[k];
      }
    }
    team_.sync();
  }

  // Finds the columns' solution for their right side; the rows' is 0. Barriers before and after.
  __device__ __noinline__ void solve(const T* right) const {
    team_.sync();
    if (!of_rows()) {
      each(columns_, [&](int j) { x_[j] = scale_[j] * double(right[j]); });
      team_.sync();
      solve_triangles();
      each(columns_, [&](int j) { carried_[j] = scale_[j] * x_[j]; });
    } else {
      each(columns_, [&](int j) { carried_[j] = other_scale_[j] * (other_scale_[j] * double(right[j])); });
      team_.sync();
      by_warps([&](int i) {
        const double sum = along_row(i);
        if (team_.lane() == 0) x_[i] = -scale_[i] * sum;
      });
      team_.sync();
      solve_triangles();
      each(columns_, [&](int j) {
        double left = double(right[j]);
#pragma unroll 1
        for (int i = 0; i < rows_; ++i) left -= scale_[i] * x_[i] * double(P_[int64_t(i) * ld_ + j]);
        carried_[j] = other_scale_[j] * (other_scale_[j] * left);
      });
    }
    team_.sync();
  }
  SFR_DEVICE T solution(int j) const { return T(carried_[j]); }

 private:
  SFR_BOTH Cholesky(int rows, int columns) : rows_(rows), columns_(columns) {}

  SFR_BOTH void place(Arena& arena) {
    const int fewer = size(), more = rows_ + columns_ - fewer;
    triangle_ = arena.take<double>(int64_t(fewer) * (fewer + 1) / 2);
    scale_ = arena.take<double>(fewer);
    inverse_ = arena.take<double>(fewer);
    x_ = arena.take<double>(fewer);
    other_scale_ = arena.take<double>(more);
    carried_ = arena.take<double>(more);
  }

  SFR_BOTH bool of_rows() const { return rows_ < columns_; }
  SFR_BOTH int size() const { return of_rows() ? rows_ : columns_; }
  // Row j of the triangle; its first entry is (j, j).
  SFR_DEVICE double* row(int j) const { return triangle_ + j * size() - j * (j + 1) / 2; }

  template <class F>
  SFR_DEVICE void each(int count, F&& f) const {
#pragma unroll 1
    for (int j = team_.rank; j < count; j += team_.size) f(j);
  }
  template <class F>
  SFR_DEVICE void by_warps(F&& f) const {
#pragma unroll 1
    for (int j = team_.warp(); j < size(); j += team_.warps()) f(j);
  }
  // diag(gain sum)^-1/2, and 0 where the sum is next to nothing.
  SFR_DEVICE void set_scale(const T* sum, T gain, int count, double* scale) const {
    each(count, [&](int i) { scale[i] = sum[i] > Rules<T>::nothing ? 1 / sqrt_of(double(gain) * double(sum[i])) : 0; });
  }
  // (P carried)_i, by a warp.
  SFR_DEVICE double along_row(int i) const {
    const T* entries = P_ + int64_t(i) * ld_;
    double sum = 0;
#pragma unroll 1
    for (int j = team_.lane(); j < columns_; j += warp_threads) sum += double(entries[j]) * carried_[j];
    return over_lanes<Sum>(sum, warp_threads);
  }

  // x = (U^T U)^-1 x, by the first warp: each step waits for the one before. A barrier after it.
  SFR_DEVICE void solve_triangles() const {
    if (team_.warp() == 0) {
#pragma unroll 1
      for (int i = 0; i < size(); ++i) {
        const double y = inverse_[i] * (inverse_[i] * x_[i]), *at = row(i);
#pragma unroll 1
        for (int k = i + 1 + team_.lane(); k < size(); k += warp_threads) x_[k] -= y * at[k];
        sync_warp();
      }
#pragma unroll 1
      for (int k = team_.lane(); k < size(); k += warp_threads) x_[k] *= inverse_[k];
      sync_warp();
#pragma unroll 1
      for (int i = size() - 1; i >= 0; --i) {
        const double y = inverse_[i] * x_[i];
#pragma unroll 1
        for (int k = team_.lane(); k < i; k += warp_threads) x_[k] -= y * (inverse_[k] * row(k)[i]);
        sync_warp();
      }
#pragma unroll 1
      for (int k = team_.lane(); k < size(); k += warp_threads) x_[k] *= inverse_[k];
    }
    team_.sync();
  }

  Team team_;
  const T *P_ = nullptr, *row_sum_ = nullptr, *column_sum_ = nullptr;
  T row_gain_ = 1, column_gain_ = 1;
  int ld_ = 0, rows_, columns_;
  bool has_null_ = true;
  double *triangle_, *scale_, *inverse_;  // of the side that has fewer patches
  double* x_;                             // ... its null vector while it is factorised, then its solution
  double *other_scale_, *carried_;        // of the other side, and of columns
};

}  // namespace sfr::cuda

// The linear system of a plan (../solver/newton.h), factorised by one block. ../cpu/cholesky.h has the formulas and the
// rules, which are the same; here the factor is a triangle by rows, each of which lacks its pivot's inverse root.
//
// In float64, which most GPUs do slowly, and in functions of their own, whose registers weigh on nothing else: this is
// for systems that conjugate gradients would take too long for. Its memory is shared where there is room.
#pragma once

#include "../solver/marginal.h"
#include "../solver/strategy.h"
#include "team.cuh"

namespace sfr::cuda {

// A plan whose system is to be factorised: [rows][ld] entries, and what is known of them.
template <class T>
struct FactorisedPlan {
  const T *entries = nullptr, *row_sum = nullptr, *column_sum = nullptr;
  T row_gain = 1, column_gain = 1;
  int rows = 0, columns = 0, ld = 0;
  bool has_reach = false;
};

template <class T>
class Cholesky {
 public:
  // In memory that has been reserved.
  SFR_DEVICE Cholesky(Arena memory, const Team& team, const FactorisedPlan<T>& plan) : team_(team), plan_(plan) {
    place(memory);
  }
  static SFR_BOTH void reserve(Arena& arena, int rows, int columns) {
    Cholesky measured;
    measured.plan_.rows = rows, measured.plan_.columns = columns;
    measured.place(arena);
  }

  // `null`: the columns' part of the null vector, which a plan with a reach does not have. Barriers before and after.
  __device__ __noinline__ void factorise(const T* null, bool loose) const {
    team_.sync();
    set_scale(plan_.row_sum, plan_.row_gain, plan_.rows, of_rows() ? scale_ : other_scale_);
    set_scale(plan_.column_sum, plan_.column_gain, plan_.columns, of_rows() ? other_scale_ : scale_);
    each(plan_.columns, [&](int j) { carried_[j] = double(null[j]); });
    team_.sync();
    // The null vector in units of the matrix, and what makes its length 1: each warp finds that.
    by_warps([&](int j) {
      double x = 0;
      if (!plan_.has_reach && scale_[j] > 0)
        x = of_rows() ? scale_[j] * along_row(j) : carried_[j] * sqrt_of(double(plan_.column_sum[j]));
      if (team_.lane() == 0) x_[j] = x;
    });
    team_.sync();
    double norm = 0;
#pragma unroll 1
    for (int j = team_.lane(); j < size(); j += warp_threads) norm += x_[j] * x_[j];
    norm = over_lanes<Sum>(norm, warp_threads);
    const double by = norm > 0 ? 1 / norm : 0;
    by_warps([&](int j) {
#pragma unroll 1
      for (int k = j + team_.lane(); k < size(); k += warp_threads) row(j)[k] = (j == k ? 1 : 0) + by * (x_[j] * x_[k]);
    });

    const int others = of_rows() ? plan_.columns : plan_.rows;
#pragma unroll 1
    for (int i = 0; i < others; i += together) {
      team_.sync();
      put_panel(i, others - i);
      team_.sync();
      subtract(0);
    }
    eliminate(loose);
  }

  // Finds the columns' solution for their right side; the rows' is 0. Barriers before and after.
  __device__ __noinline__ void solve(const T* right) const {
    team_.sync();
    each(plan_.columns, [&](int j) {
      const double scale = of_rows() ? other_scale_[j] : scale_[j], x = scale * double(right[j]);
      if (of_rows())
        carried_[j] = scale * x;
      else
        x_[j] = x;
    });
    if (of_rows()) {
      team_.sync();
      by_warps([&](int i) {
        const double sum = along_row(i);
        if (team_.lane() == 0) x_[i] = -scale_[i] * sum;
      });
    }
    team_.sync();
    if (team_.warp() == 0) solve_triangles();
    team_.sync();
    each(plan_.columns, [&](int j) {
      if (!of_rows()) {
        carried_[j] = scale_[j] * x_[j];
        return;
      }
      double left = double(right[j]);
#pragma unroll 1
      for (int i = 0; i < plan_.rows; ++i) left -= scale_[i] * x_[i] * double(plan_.entries[int64_t(i) * plan_.ld + j]);
      carried_[j] = other_scale_[j] * (other_scale_[j] * left);
    });
    team_.sync();
  }
  SFR_DEVICE T solution(int j) const { return T(carried_[j]); }

 private:
  static constexpr int together = 8;  // rows that are subtracted at a time,
  static constexpr int of_warp = 4;   // and rows of a warp that they are subtracted from

  Cholesky() = default;

  SFR_BOTH void place(Arena& arena) {
    const int fewer = size(), more = plan_.rows + plan_.columns - fewer;
    triangle_ = arena.take<double>(int64_t(fewer) * (fewer + 1) / 2);
    scale_ = arena.take<double>(fewer);
    inverse_ = arena.take<double>(fewer);
    panel_ = arena.take<double>(int64_t(together) * fewer);
    x_ = arena.take<double>(fewer);
    other_scale_ = arena.take<double>(more);
    carried_ = arena.take<double>(more);
  }

  SFR_BOTH bool of_rows() const { return plan_.rows < plan_.columns; }
  SFR_BOTH int size() const { return of_rows() ? plan_.rows : plan_.columns; }
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
    const T* entries = plan_.entries + int64_t(i) * plan_.ld;
    double sum = 0;
#pragma unroll 1
    for (int j = team_.lane(); j < plan_.columns; j += warp_threads) sum += double(entries[j]) * carried_[j];
    return over_lanes<Sum>(sum, warp_threads);
  }

  // Rows from i on of W, or columns of it where rows are fewer, of which there are `left`.
  SFR_DEVICE void put_panel(int i, int left) const {
    const int64_t along = of_rows() ? plan_.ld : 1, across = of_rows() ? 1 : plan_.ld;
#pragma unroll 1
    for (int q = team_.warp(); q < together; q += team_.warps()) {
      const T* entries = plan_.entries + (q < left ? i + q : i) * across;
      const double scale = q < left ? other_scale_[i + q] : 0;
#pragma unroll 1
      for (int j = team_.lane(); j < size(); j += warp_threads)
        panel_[q * size() + j] = double(entries[j * along]) * (scale * scale_[j]);
    }
  }

  // The triangle, from row `begin` on, less panel^T panel.
  SFR_DEVICE void subtract(int begin) const {
#pragma unroll 1
    for (int j = begin + team_.warp() * of_warp; j < size(); j += team_.warps() * of_warp) {
      double y[of_warp][together];
#pragma unroll
      for (int q = 0; q < together; ++q)
#pragma unroll
        for (int r = 0; r < of_warp; ++r) y[r][q] = panel_[q * size() + (j + r < size() ? j + r : j)];
#pragma unroll 1
      for (int k = j + team_.lane(); k < size(); k += warp_threads) {
        double x[together];
#pragma unroll
        for (int q = 0; q < together; ++q) x[q] = panel_[q * size() + k];
#pragma unroll
        for (int r = 0; r < of_warp; ++r) {
          if (j + r > k) continue;
          double* to = row(j + r) + k;
          double left = *to;
#pragma unroll
          for (int q = 0; q < together; ++q) left -= y[r][q] * x[q];
          *to = left;
        }
      }
    }
  }

  // The triangle becomes its factor, `together` rows at a time: each is subtracted from those that follow among them,
  // and then all from the rest.
  SFR_DEVICE void eliminate(bool loose) const {
    constexpr double least_pivot = is_single<T> ? 1e-6 : 1e-13;
#pragma unroll 1
    for (int first = 0; first < size(); first += together) {
      const int end = first + together < size() ? first + together : size();
#pragma unroll 1
      for (int p = first; p < end; ++p) {
        team_.sync();
        const double *pivots = row(p), pivot = pivots[p];
        const bool none = !(pivot > least_pivot);
        const double inverse = none && !loose ? 0 : 1 / sqrt_of(none ? least_pivot : pivot);
        if (team_.rank == 0) inverse_[p] = inverse;
#pragma unroll 1
        for (int j = p + 1 + team_.warp(); j < end; j += team_.warps()) {
          const double y = inverse * (inverse * pivots[j]);
          double* to = row(j);
#pragma unroll 1
          for (int k = j + team_.lane(); k < size(); k += warp_threads) to[k] -= y * pivots[k];
        }
        if (team_.warp() == p % team_.warps())
#pragma unroll 1
          for (int k = end + team_.lane(); k < size(); k += warp_threads)
            panel_[(p - first) * size() + k] = inverse * pivots[k];
      }
      team_.sync();
      if (end < size()) subtract(end);
    }
    team_.sync();
  }

  // x = (U^T U)^-1 x, by one warp: each step waits for the one before.
  SFR_DEVICE void solve_triangles() const {
    const auto each_lane = [&](int begin, int end, auto f) {
#pragma unroll 1
      for (int k = begin + team_.lane(); k < end; k += warp_threads) f(k);
      sync_warp();
    };
#pragma unroll 1
    for (int i = 0; i < size(); ++i) {
      const double y = inverse_[i] * (inverse_[i] * x_[i]), *at = row(i);
      each_lane(i + 1, size(), [&](int k) { x_[k] -= y * at[k]; });
    }
    each_lane(0, size(), [&](int k) { x_[k] *= inverse_[k]; });
#pragma unroll 1
    for (int i = size() - 1; i >= 0; --i) {
      const double y = inverse_[i] * x_[i];
      each_lane(0, i, [&](int k) { x_[k] -= y * (inverse_[k] * row(k)[i]); });
    }
    each_lane(0, size(), [&](int k) { x_[k] *= inverse_[k]; });
  }

  Team team_;
  FactorisedPlan<T> plan_;
  double *triangle_, *scale_, *inverse_, *panel_;  // of the side that has fewer patches
  double* x_;                                      // ... its null vector while it is factorised, then its solution
  double *other_scale_, *carried_;                 // of the other side, and of columns
};

}  // namespace sfr::cuda

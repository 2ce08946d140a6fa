// The linear system of a plan (../solver/newton.h), factorised by one block. ../cpu/cholesky.h has the formulas and the
// rules, which are the same; here the factor is a triangle by rows, each of which lacks its pivot's inverse root, and
// patches that hold next to nothing, such as those of weight 0, have no row.
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
  bool of_rows = false;  // fewer of them are kept
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
  __device__ __noinline__ void factorise(const T* null, bool loose) {
    team_.sync();
    const T *own = plan_.of_rows ? plan_.row_sum : plan_.column_sum, *other = others_sum();
    const T own_gain = plan_.of_rows ? plan_.row_gain : plan_.column_gain;
    const T other_gain = plan_.of_rows ? plan_.column_gain : plan_.row_gain;
    if (team_.rank == 0) find_kept(own);
    each(others(), [&](int i) { other_scale_[i] = scale_of(other[i], other_gain); });
    each(plan_.columns, [&](int j) { carried_[j] = double(null[j]); });
    team_.sync();
    size_ = kept_[0];
    each(size_, [&](int j) { scale_[j] = scale_of(own[kept_[1 + j]], own_gain); });
    team_.sync();
    // The null vector in units of the matrix, and what makes its length 1: each warp finds that.
    by_warps([&](int j) {
      const int patch = kept_[1 + j];
      double x = 0;
      if (!plan_.has_reach)
        x = plan_.of_rows ? scale_[j] * along_row(patch) : carried_[patch] * sqrt_of(double(plan_.column_sum[patch]));
      if (team_.lane() == 0) x_[j] = x;
    });
    team_.sync();
    double norm = 0;
#pragma unroll 1
    for (int j = team_.lane(); j < size_; j += warp_threads) norm += x_[j] * x_[j];
    norm = over_lanes<Sum>(norm, warp_threads);
    const double by = norm > 0 ? 1 / norm : 0;
    by_warps([&](int j) {
#pragma unroll 1
      for (int k = j + team_.lane(); k < size_; k += warp_threads) row(j)[k] = (j == k ? 1 : 0) + by * (x_[j] * x_[k]);
    });

#pragma unroll 1
    for (int i = 0; i < others(); i += together) {
      team_.sync();
      put_panel(i, others() - i);
      team_.sync();
      subtract(0);
    }
    eliminate(loose);
  }

  // Finds the columns' solution for their right side; the rows' is 0. Barriers before and after.
  __device__ __noinline__ void solve(const T* right) {
    team_.sync();
    size_ = kept_[0];
    each(plan_.columns, [&](int j) {
      const double scale = plan_.of_rows ? other_scale_[j] : 0;
      carried_[j] = scale * (scale * double(right[j]));
    });
    team_.sync();
    by_warps([&](int i) {
      const int patch = kept_[1 + i];
      const double x = plan_.of_rows ? -scale_[i] * along_row(patch) : scale_[i] * double(right[patch]);
      if (team_.lane() == 0) x_[i] = x;
    });
    team_.sync();
    if (team_.warp() == 0) solve_triangles();
    team_.sync();
    if (!plan_.of_rows)
      each(size_, [&](int i) { carried_[kept_[1 + i]] = scale_[i] * x_[i]; });
    else
      each(plan_.columns, [&](int j) {
        double left = double(right[j]);
#pragma unroll 1
        for (int i = 0; i < size_; ++i)
          left -= scale_[i] * x_[i] * double(plan_.entries[int64_t(kept_[1 + i]) * plan_.ld + j]);
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
    const int fewer = plan_.rows < plan_.columns ? plan_.rows : plan_.columns,
              more = plan_.rows + plan_.columns - fewer;
    const int most = fewer < most_factorised ? fewer : most_factorised;
    triangle_ = arena.take<double>(int64_t(most) * (most + 1) / 2);
    scale_ = arena.take<double>(most);
    inverse_ = arena.take<double>(most);
    panel_ = arena.take<double>(int64_t(together) * most);
    x_ = arena.take<double>(most);
    other_scale_ = arena.take<double>(more);
    carried_ = arena.take<double>(more);
    kept_ = arena.take<int>(1 + most);
  }

  SFR_DEVICE int others() const { return plan_.of_rows ? plan_.columns : plan_.rows; }
  SFR_DEVICE const T* others_sum() const { return plan_.of_rows ? plan_.column_sum : plan_.row_sum; }
  // Row j of the triangle; its first entry is (j, j).
  SFR_DEVICE double* row(int j) const { return triangle_ + j * size_ - j * (j + 1) / 2; }

  template <class F>
  SFR_DEVICE void each(int count, F&& f) const {
#pragma unroll 1
    for (int j = team_.rank; j < count; j += team_.size) f(j);
  }
  template <class F>
  SFR_DEVICE void by_warps(F&& f) const {
#pragma unroll 1
    for (int j = team_.warp(); j < size_; j += team_.warps()) f(j);
  }
  // (gain sum)^-1/2, and 0 where the sum is next to nothing.
  static SFR_DEVICE double scale_of(T sum, T gain) {
    return sum > Rules<T>::nothing ? 1 / sqrt_of(double(gain) * double(sum)) : 0;
  }
  // Patches of the side that is factorised which hold something.
  SFR_DEVICE void find_kept(const T* sum) const {
    const int count = plan_.of_rows ? plan_.rows : plan_.columns;
    int found = 0;
#pragma unroll 1
    for (int i = 0; i < count; ++i)
      if (sum[i] > Rules<T>::nothing) kept_[1 + found++] = i;
    kept_[0] = found;
  }
  // (P carried)_i, by a warp.
  SFR_DEVICE double along_row(int i) const {
    const T* entries = plan_.entries + int64_t(i) * plan_.ld;
    double sum = 0;
#pragma unroll 1
    for (int j = team_.lane(); j < plan_.columns; j += warp_threads) sum += double(entries[j]) * carried_[j];
    return over_lanes<Sum>(sum, warp_threads);
  }

  // Rows from i on of W, or columns of it where the rows are factorised, of which there are `left`.
  SFR_DEVICE void put_panel(int i, int left) const {
    const int64_t along = plan_.of_rows ? plan_.ld : 1, across = plan_.of_rows ? 1 : plan_.ld;
#pragma unroll 1
    for (int q = team_.warp(); q < together; q += team_.warps()) {
      const T* entries = plan_.entries + (q < left ? i + q : i) * across;
      const double scale = q < left ? other_scale_[i + q] : 0;
#pragma unroll 1
      for (int j = team_.lane(); j < size_; j += warp_threads)
        panel_[q * size_ + j] = double(entries[kept_[1 + j] * along]) * (scale * scale_[j]);
    }
  }

  // The triangle, from row `begin` on, less panel^T panel.
  SFR_DEVICE void subtract(int begin) const {
#pragma unroll 1
    for (int j = begin + team_.warp() * of_warp; j < size_; j += team_.warps() * of_warp) {
      double y[of_warp][together];
#pragma unroll
      for (int q = 0; q < together; ++q)
#pragma unroll
        for (int r = 0; r < of_warp; ++r) y[r][q] = panel_[q * size_ + (j + r < size_ ? j + r : j)];
#pragma unroll 1
      for (int k = j + team_.lane(); k < size_; k += warp_threads) {
        double x[together];
#pragma unroll
        for (int q = 0; q < together; ++q) x[q] = panel_[q * size_ + k];
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
    constexpr double least_pivot = Rules<T>::least_pivot;
#pragma unroll 1
    for (int first = 0; first < size_; first += together) {
      const int end = first + together < size_ ? first + together : size_;
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
          for (int k = j + team_.lane(); k < size_; k += warp_threads) to[k] -= y * pivots[k];
        }
        if (team_.warp() == p % team_.warps())
#pragma unroll 1
          for (int k = end + team_.lane(); k < size_; k += warp_threads)
            panel_[(p - first) * size_ + k] = inverse * pivots[k];
      }
      team_.sync();
      if (end < size_) subtract(end);
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
    for (int i = 0; i < size_; ++i) {
      const double y = inverse_[i] * (inverse_[i] * x_[i]), *at = row(i);
      each_lane(i + 1, size_, [&](int k) { x_[k] -= y * at[k]; });
    }
    each_lane(0, size_, [&](int k) { x_[k] *= inverse_[k]; });
#pragma unroll 1
    for (int i = size_ - 1; i >= 0; --i) {
      const double y = inverse_[i] * x_[i];
      each_lane(0, i, [&](int k) { x_[k] -= y * (inverse_[k] * row(k)[i]); });
    }
    each_lane(0, size_, [&](int k) { x_[k] *= inverse_[k]; });
  }

  Team team_;
  FactorisedPlan<T> plan_;
  int size_ = 0;                                   // patches that are factorised:
  int* kept_;                                      // how many, and which
  double *triangle_, *scale_, *inverse_, *panel_;  // of them
  double* x_;                                      // ... their null vector while it is factorised, then their solution
  double *other_scale_, *carried_;                 // of the other side, and of columns
};

}  // namespace sfr::cuda

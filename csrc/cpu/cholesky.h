// The linear system of a plan (../solver/newton.h), factorised: it takes as long for one plan as for another, where
// conjugate gradients may take any time. In float64, whatever the plan is in.
//
// With W = diag(gain P 1)^-1/2 P diag(gain P^T 1)^-1/2 what is factorised is 1 - W^T W over the columns, or, where rows
// are fewer, 1 - W W^T over the rows, from which the columns follow: the fewer, the less it takes. With what makes its
// null vector, where there is one, no longer one: = U^T U, by rows of U. A pivot that is next to nothing is of patches
// that hardly touch the others: one of them stays where it is, or, `loose`, goes as far as its right side wants it to
// at that pivot.
#pragma once

#include "../solver/marginal.h"
#include "../solver/strategy.h"
#include "team.h"

namespace sfr::cpu::SFR_ISA {

template <class T>
class Cholesky {
 public:
  // For as many patches or fewer: those that are kept.
  void reserve(Arena& arena, int64_t rows, int64_t columns) {
    const int64_t fewer = rows < columns ? rows : columns, more = rows < columns ? columns : rows;
    const int64_t size = rounded(fewer < most_factorised ? fewer : most_factorised);
    matrix_ = arena.take<double>(size * size);
    panel_ = arena.take<double>(panel * size);
    scale_ = arena.take<double>(size);
    inverse_ = arena.take<double>(size);
    x_ = arena.take<double>(size);
    other_scale_ = arena.take<double>(rounded(more));
    carried_ = arena.take<double>(rounded(more));
  }

  // `null`: the columns' part of the null vector.
  template <class Plan>
  void factorise(const Plan& plan, const T* null, bool loose) {
    of_rows_ = plan.rows.count < plan.columns.count;
    const Marginal<T>&own = of_rows_ ? plan.rows : plan.columns, &other = of_rows_ ? plan.columns : plan.rows;
    size_ = rounded(own.count);
    set_scale(own, size_, scale_);
    set_scale(other, rounded(other.count), other_scale_);
    set_null(plan, null);
    for (int64_t j = 0; j < size_; ++j) {
      double* row = matrix_ + j * size_;
      for (int64_t k = 0; k < size_; ++k) row[k] = x_[j] * x_[k];
      row[j] += 1;
    }
    for (int64_t i = 0; i < other.count; i += panel) {
      if (of_rows_)
        put_columns(plan, i);
      else
        for (int64_t r = 0; r < panel; ++r) put_row(plan, i + r, panel_ + r * size_);
      subtract(panel_, 0);
    }
    for (int64_t i = 0; i < size_; i += panel) {
      for (int64_t p = i; p < i + panel; ++p) {
        double* row = matrix_ + p * size_;
        const int64_t begin = p - p % L;
        for (int64_t q = i; q < p; ++q) add(row, -matrix_[q * size_ + p], matrix_ + q * size_, begin);
        const bool none = !(row[p] > least_pivot);
        inverse_[p] = none && !loose ? 0 : 1 / sqrt_of(none ? least_pivot : row[p]);
        for (int64_t k = begin; k < p; ++k) row[k] = 0;
        for (int64_t k = begin; k < size_; k += L) store(row + k, load(row + k) * inverse_[p]);
      }
      subtract(matrix_ + i * size_, i + panel);
    }
  }

  // The columns' solution for their right side (the rows' is 0), with 0 in the padding.
  template <class Plan>
  void solve(const Plan& plan, const T* right, T* out) {
    const Marginal<T>& columns = plan.columns;
    const int64_t count = columns.count;
    if (!of_rows_) {
      for (int64_t j = 0; j < size_; ++j) x_[j] = j < count ? scale_[j] * double(right[j]) : 0;
      solve_triangles();
      for (int64_t j = 0; j < columns.stride; ++j) out[j] = j < count ? T(scale_[j] * x_[j]) : T(0);
      return;
    }
    for (int64_t j = 0; j < count; ++j) carried_[j] = other_scale_[j] * (other_scale_[j] * double(right[j]));
    for (int64_t i = 0; i < size_; ++i) x_[i] = i < plan.rows.count ? -scale_[i] * along_row(plan, i) : 0;
    solve_triangles();
    for (int64_t j = 0; j < count; ++j) carried_[j] = double(right[j]);
    for (int64_t i = 0; i < plan.rows.count; ++i) {
      const T* entries = plan.at(i, 0);
      const double by = scale_[i] * x_[i];
      for (int64_t j = 0; j < count; ++j) carried_[j] -= by * double(entries[j]);
    }
    for (int64_t j = 0; j < columns.stride; ++j)
      out[j] = j < count ? T(other_scale_[j] * (other_scale_[j] * carried_[j])) : T(0);
  }

 private:
  static constexpr int L = lanes<double>;
  static constexpr int64_t panel = 8;  // patches of the other side at a time
  static_assert(panel % L == 0);
  static constexpr double least_pivot = Rules<T>::least_pivot;

  static int64_t rounded(int64_t patches) { return (patches + panel - 1) / panel * panel; }

  // diag(gain sum)^-1/2, and 0 where the sum is next to nothing.
  static void set_scale(const Marginal<T>& side, int64_t size, double* scale) {
    for (int64_t i = 0; i < size; ++i) {
      const double sum = i < side.count ? double(side.sum()[i]) : 0;
      scale[i] = sum > Rules<T>::nothing ? 1 / sqrt_of(side.gain() * sum) : 0;
    }
  }

  template <class Plan>
  void set_null(const Plan& plan, const T* null) {
    if (of_rows_)
      for (int64_t j = 0; j < plan.columns.count; ++j) carried_[j] = double(null[j]);
    double norm = 0;
    for (int64_t j = 0; j < size_; ++j) {
      const bool none = plan.has_reach() || !(scale_[j] > 0);
      x_[j] = none       ? 0
              : of_rows_ ? scale_[j] * along_row(plan, j)
                         : double(null[j]) * sqrt_of(double(plan.columns.sum()[j]));
      norm += x_[j] * x_[j];
    }
    const double length = sqrt_of(norm);
    for (int64_t j = 0; length > 0 && j < size_; ++j) x_[j] /= length;
  }

  // (P carried)_i
  template <class Plan>
  double along_row(const Plan& plan, int64_t i) const {
    const T* entries = plan.at(i, 0);
    const int64_t count = plan.columns.count, whole = count - count % L;
    double sums[L] = {}, rest = 0;
    for (int64_t j = 0; j < whole; j += L)
      for (int l = 0; l < L; ++l) sums[l] += double(entries[j + l]) * carried_[j + l];
    for (int64_t j = whole; j < count; ++j) rest += double(entries[j]) * carried_[j];
    for (const double sum : sums) rest += sum;
    return rest;
  }

  // Row i of W into the panel ...
  template <class Plan>
  void put_row(const Plan& plan, int64_t i, double* row) const {
    const double scale = i < plan.rows.count ? other_scale_[i] : 0;
    const T* entries = plan.at(scale > 0 ? i : 0, 0);
    const int64_t count = plan.columns.count;
    for (int64_t j = 0; j < count; ++j) row[j] = double(entries[j]) * (scale * scale_[j]);
    for (int64_t j = count; j < size_; ++j) row[j] = 0;
  }
  // ... or columns of W from j on.
  template <class Plan>
  void put_columns(const Plan& plan, int64_t j) const {
    const int64_t left = plan.columns.count - j, count = left < panel ? left : panel;
    for (int64_t i = 0; i < size_; ++i) {
      const T* entries = plan.at(i < plan.rows.count ? i : 0, j);
      for (int64_t q = 0; q < panel; ++q)
        panel_[q * size_ + i] = q < count ? double(entries[q]) * (scale_[i] * other_scale_[j + q]) : 0;
    }
  }

  // x = (U^T U)^-1 x
  void solve_triangles() {
    for (int64_t i = 0; i < size_; ++i) {
      const double y = x_[i] * inverse_[i];
      add(x_, -y, matrix_ + i * size_, i - i % L);
      x_[i] = y;
    }
    for (int64_t i = size_ - 1; i >= 0; --i) {
      const double y = x_[i];
      x_[i] = 0;
      Vec<double> sum{};
      for (int64_t k = i - i % L; k < size_; k += L) sum += load(matrix_ + i * size_ + k) * load(x_ + k);
      x_[i] = (y - sum_lanes<double>(sum)) * inverse_[i];
    }
  }

  void add(double* to, double by, const double* row, int64_t begin) const {
    for (int64_t k = begin; k < size_; k += L) store(to + k, load(to + k) + by * load(row + k));
  }

  // matrix -= rows^T rows, for a panel of rows, from this row of the matrix on, and from the diagonal on.
  void subtract(const double* rows, int64_t from) {
    constexpr int R = 4;
    for (int64_t j = from; j < size_; j += R)
      for (int64_t k = j - j % L; k < size_; k += L) {
        double* at = matrix_ + j * size_ + k;
        Vec<double> left[R];
        for (int r = 0; r < R; ++r) left[r] = load(at + r * size_);
        for (int64_t q = 0; q < panel; ++q) {
          const double* row = rows + q * size_;
          const Vec<double> x = load(row + k);
          for (int r = 0; r < R; ++r) left[r] -= row[j + r] * x;
        }
        for (int r = 0; r < R; ++r) store(at + r * size_, left[r]);
      }
  }

  double *matrix_ = nullptr, *panel_ = nullptr, *inverse_ = nullptr;
  double *scale_ = nullptr, *other_scale_ = nullptr;  // of the side that is factorised, and of the other
  double* x_ = nullptr;                               // the null vector while it is factorised, then a solution
  double* carried_ = nullptr;                         // columns, where the rows are factorised
  int64_t size_ = 0;
  bool of_rows_ = false;
};

}  // namespace sfr::cpu::SFR_ISA

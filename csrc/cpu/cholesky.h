// The linear system of a plan (../solver/newton.h), factorised: it takes as long for one plan as for another, where
// conjugate gradients may take any time. In float64, whatever the plan is in.
//
// Of S = diag(gain P^T 1) - P^T diag(1 / (gain P 1)) P, in units in which its diagonal would be 1 but for the second
// term, and with what makes its null vector, where there is one, no longer one: = U^T U, by rows of U. A pivot that is
// next to nothing is of patches that hardly touch the others: one of them stays where it is, or, `loose`, goes as far
// as its right side wants it to at that pivot.
#pragma once

#include "../solver/marginal.h"
#include "../solver/strategy.h"
#include "team.h"

namespace sfr::cpu::SFR_ISA {

template <class T>
class Cholesky {
 public:
  // Iterations that have as many multiplications; 0: there are too many columns.
  static int64_t price(int64_t rows, int64_t columns) {
    return columns > most_columns || rows == 0 ? 0 : 4 + columns / 4 + columns * columns / (12 * rows);
  }

  // For as many columns or fewer: those that are kept.
  void reserve(Arena& arena, int64_t columns) {
    const int64_t size = rounded(columns < most_columns ? columns : most_columns);
    matrix_ = arena.take<double>(size * size);
    panel_ = arena.take<double>(panel * size);
    scale_ = arena.take<double>(size);
    inverse_ = arena.take<double>(size);
    x_ = arena.take<double>(size);
  }

  template <class Plan>
  void factorise(const Plan& plan, const T* null, bool loose) {
    size_ = rounded(plan.columns.count);
    set_scale(plan, null);
    for (int64_t j = 0; j < size_; ++j) {
      double* row = matrix_ + j * size_;
      for (int64_t k = 0; k < size_; ++k) row[k] = x_[j] * x_[k];
      row[j] += 1;
    }
    for (int64_t i = 0; i < plan.rows.count; i += panel) {
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

  // out = S^-1 right, with 0 in the padding.
  void solve(const Marginal<T>& columns, const T* right, T* out) {
    for (int64_t j = 0; j < size_; ++j) x_[j] = j < columns.count ? scale_[j] * double(right[j]) : 0;
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
    for (int64_t j = 0; j < columns.stride; ++j) out[j] = j < columns.count ? T(scale_[j] * x_[j]) : T(0);
  }

 private:
  static constexpr int L = lanes<double>;
  static constexpr int64_t most_columns = 256;  // the matrix takes 512 KB
  static constexpr int64_t panel = 8;           // rows at a time
  static_assert(panel % L == 0);
  static constexpr double least_pivot = is_single<T> ? 1e-6 : 1e-13;

  static int64_t rounded(int64_t columns) { return (columns + panel - 1) / panel * panel; }

  template <class Plan>
  void set_scale(const Plan& plan, const T* null) {
    double norm = 0;
    for (int64_t j = 0; j < size_; ++j) {
      const double sum = j < plan.columns.count ? double(plan.columns.sum()[j]) : 0;
      const double root = sum > Rules<T>::nothing ? sqrt_of(plan.columns.gain() * sum) : 0;
      scale_[j] = root > 0 ? 1 / root : 0;
      x_[j] = plan.has_reach() || !(root > 0) ? 0 : root * double(null[j]);
      norm += x_[j] * x_[j];
    }
    const double length = sqrt_of(norm);
    for (int64_t j = 0; length > 0 && j < size_; ++j) x_[j] /= length;
  }

  // diag(P 1)^-1/2 P diag(P^T 1)^-1/2
  template <class Plan>
  void put_row(const Plan& plan, int64_t i, double* row) const {
    const double sum = i < plan.rows.count ? double(plan.rows.sum()[i]) : 0;
    const double scale = sum > Rules<T>::nothing ? 1 / sqrt_of(plan.rows.gain() * sum) : 0;
    const T* entries = plan.at(scale > 0 ? i : 0, 0);
    const int64_t count = plan.columns.count;
    for (int64_t j = 0; j < count; ++j) row[j] = double(entries[j]) * (scale * scale_[j]);
    for (int64_t j = count; j < size_; ++j) row[j] = 0;
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

  double *matrix_ = nullptr, *panel_ = nullptr, *scale_ = nullptr, *inverse_ = nullptr;
  double* x_ = nullptr;  // the null vector while it is factorised, then a solution
  int64_t size_ = 0;
};

}  // namespace sfr::cpu::SFR_ISA

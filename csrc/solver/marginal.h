// One side of a problem: its marginal, its potential, and how the marginal gives way where the side has a reach.
#pragma once

#include "strategy.h"

namespace SFR_TARGET {

// Vectors of a side, one after the other; everything in powers of two (see plan.h of the device).
template <class T>
struct Marginal {
  Index count = 0;            // patches
  T* weight = nullptr;        // the marginal a or b
  T* reach_target = nullptr;  // where there is a reach: the target marginal, which follows the potentials
  T* vectors = nullptr;
  Index stride = 0;

  T total = 1;           // sum of the weights; 1 without a reach
  T eps_over_reach = 0;  // 0: the marginal is met
  T centre = 0;          // centre / 2 / reach in powers of two: f is that of C, F that of C - centre
  T offset = 0;          // ... and the shift's part

  static constexpr int of_rows = 5, of_columns = 11;  // vectors that there are

  SFR_INLINE T* log() const { return vectors; }               // F or G
  SFR_INLINE T* scale() const { return vectors + stride; }    // scaling u or v
  SFR_INLINE T* sum() const { return vectors + 2 * stride; }  // of the plan over the other side
  // The linear system of a plan (newton.h): its right side, and its solution.
  SFR_INLINE T* right() const { return vectors + 3 * stride; }
  SFR_INLINE T* step() const { return vectors + 4 * stride; }
  // Of the columns alone, for its conjugate gradients.
  SFR_INLINE T* residual() const { return vectors + 5 * stride; }
  SFR_INLINE T* direction() const { return vectors + 6 * stride; }
  SFR_INLINE T* product() const { return vectors + 7 * stride; }
  SFR_INLINE T* inverse_diagonal() const { return vectors + 8 * stride; }
  SFR_INLINE T* best() const { return vectors + 9 * stride; }
  // ... and what log() was at a larger eps.
  SFR_INLINE T* before() const { return vectors + 10 * stride; }
  // Backward (adjoint.h): the potential without the marginal, in units of eps; what the plan's row or column is held in
  // units of; and d/dweight.
  SFR_INLINE T* bare() const { return scale(); }
  SFR_INLINE T* unit() const { return log(); }
  SFR_INLINE T* gradient() const { return right(); }

  // Gives the side a reach, in units of the cost like eps and centre; its weights are then to have their own sum.
  SFR_FN void set_reach(T reach, T eps, T centre, T sum_of_weights) {
    eps_over_reach = eps / reach;
    this->centre = offset = centre / (2 * reach) * T(1 / ln2);
    total = sum_of_weights;
  }
  SFR_INLINE bool has_reach() const { return eps_over_reach > 0; }
  SFR_INLINE T reach(T eps) const { return eps / eps_over_reach; }
  // f / reach, from a potential without the marginal, in units of eps.
  template <class V>
  SFR_INLINE V over_reach(V bare) const {
    return eps_over_reach * bare + offset * T(ln2);
  }
  // The same of a potential that the shift is no part of.
  template <class V>
  SFR_INLINE V over_reach_unshifted(V bare) const {
    return eps_over_reach * bare + centre * T(ln2);
  }

  // What the plan's sums should be.
  SFR_INLINE const T* target() const { return has_reach() ? reach_target : weight; }
  // ... once a scaling of x more has moved the potentials.
  SFR_INLINE Vec<T> target_at(Index i, Vec<T> x) const {
    const Vec<T> now = load(target() + i);
    return has_reach() ? now * exp2<T>(-eps_over_reach * log2<T>(x)) : now;
  }
  // The target marginal at a potential of a side with a reach.
  SFR_INLINE Vec<T> target_under_reach(Vec<T> log_weight, Vec<T> log) const {
    return exp2<T>(log_weight - eps_over_reach * (log - log_weight) - offset);
  }
  // The potential that makes 2^most * sum, a sum over the other side, what it should be; `most` is at least
  // Number<T>::lowest, where a patch has no pair and is left behind.
  SFR_INLINE Vec<T> updated(Vec<T> log_weight, Vec<T> most, Vec<T> sum) const {
    const Vec<T> log = most + (sum > 0 ? log2<T>(sum) : Vec<T>{});
    return held(has_reach() ? log_weight - (log + offset) / gain() : log_weight - log);
  }
  // A potential that is so large that its rounding could make any mass of the patch's: none, then.
  SFR_INLINE static Vec<T> held(Vec<T> x) {
    const Vec<T> rounding = vabs<T>(x) * (2 * Number<T>::epsilon);
    return rounding > T(0.5) ? x - rounding : x;
  }
  // A mass that nobody else notices.
  SFR_INLINE T nothing() const { return Rules<T>::nothing * total; }
  // How much faster than the marginal its distance from the target follows the potential.
  SFR_INLINE T gain() const { return 1 + eps_over_reach; }
};

// The error of both sides, from the distances of the plan's sums from their targets. Under a reach it is in units of
// the mass, and that of the plan: the rest of the distance is its target's, which moves eps / reach times as far.
template <class T>
SFR_FN T error_of_both(const Marginal<T>& rows, const Marginal<T>& columns, T of_rows, T of_columns, T mass) {
  if (!rows.has_reach() && !columns.has_reach()) return of_rows + of_columns;
  // One division: on a GPU each is a call.
  const T error = of_rows * columns.gain() + of_columns * rows.gain();
  return error > 0 ? error / (rows.gain() * columns.gain() * mass) : error;
}

}  // namespace SFR_TARGET

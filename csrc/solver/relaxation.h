// The factor of over-relaxation, from the contraction seen.
#pragma once

#include "function.h"

namespace SFR_TARGET {

// Plain iterations contract by lambda; with factor w the rate r obeys (r + w - 1)^2 = r w^2 lambda up to the best
// w = 2 / (1 + sqrt(1 - lambda)), where it is w - 1 (Young 1954; for Sinkhorn: Thibault et al. 2021, Lehmann et al.
// 2022). Every `window` iterations the rate is measured, lambda follows, and w with it; an error that grew sends w back
// to 1 and lowers its ceiling.
template <class T>
class Relaxation {
 public:
  SFR_FN explicit Relaxation(bool on) : on_(on) {}

  SFR_FN T factor() const { return factor_; }

  // The error after `window` more iterations.
  SFR_FN void observe(T error) {
    if (!on_) return;
    const T before = last_;
    last_ = error;
    if (!(before > 0)) return;
    if (factor_ > 1 && error > before) {
      factor_ = 1;
      ceiling_ = 1 + (ceiling_ - 1) * T(0.9);
    } else if (error < T(0.3) && error > 0) {
      T rate = error / before;
      SFR_ROLLED
      for (int k = 1; k < window; k *= 2) rate = sqrt_of(rate);
      if (rate > T(0.9999)) rate = T(0.9999);
      if (rate > factor_ - 1 + T(1e-3)) {
        T lambda = (rate + factor_ - 1) * (rate + factor_ - 1) / (rate * factor_ * factor_);
        if (lambda > T(0.9999)) lambda = T(0.9999);
        const T best = 2 / (1 + sqrt_of(1 - lambda));
        if (best > factor_) factor_ = best;
        if (factor_ > ceiling_) factor_ = ceiling_;
      }
    }
  }

  static constexpr int window = 8;  // a power of two

 private:
  bool on_;
  T factor_ = 1, ceiling_ = T(1.95), last_ = 0;
};

}  // namespace SFR_TARGET

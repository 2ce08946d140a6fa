// Sinkhorn iterations of one problem in the scaling domain, over-relaxed, with the scalings absorbed into
// the potentials before they leave the range of the type, and log-domain steps where even that would underflow.
#pragma once

#include "plan.h"

namespace sfr::cpu::SFR_ISA {

// Mean and standard deviation of the cost under a (x) b. The deviation is taken in units of the largest, so
// that nothing overflows or underflows on the way.
template <class T>
struct Spread {
  T mean, largest, deviation;
};

template <class T>
Spread<T> measure(const Team& team, Plan<T>& plan) {
  constexpr int L = lanes<T>;
  const auto over_rows = [&](auto row_value, T* part) {
    team.blocks(plan.blocks(), [&](int64_t b) {
      const int64_t end = plan.block_end(b) < plan.rows.count ? plan.block_end(b) : plan.rows.count;
      T sum = 0;
      for (int64_t i = b * plan.block(); i < end; ++i) sum = row_value(i, sum);
      part[b] = sum;
    });
    team.barrier();
  };
  // Weights of the columns with 0 in the padding: 1 - bias times weight.
  const auto column_weight = [&](int64_t j) { return load(plan.columns.weight + j) - load(plan.columns.bias + j); };
  Spread<T> out;
  over_rows(
      [&](int64_t i, T sum) {
        Vec<T> row{};
        for (int64_t j = 0; j < plan.ld; j += L) row += column_weight(j) * load(plan.cost + i * plan.ld + j);
        return sum + plan.rows.weight[i] * sum_lanes<T>(row);
      },
      plan.row_part);
  out.mean = sum_parts(plan.row_part, plan.blocks());
  const T mean = out.mean;
  over_rows(
      [&](int64_t i, T most) {
        Vec<T> row{};
        for (int64_t j = 0; j < plan.ld; j += L) {
          const Vec<T> d = vabs<T>(load(plan.cost + i * plan.ld + j) - mean);
          row = vmax<T>(row, column_weight(j) > 0 ? d : Vec<T>{});
        }
        const T largest = max_lanes<T>(row);
        return largest > most ? largest : most;
      },
      plan.row_part2);
  out.largest = 0;
  for (int64_t b = 0; b < plan.blocks(); ++b)
    if (plan.row_part2[b] > out.largest) out.largest = plan.row_part2[b];
  team.barrier();
  const T unit = out.largest > 0 ? out.largest : T(1);
  over_rows(
      [&](int64_t i, T sum) {
        Vec<T> row{};
        for (int64_t j = 0; j < plan.ld; j += L) {
          const Vec<T> d = (load(plan.cost + i * plan.ld + j) - mean) / unit;
          row += column_weight(j) * d * d;
        }
        return sum + plan.rows.weight[i] * sum_lanes<T>(row);
      },
      plan.row_part);
  out.deviation = unit * T(__builtin_sqrt(double(sum_parts(plan.row_part, plan.blocks()))));
  team.barrier();
  return out;
}

// The potential at i from a sum 2^most * sum over the other side: log2 a - log2 of it, or less with a reach.
template <class T>
SFR_INLINE Vec<T> updated(const Margin<T>& side, int64_t i, Vec<T> most, Vec<T> sum) {
  const Vec<T> start = load(side.log_weight + i);
  return side.soft > 0 ? start - (most + log2<T>(sum) + side.offset) / side.gain() : start - most - log2<T>(sum);
}

// Exact update of F in the log domain: F_i = log2 a_i - log2 sum_j 2^(G_j - S_ij). `keep`: the exponentials stay in P,
// and what is missing to F in the rows' scalings.
template <bool keep = false, class T>
void update_rows(const Team& team, Plan<T>& plan) {
  constexpr int L = lanes<T>;
  team.blocks(plan.blocks(), [&](int64_t b) {
    for (int64_t i = b * plan.block(); i < plan.block_end(b); i += L) {
      Vec<T> sums[L] = {};
      T most[L] = {};
      for (int64_t r = 0; r < L; ++r) {
        if (i + r >= plan.rows.count) {
          sums[r][0] = 1;
          continue;
        }
        const T* cost = plan.cost + (i + r) * plan.ld;
        Vec<T> top = splat<T>(-T(__builtin_inf()));
        const auto exponent = [&](int64_t j) {
          return load(plan.columns.log + j) - (load(cost + j) - plan.mean) * plan.factor;
        };
        for (int64_t j = 0; j < plan.ld; j += L) top = vmax<T>(top, exponent(j));
        most[r] = max_lanes<T>(top);
        for (int64_t j = 0; j < plan.ld; j += L) {
          const Vec<T> p = exp2<T>(exponent(j) - most[r]);
          if constexpr (keep) store(plan.P + (i + r) * plan.ld + j, p);
          sums[r] += p;
        }
      }
      if constexpr (keep) {
        store(plan.rows.log + i, -load(most));
        store(plan.rows.scale + i, load(plan.rows.weight + i) / sum_rows<T>(sums));
        continue;
      }
      store(plan.rows.log + i, updated(plan.rows, i, load(most), sum_rows<T>(sums)));
    }
  });
  team.barrier();
}

// Exact update of G: G_j = log2 b_j - log2 sum_i 2^(F_i - S_ij).
template <class T>
void update_columns(const Team& team, Plan<T>& plan) {
  team.blocks(plan.column_blocks(), [&](int64_t b) {
    for_columns(plan, b, [&](int64_t j) {
      const auto exponent = [&](int64_t i) {
        return plan.rows.log[i] - (load(plan.cost + i * plan.ld + j) - plan.mean) * plan.factor;
      };
      Vec<T> most = exponent(0), sum{};
      for (int64_t i = 1; i < plan.rows.count; ++i) most = vmax<T>(most, exponent(i));
      for (int64_t i = 0; i < plan.rows.count; ++i) sum += exp2<T>(exponent(i) - most);
      const Vec<T> log = updated(plan.columns, j, most, sum);
      store(plan.columns.log + j, load(plan.columns.bias + j) > 0 ? load(plan.columns.log_weight + j) : log);
    });
  });
  team.barrier();
}

// The factor of over-relaxation, from the contraction seen. Plain iterations contract by lambda; with factor w the
// rate r obeys (r + w - 1)^2 = r w^2 lambda up to the best w = 2 / (1 + sqrt(1 - lambda)), where it is w - 1
// (Young 1954; for Sinkhorn: Thibault et al. 2021, Lehmann et al. 2022). Every `window` iterations the rate is
// measured, lambda follows, and w with it; an error that grew sends w back to 1 and lowers its ceiling.
template <class T>
class Relaxation {
 public:
  explicit Relaxation(bool on) : on_(on) {}

  T factor() const { return factor_; }

  // Would iterations bring this error below tol as soon as Newton steps, each of which squares it and costs twenty?
  // `last` is the error four iterations ago.
  static bool soon(T error, T last, T tol) {
    const T fall = error / last;
    T iterated = error;
    for (T squared = error; squared > tol; squared *= squared) iterated *= fall * fall * fall * fall * fall;
    return iterated <= tol;
  }

  // The error after `window` more iterations.
  void observe(T error) {
    if (!on_) return;
    const T before = last_;
    last_ = error;
    if (!(before > 0)) return;
    if (factor_ > 1 && error > before) {
      factor_ = 1;
      ceiling_ = 1 + (ceiling_ - 1) * T(0.9);
    } else if (error < T(0.3) && error > 0) {
      T rate = error / before;
      for (int k = 1; k < window; k *= 2) rate = T(__builtin_sqrt(double(rate)));
      if (rate > T(0.9999)) rate = T(0.9999);
      if (rate > factor_ - 1 + T(1e-3)) {
        T lambda = (rate + factor_ - 1) * (rate + factor_ - 1) / (rate * factor_ * factor_);
        if (lambda > T(0.9999)) lambda = T(0.9999);
        const T best = 2 / (1 + T(__builtin_sqrt(double(1 - lambda))));
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

template <class T>
SFR_INLINE Vec<T> in_range(Vec<T> x) {
  constexpr T most = sizeof(T) == 4 ? T(1073741824) : T(1.7e72), least = 1 / most;  // 2^30, about 2^240
  return x > most ? splat<T>(most) : x < least ? splat<T>(least) : x;
}

// x (w / (x s))^omega by the [1/1] Pade approximant about 1, which needs no power; the plain w / s where the
// ratio is far from 1. One division either way. Kept in range.
template <class T>
SFR_INLINE Vec<T> relaxed(Vec<T> x, Vec<T> s, Vec<T> w, T omega) {
  const Vec<T> have = x * s;
  const Int<T> near = (have > w * T(0.5)) & (have < w * T(2));
  const Vec<T> above = x * ((1 + omega) * w - (omega - 1) * have), below = (1 + omega) * have - (omega - 1) * w;
  return in_range<T>((near ? above : w) / (near ? below : s));
}

// The same for a marginal that bends towards w as x grows: a smaller power, taken by logarithms.
template <class T>
SFR_INLINE Vec<T> relaxed(const Margin<T>& side, Vec<T> x, Vec<T> s, Vec<T> w, T omega) {
  if (side.soft == 0) return relaxed<T>(x, s, w, omega);
  const Vec<T> have = x * s, power = log2<T>(in_range<T>(w / have));
  const Int<T> near = (have > w * T(0.5)) & (have < w * T(2));
  return in_range<T>(x * exp2<T>(power * ((near ? splat<T>(omega) : splat<T>(1)) / side.gain())));
}

template <class T>
SFR_INLINE Vec<T> out_of_range(Vec<T> x) {
  constexpr T most = sizeof(T) == 4 ? T(536870912) : T(8e71);
  return ((x > most) | (x < 1 / most)) ? splat<T>(1) : Vec<T>{};
}

// What ended a burst of iterations.
enum class Burst { reached, at_edge, stopped };

// What a look at one side tells.
template <class T>
struct Look {
  T error = 0, mass = 0;
  bool at_edge = false;
};

// The rows' half of an iteration, and the columns' sums; with a look, the error and the mass before it.
template <bool look, class T>
Look<T> scale_rows(const Team& team, Plan<T>& plan, T omega) {
  Margin<T>& rows = plan.rows;
  team.blocks(plan.blocks(), [&](int64_t b) {
    Vec<T> error{}, edge{}, mass{};
    product_pair(plan, b, plan.columns.scale, [&](int64_t i, Vec<T> s) {
      const Vec<T> u = load(rows.scale + i), a = rows.goal_at(i, u), next = relaxed<T>(rows, u, s, a, omega);
      if constexpr (look) {
        error += vabs<T>(u * s - a);
        mass += u * s - load(rows.bias + i);
        edge += out_of_range<T>(next);
      }
      store(rows.scale + i, next);
      return next;
    });
    if constexpr (look) {
      plan.row_part[b] = sum_lanes<T>(error);
      plan.row_part2[b] = sum_lanes<T>(edge);
      plan.row_part3[b] = sum_lanes<T>(mass);
    }
  });
  team.barrier();
  Look<T> seen;
  if constexpr (look) {
    seen.error = sum_parts(plan.row_part, plan.blocks());
    seen.mass = sum_parts(plan.row_part3, plan.blocks());
    seen.at_edge = sum_parts(plan.row_part2, plan.blocks()) > 0;
  }
  return seen;
}

// The columns' half; with a look, the error that it leaves.
template <bool look, class T>
Look<T> scale_columns(const Team& team, Plan<T>& plan, T omega) {
  Margin<T>& columns = plan.columns;
  team.blocks(plan.column_blocks(), [&](int64_t b) {
    Vec<T> left{}, edge{};
    for_columns(plan, b, [&](int64_t j) {
      const Vec<T> v = load(columns.scale + j), w = columns.goal_at(j, v), t = column_sum(plan, j);
      const Vec<T> next = relaxed<T>(columns, v, t, w, omega);
      if constexpr (look) {
        left += vabs<T>(next * t - columns.goal_at(j, next));
        edge += out_of_range<T>(next);
      }
      store(columns.scale + j, next);
    });
    if constexpr (look) {
      plan.column_part[b] = sum_lanes<T>(left);
      plan.column_part2[b] = sum_lanes<T>(edge);
    }
  });
  team.barrier();
  Look<T> seen;
  if constexpr (look) {
    seen.error = sum_parts(plan.column_part, plan.column_blocks());
    seen.at_edge = sum_parts(plan.column_part2, plan.column_blocks()) > 0;
  }
  return seen;
}

// Iterates on the scalings until the plan's marginals are within tol (by the sums at hand), the scalings are at the
// edge of their range, the iterations are used up, or the error is below the gate and tol is not near. This is looked
// at every few iterations only: in a small problem it takes a good part of one. The last column update is always a
// plain one, so that the plan leaves with its mass whole.
template <class T>
Burst scale(const Team& team, Plan<T>& plan, T gate, T tol, int64_t max_iter, int64_t& n_iter,
            Relaxation<T>& relaxation) {
  constexpr int every = 4;
  Look<T> columns;
  T last = 0;
  for (int n = 1;; ++n) {
    ++n_iter;
    const T omega = relaxation.factor();
    if (n % every == 0 || n_iter >= max_iter) {
      const Look<T> rows = scale_rows<true>(team, plan, omega);
      const T error = (rows.error + columns.error) / (plan.soft() ? rows.mass : T(1));
      const bool at_edge = rows.at_edge || columns.at_edge, reached = !(error > tol);
      const bool near = error < gate && !relaxation.soon(error, last, tol);
      last = error;
      const bool stop = reached || n_iter >= max_iter || at_edge || near;
      scale_columns<false>(team, plan, stop ? T(1) : omega);
      if (stop) return at_edge ? Burst::at_edge : reached ? Burst::reached : Burst::stopped;
      if (n % Relaxation<T>::window == 0) relaxation.observe(error);
    } else {
      scale_rows<false>(team, plan, omega);
      if (n % every == every - 1 || n_iter + 1 >= max_iter)
        columns = scale_columns<true>(team, plan, omega);  // for the next look
      else
        scale_columns<false>(team, plan, omega);
    }
  }
}

}  // namespace sfr::cpu::SFR_ISA

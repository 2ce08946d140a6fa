// Exact optimal transport between two weighted sets of patches, one problem per cost matrix.
//
//     value = min <P, C>    over P >= 0, P 1 = a, P^T 1 = b
//           = max <a, f> + <b, g>    over f_i + g_j <= C_ij
//
//   cost      [B, G, N, M]   any strides, float16 | bfloat16 | float32 | float64
//   a         [B, G, N]      weights of the student's side, normalised here to sum to 1; 0 removes the patch
//   b         [B, G, M]      weights of the teacher's side
//   value     [B, G]         out
//   f, g      [B, G, N], [B, G, M]   out: an optimal pair of dual variables, shifted so that <a, f> = <b, g>; at a
//                            removed patch the largest value that keeps f_i + g_j <= C_ij for the kept j, which is
//                            the slope of the value there (0 where no such cost is finite)
//   rows, columns, mass   [B, G, N + M - 1]   out: an optimal plan, entry by entry: a vertex of the polytope has no
//                            more. Entries that are not used come last and are 0, 0, 0
//   n_iter    [B, G]         out: searches for a shortest path, or pivots
//   gap       [B, G]         out: sum P (C - f - g)+ and what rounding may hide of (f + g - C)+ times the mass: what is
//   to
//                            be gained at most, before f and g are rounded to the type of the outputs
//   magnitude [B, G]         out: sum P |C|, and what is paid for mass left behind: what gap is small against
//   error     [B, G]         out: |P 1 - a|_1 + |P^T 1 - b|_1, likewise
//
// Equal weights on equally many patches make an assignment problem: shortest augmenting paths (Jonker and Volgenant,
// 1987), unless the paths get long. Anything else is a transportation problem: the simplex method on spanning trees,
// with strongly feasible trees (Cunningham, 1976), so that it ends however degenerate the problem is. Potentials are
// float64, or two of these where a certificate says that they must. Masses are whole numbers, so that sums are exact,
// both sides have the same and every step empties something exactly.
//
// A pair whose cost is +inf is forbidden. Where every plan has such a pair, value and gap are inf, and plan, f and g 0.
// Where all weights of a side are 0, everything is 0. NaN and -inf between kept patches give NaN for their own problem
// alone; with `features` set +inf does too, and f, g are 0 at removed patches.
//
// With prices, what is left behind costs price_a or price_b a unit instead of being forbidden:
//
//     value = min <P, C> + price_a (|a| - |P|) + price_b (|b| - |P|)    over P 1 <= a, P^T 1 <= b
//
// one more row of price_b and one more column of price_a, 0 between them. A side with a finite price keeps its sum, the
// other is normalised. Then f <= price_a and g <= price_b.
//
// Optimal plans and dual variables need not be unique; which is found depends on the problem alone.
// Saved for backward: the plan, f, g. d value/dC = P, d value/da = f, d value/db = g, the latter two through the
// normalisation, and 0 at removed patches.
#pragma once

#include <limits>

#include "types.h"

namespace sfr {

// What mass left behind costs (infinity: nothing may be left); whether the costs are those of features, so that none is
// meant to be infinite; and the rounding of weights that were of a narrower type than `compute`: sums of them that must
// be equal may differ by 64 times it, or that of `compute`.
#define SFR_EXACT_OPTIONS(FIELD)                                  \
  FIELD(double, price_a, std::numeric_limits<double>::infinity()) \
  FIELD(double, price_b, std::numeric_limits<double>::infinity()) \
  FIELD(bool, features, false)                                    \
  FIELD(double, rounding, 0)
struct ExactOptions {
  SFR_FIELDS(ExactOptions, SFR_EXACT_OPTIONS)
};

// `compute` is the type of weights, outputs and gradients.
#define SFR_EXACT_PARAMS(FIELD)         \
  FIELD(int64_t, B, 0)                  \
  FIELD(int64_t, G, 0)                  \
  FIELD(int64_t, N, 0)                  \
  FIELD(int64_t, M, 0)                  \
  FIELD(DType, compute, DType::float32) \
  FIELD(WeightView, a, {})              \
  FIELD(WeightView, b, {})              \
  FIELD(ExactOptions, options, {})      \
  FIELD(int, threads, 1)
struct ExactParams {
  SFR_FIELDS(ExactParams, SFR_EXACT_PARAMS)
};

#define SFR_EXACT_SOLVED(FIELD)     \
  FIELD(void*, value, nullptr)      \
  FIELD(void*, f, nullptr)          \
  FIELD(void*, g, nullptr)          \
  FIELD(int32_t*, rows, nullptr)    \
  FIELD(int32_t*, columns, nullptr) \
  FIELD(void*, mass, nullptr)       \
  FIELD(int64_t*, n_iter, nullptr)  \
  FIELD(void*, gap, nullptr)        \
  FIELD(void*, magnitude, nullptr)  \
  FIELD(void*, error, nullptr)
struct ExactSolved {
  SFR_FIELDS(ExactSolved, SFR_EXACT_SOLVED)
};

// Of these, what backward reads again.
#define SFR_EXACT_SAVED(FIELD)            \
  FIELD(const void*, f, nullptr)          \
  FIELD(const void*, g, nullptr)          \
  FIELD(const int32_t*, rows, nullptr)    \
  FIELD(const int32_t*, columns, nullptr) \
  FIELD(const void*, mass, nullptr)
struct ExactSaved {
  SFR_FIELDS(ExactSaved, SFR_EXACT_SAVED)
};

#define SFR_EXACT_FORWARD(FIELD, BASE) \
  BASE(ExactParams, problem)           \
  BASE(ExactSolved, solved)            \
  FIELD(CostView, cost, {})
struct ExactForwardParams : ExactParams, ExactSolved {
  SFR_DERIVED_FIELDS(ExactForwardParams, SFR_EXACT_FORWARD)
};

// Out, contiguous: grad_cost [B, G, N, M], grad_a [B, G, N], grad_b [B, G, M]; absent: not wanted.
#define SFR_EXACT_BACKWARD(FIELD, BASE)   \
  BASE(ExactParams, problem)              \
  BASE(ExactSaved, saved)                 \
  FIELD(const void*, grad_value, nullptr) \
  FIELD(void*, grad_cost, nullptr)        \
  FIELD(void*, grad_a, nullptr)           \
  FIELD(void*, grad_b, nullptr)
struct ExactBackwardParams : ExactParams, ExactSaved {
  SFR_DERIVED_FIELDS(ExactBackwardParams, SFR_EXACT_BACKWARD)
};

}  // namespace sfr

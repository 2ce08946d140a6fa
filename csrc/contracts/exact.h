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
//   gap       [B, G]         out: <P, C> - <a, f> - <b, g> in float64, before rounding to the type of the outputs
//   error     [B, G]         out: |P 1 - a|_1 + |P^T 1 - b|_1, likewise
//
// Equal weights on equally many patches make an assignment problem: shortest augmenting paths (Jonker and Volgenant,
// 1987). Anything else is a transportation problem: the simplex method on spanning trees, with strongly feasible trees
// (Cunningham, 1976), so that it ends however degenerate the problem is. Potentials are float64. Masses are whole
// numbers, so that sums are exact, both sides have the same and every step empties something exactly.
//
// Optimal plans and dual variables need not be unique; which is found depends on the problem alone.
// Saved for backward: the plan, f, g. d value/dC = P, d value/da = f, d value/db = g, the latter two through the
// normalisation, and 0 at removed patches.
// A NaN, an Inf or a magnitude above 1e300 between kept patches gives NaN for its own problem alone.
#pragma once

#include "types.h"

namespace sfr {

// `compute` is the type of weights, outputs and gradients.
#define SFR_EXACT_PARAMS(FIELD)         \
  FIELD(int64_t, B, 0)                  \
  FIELD(int64_t, G, 0)                  \
  FIELD(int64_t, N, 0)                  \
  FIELD(int64_t, M, 0)                  \
  FIELD(DType, compute, DType::float32) \
  FIELD(WeightView, a, {})              \
  FIELD(WeightView, b, {})              \
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

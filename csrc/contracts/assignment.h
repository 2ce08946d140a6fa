// Matching rows with columns, one problem per cost matrix: as many pairs as possible, and among those the least sum.
//
//   cost      [B, G, N, M]   any strides, float16 | bfloat16 | float32 | float64
//   maximize                 the greatest sum instead
//   limit                    a pair that costs more (with maximize: less) is forbidden; as is one of +inf (-inf)
//   columns   [B, G, N]      out: the column of each row, -1 where it has none; all -1 where a cost is NaN, or infinite
//                            the other way
//
// Shortest augmenting paths (Jonker and Volgenant, 1987), or the simplex method, as in exact.h. Where not every row of
// the smaller side can be matched, the rows that searches could not leave compete for fewer columns than they are: all
// of these columns are matched, at the least cost, and what is left of rows and columns is a problem by itself.
#pragma once

#include "types.h"

namespace sfr {

#define SFR_ASSIGNMENT_FORWARD(FIELD)   \
  FIELD(int64_t, B, 0)                  \
  FIELD(int64_t, G, 0)                  \
  FIELD(int64_t, N, 0)                  \
  FIELD(int64_t, M, 0)                  \
  FIELD(DType, compute, DType::float32) \
  FIELD(CostView, cost, {})             \
  FIELD(bool, maximize, false)          \
  FIELD(double, limit, 0)               \
  FIELD(int64_t*, columns, nullptr)     \
  FIELD(int, threads, 1)
struct AssignmentForwardParams {
  SFR_FIELDS(AssignmentForwardParams, SFR_ASSIGNMENT_FORWARD)
};

}  // namespace sfr

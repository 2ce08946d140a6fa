// The few types every contract speaks in: element types, metrics, and views of tensors that somebody else owns.
#pragma once

#include "lists.h"

namespace sfr {

// Element types, by torch's names.
#define SFR_DTYPES(ONE) ONE(float16) ONE(bfloat16) ONE(float32) ONE(float64)
SFR_CHOICES(DType, SFR_DTYPES)

// Ground costs.
//   l2            C = |x - y|          gradient 0 where x = y
//   sqeuclidean   C = |x - y|^2
//   cosine        C = 1 - x.y / (|x| |y|), 1 where x or y is 0, with gradient 0 there
//   l1            C = sum of |x_c - y_c|    gradient sign(x_c - y_c), 0 where x_c = y_c
#define SFR_METRICS(ONE) ONE(l2) ONE(sqeuclidean) ONE(cosine) ONE(l1)
SFR_CHOICES(Metric, SFR_METRICS)

// Features [B, G, C, H, W] with any strides, in elements: maps in either memory format and tokens
// (C, 1, N) are all read in place.
#define SFR_FEATURE_VIEW(FIELD)       \
  FIELD(void*, data, nullptr)         \
  FIELD(DType, dtype, DType::float32) \
  FIELD(int64_t, H, 0)                \
  FIELD(int64_t, W, 0)                \
  FIELD(int64_t, stride_b, 0)         \
  FIELD(int64_t, stride_g, 0)         \
  FIELD(int64_t, stride_c, 0)         \
  FIELD(int64_t, stride_h, 0)         \
  FIELD(int64_t, stride_w, 0)
struct FeatureView {
  SFR_FIELDS(FeatureView, SFR_FEATURE_VIEW)
};

// Costs [B, G, N, M] with any strides, in elements.
#define SFR_COST_VIEW(FIELD)          \
  FIELD(const void*, data, nullptr)   \
  FIELD(DType, dtype, DType::float32) \
  FIELD(int64_t, stride_b, 0)         \
  FIELD(int64_t, stride_g, 0)         \
  FIELD(int64_t, stride_n, 0)         \
  FIELD(int64_t, stride_m, 0)
struct CostView {
  SFR_FIELDS(CostView, SFR_COST_VIEW)
};

// Weights [B, G, N] with any strides, in elements of the accumulator type. No data: uniform, 1 / N.
#define SFR_WEIGHT_VIEW(FIELD)      \
  FIELD(const void*, data, nullptr) \
  FIELD(int64_t, stride_b, 0)       \
  FIELD(int64_t, stride_g, 0)       \
  FIELD(int64_t, stride_n, 0)
struct WeightView {
  SFR_FIELDS(WeightView, SFR_WEIGHT_VIEW)
};

// What a call came to. The weights' contents can only be seen here; Python turns these into errors
// that name the argument.
enum class Status : int32_t {
  ok = 0,
  bad_a = 1,  // a side has a negative or non-finite weight
  bad_b = 2,
};

}  // namespace sfr

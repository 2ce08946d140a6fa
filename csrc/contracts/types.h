// The few types every contract speaks in: element types, metrics, and views of tensors that somebody else owns.
#pragma once

#include <cstdint>

namespace sfr {

// Element types, numbered as in sfr_ext/ops/views.py.
enum class DType : int32_t { float16 = 0, bfloat16 = 1, float32 = 2, float64 = 3 };

// Ground costs, numbered as in sfr_ext/ops/views.py.
//   l2            C = |x - y|          gradient 0 where x = y
//   sqeuclidean   C = |x - y|^2
//   cosine        C = 1 - x.y / (|x| |y|), 1 where x or y is 0, with gradient 0 there
enum class Metric : int32_t { l2 = 0, sqeuclidean = 1, cosine = 2 };

// Features [B, G, C, H, W] with any strides, in elements: maps in either memory format and tokens
// (C, 1, N) are all read in place.
struct FeatureView {
  void* data = nullptr;
  DType dtype = DType::float32;
  int64_t H = 0, W = 0;
  int64_t stride_b = 0, stride_g = 0, stride_c = 0, stride_h = 0, stride_w = 0;
};

// Weights [B, G, N] with any strides, in elements of the accumulator type. No data: uniform, 1 / N.
struct WeightView {
  const void* data = nullptr;
  int64_t stride_b = 0, stride_g = 0, stride_n = 0;
};

// What a call came to. The weights' contents can only be seen here; Python turns these into errors
// that name the argument.
enum class Status : int32_t {
  ok = 0,
  bad_a = 1,  // a side has a negative or non-finite weight, or none above 0
  bad_b = 2,
};

}  // namespace sfr

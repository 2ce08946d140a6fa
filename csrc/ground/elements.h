// Element types, and where a problem begins in a tensor: once for both devices.
//
// Included after SFR_GROUND_NAMESPACE, SFR_GROUND_INLINE and, in that namespace, `element`, where every element type
// has the name that it has in the list.
#pragma once

#include "../contracts/types.h"

namespace SFR_GROUND_NAMESPACE {

// Calls f with a value of the element type.
template <class F>
SFR_GROUND_INLINE void with_element(DType dtype, F&& f) {
  switch (dtype) {
#define SFR_CASE(name) \
  case DType::name:    \
    return f(element::name{});
    SFR_DTYPES(SFR_CASE)
#undef SFR_CASE
  }
}

// Offset of a problem's map.
SFR_GROUND_INLINE int64_t map_offset(const FeatureView& view, int64_t b, int64_t g) {
  return b * view.stride_b + g * view.stride_g;
}

// The first cost of a problem.
template <class E>
SFR_GROUND_INLINE const E* first_of(const CostView& view, int64_t b, int64_t g) {
  return static_cast<const E*>(view.data) + b * view.stride_b + g * view.stride_g;
}

}  // namespace SFR_GROUND_NAMESPACE

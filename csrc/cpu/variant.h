// Every operation of this folder, declared once per instruction set it may be compiled for.
#pragma once

#include "../contracts/cost.h"
#include "../contracts/emd.h"
#include "../contracts/exact.h"
#include "../contracts/sinkhorn.h"

#define SFR_DECLARE_VARIANT(isa)                           \
  namespace sfr::cpu::isa {                                \
  Status cost_forward(const CostForwardParams&);           \
  Status cost_backward(const CostBackwardParams&);         \
  Status sinkhorn_forward(const SinkhornForwardParams&);   \
  Status sinkhorn_backward(const SinkhornBackwardParams&); \
  Status emd_forward(const EmdForwardParams&);             \
  Status emd_backward(const EmdBackwardParams&);           \
  Status exact_forward(const ExactForwardParams&);         \
  Status exact_backward(const ExactBackwardParams&);       \
  }

SFR_DECLARE_VARIANT(baseline)
#if defined(SFR_HAVE_AVX2)
SFR_DECLARE_VARIANT(avx2)
#endif
#if defined(SFR_HAVE_AVX512)
SFR_DECLARE_VARIANT(avx512)
#endif

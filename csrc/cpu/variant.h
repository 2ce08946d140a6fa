// Every operation of this folder, declared once per instruction set it may be compiled for.
#pragma once

#include "../contracts/operations.h"

namespace sfr::cpu {

#define SFR_POINTER(name, Params) Status (*name)(const Params&);
struct Operations {
  SFR_OPERATIONS(SFR_POINTER)
  SFR_CPU_OPERATIONS(SFR_POINTER)
};

}  // namespace sfr::cpu

#define SFR_DECLARE(name, Params) Status name(const Params&);
#define SFR_NAME(name, Params) name,
#define SFR_DECLARE_VARIANT(isa)                                                             \
  namespace sfr::cpu::isa {                                                                  \
  SFR_OPERATIONS(SFR_DECLARE)                                                                \
  SFR_CPU_OPERATIONS(SFR_DECLARE)                                                            \
  constexpr Operations operations = {SFR_OPERATIONS(SFR_NAME) SFR_CPU_OPERATIONS(SFR_NAME)}; \
  }

SFR_DECLARE_VARIANT(baseline)
#if defined(SFR_HAVE_AVX2)
SFR_DECLARE_VARIANT(avx2)
#endif
#if defined(SFR_HAVE_AVX512)
SFR_DECLARE_VARIANT(avx512)
#endif

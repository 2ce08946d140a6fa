// The instruction set is chosen once, at the first call: the best that was compiled in and that this processor
// has, or the one that SFR_EXT_CPU_ISA names.
#include "dispatch.h"

#include <cstdlib>
#include <stdexcept>

#include "variant.h"

namespace sfr::cpu {
namespace {

struct Variant {
  const char* name;
  bool (*runs_here)();
  Status (*cost_forward)(const CostForwardParams&);
  Status (*cost_backward)(const CostBackwardParams&);
  Status (*sinkhorn_forward)(const SinkhornForwardParams&);
  Status (*sinkhorn_backward)(const SinkhornBackwardParams&);
  Status (*emd_forward)(const EmdForwardParams&);
  Status (*emd_backward)(const EmdBackwardParams&);
  Status (*exact_forward)(const ExactForwardParams&);
  Status (*exact_backward)(const ExactBackwardParams&);
};

#define SFR_VARIANT(isa, condition) \
  {#isa,                            \
   [] { return bool(condition); },  \
   isa::cost_forward,               \
   isa::cost_backward,              \
   isa::sinkhorn_forward,           \
   isa::sinkhorn_backward,          \
   isa::emd_forward,                \
   isa::emd_backward,               \
   isa::exact_forward,              \
   isa::exact_backward}

// Best first.
const Variant variants[] = {
#if defined(SFR_HAVE_AVX512)
    SFR_VARIANT(avx512, __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                            __builtin_cpu_supports("fma")),
#endif
#if defined(SFR_HAVE_AVX2)
    SFR_VARIANT(avx2,
                __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")),
#endif
    SFR_VARIANT(baseline, true),
};

const Variant& choose() {
  const char* wanted = std::getenv("SFR_EXT_CPU_ISA");
  std::string names;
  for (const Variant& variant : variants) {
    if (!variant.runs_here()) continue;
    if (!wanted || !*wanted || variant.name == std::string(wanted)) return variant;
    names += (names.empty() ? "" : ", ") + std::string(variant.name);
  }
  throw std::runtime_error("sfr_ext: SFR_EXT_CPU_ISA must be one of " + names + " on this machine, got '" + wanted +
                           "'");
}

const Variant& chosen() {
  static const Variant& variant = choose();
  return variant;
}

}  // namespace

std::string isa() {
  return chosen().name;
}

std::vector<std::string> usable_isas() {
  std::vector<std::string> names;
  for (const Variant& variant : variants)
    if (variant.runs_here()) names.push_back(variant.name);
  return names;
}

Status cost_forward(const CostForwardParams& p) {
  return chosen().cost_forward(p);
}
Status cost_backward(const CostBackwardParams& p) {
  return chosen().cost_backward(p);
}
Status sinkhorn_forward(const SinkhornForwardParams& p) {
  return chosen().sinkhorn_forward(p);
}
Status sinkhorn_backward(const SinkhornBackwardParams& p) {
  return chosen().sinkhorn_backward(p);
}
Status emd_forward(const EmdForwardParams& p) {
  return chosen().emd_forward(p);
}
Status emd_backward(const EmdBackwardParams& p) {
  return chosen().emd_backward(p);
}
Status exact_forward(const ExactForwardParams& p) {
  return chosen().exact_forward(p);
}
Status exact_backward(const ExactBackwardParams& p) {
  return chosen().exact_backward(p);
}

}  // namespace sfr::cpu

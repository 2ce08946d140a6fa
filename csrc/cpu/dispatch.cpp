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
  bool runs_here;
  const Operations& operations;
};

#if defined(__x86_64__)
#define SFR_IS_INTEL bool(__builtin_cpu_is("intel"))
#else
#define SFR_IS_INTEL false
#endif
#define SFR_HAS(feature) bool(__builtin_cpu_supports(feature))
#define SFR_VARIANT(isa, runs_here) {#isa, runs_here, isa::operations}

// Best first.
const Variant variants[] = {
#if defined(SFR_HAVE_AVX512)
    SFR_VARIANT(avx512, SFR_HAS("avx512f") && SFR_HAS("avx512bw") && SFR_HAS("avx512dq") && SFR_HAS("avx512vl") &&
                            SFR_HAS("fma")),
#endif
#if defined(SFR_HAVE_AVX2)
    SFR_VARIANT(avx2, SFR_HAS("avx2") && SFR_HAS("fma") && SFR_HAS("bmi2")),
#endif
    SFR_VARIANT(baseline, true),
};

const Variant& choose() {
  const char* wanted = std::getenv("SFR_EXT_CPU_ISA");
  std::string names;
  for (const Variant& variant : variants) {
    if (!variant.runs_here) continue;
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
    if (variant.runs_here) names.push_back(variant.name);
  return names;
}

bool products_are_faster() {
  static const bool are = [] {
    const char* wanted = std::getenv("SFR_EXT_CPU_DISTANCES");
    if (!wanted || !*wanted) return SFR_IS_INTEL;
    const std::string way = wanted;
    if (way == "products" || way == "differences") return way == "products";
    throw std::runtime_error("sfr_ext: SFR_EXT_CPU_DISTANCES must be products or differences, got '" + way + "'");
  }();
  return are;
}

#define SFR_DISPATCH(name, Params)      \
  Status name(const Params& p) {        \
    return chosen().operations.name(p); \
  }
SFR_OPERATIONS(SFR_DISPATCH)
SFR_CPU_OPERATIONS(SFR_DISPATCH)

}  // namespace sfr::cpu

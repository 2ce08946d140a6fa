// The operations on a CPU, and which instruction set they run with.
#pragma once

#include <string>
#include <vector>

#include "../contracts/operations.h"

namespace sfr::cpu {

#define SFR_DECLARE_OPERATION(name, Params) Status name(const Params&);
SFR_OPERATIONS(SFR_DECLARE_OPERATION)
SFR_CPU_OPERATIONS(SFR_DECLARE_OPERATION)
#undef SFR_DECLARE_OPERATION

// The chosen one; throws std::runtime_error if SFR_EXT_CPU_ISA names one that cannot be had.
std::string isa();

// Those compiled in that this processor has, best first.
std::vector<std::string> usable_isas();

// Whether this processor sums products in less time than differences, which are one operation more, because it has no
// units for additions beside those for multiply-adds: Intel's, as far as is known. SFR_EXT_CPU_DISTANCES, "products" or
// "differences", says it instead.
bool products_are_faster();

}  // namespace sfr::cpu

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

}  // namespace sfr::cpu

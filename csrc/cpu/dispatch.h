// Which instruction set the CPU code runs with.
#pragma once

#include <string>
#include <vector>

namespace sfr::cpu {

// The chosen one; throws std::runtime_error if SFR_EXT_CPU_ISA names one that cannot be had.
std::string isa();

// Those compiled in that this processor has, best first.
std::vector<std::string> usable_isas();

}  // namespace sfr::cpu

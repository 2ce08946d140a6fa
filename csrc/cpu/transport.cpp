// The solver and its backward, for the operations that have it in common.
#include "transport.h"

namespace sfr::cpu::SFR_ISA {

SFR_TRANSPORT(, float)
SFR_TRANSPORT(, double)

}  // namespace sfr::cpu::SFR_ISA

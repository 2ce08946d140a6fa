// Costs from features and their gradients, for the operations that have them in common.
#include "ground.h"

namespace sfr::cpu::SFR_ISA {

SFR_GROUND(, float)
SFR_GROUND(, double)

}  // namespace sfr::cpu::SFR_ISA

// Every operation of the module, by the name that Python calls it by, with what it takes.
#pragma once

#include "assignment.h"
#include "directions.h"
#include "emd.h"
#include "exact.h"
#include "exact_emd.h"

#define SFR_OPERATIONS(OPERATION)                      \
  OPERATION(cost_forward, CostForwardParams)           \
  OPERATION(cost_backward, CostBackwardParams)         \
  OPERATION(sinkhorn_forward, SinkhornForwardParams)   \
  OPERATION(sinkhorn_backward, SinkhornBackwardParams) \
  OPERATION(emd_forward, EmdForwardParams)             \
  OPERATION(emd_backward, EmdBackwardParams)           \
  OPERATION(exact_forward, ExactForwardParams)         \
  OPERATION(exact_backward, ExactBackwardParams)       \
  OPERATION(assignment_forward, AssignmentForwardParams)

// Those of a CPU alone; on a GPU others do the same, one after the other.
#define SFR_CPU_OPERATIONS(OPERATION)                      \
  OPERATION(directions_forward, DirectionsForwardParams)   \
  OPERATION(directions_backward, DirectionsBackwardParams) \
  OPERATION(exact_emd_forward, ExactEmdForwardParams)      \
  OPERATION(exact_emd_backward, ExactEmdBackwardParams)

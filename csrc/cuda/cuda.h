// The operations of csrc/contracts/*.h on a GPU: the same parameters, and where to run. `threads` is not looked at.
#pragma once

#include "../contracts/emd.h"
#include "../contracts/exact.h"

namespace sfr::cuda {

// Strategies, numbered as in sfr_ext/ops/launch.py. One of them can be forced, for tests and benchmarks.
//   several   one warp to a problem, several problems to a block    up to 32 x 32
//   block     one block to a problem, plan in shared memory         while it fits
//   team      blocks that wait for each other, each with a slab of the plan in its shared memory
//   stream    the same with everything in global memory             any size
enum class Strategy : int32_t { automatic = 0, several = 1, block = 2, team = 3, stream = 4 };

struct Where {
  int device = 0;
  void* stream = nullptr;
  Strategy strategy = Strategy::automatic;
  void* scratch = nullptr;  // global memory
  int64_t scratch_bytes = 0;
};

// Each launches and returns 0; or launches nothing and returns the bytes of scratch that it needs, where it was given
// fewer. Throws std::runtime_error when a launch fails. Unsound weights give NaN for their problem.
// T is p.compute. Each file of kernels is compiled twice, for T = SFR_REAL = float and double.
template <class T>
int64_t cost_forward(const CostForwardParams&, const Where&);
template <class T>
int64_t cost_backward(const CostBackwardParams&, const Where&);
template <class T>
int64_t sinkhorn_forward(const SinkhornForwardParams&, const Where&);
template <class T>
int64_t sinkhorn_backward(const SinkhornBackwardParams&, const Where&);
template <class T>
int64_t emd_forward(const EmdForwardParams&, const Where&);
template <class T>
int64_t emd_backward(const EmdBackwardParams&, const Where&);
template <class T>
int64_t exact_forward(const ExactForwardParams&, const Where&);
template <class T>
int64_t exact_backward(const ExactBackwardParams&, const Where&);

}  // namespace sfr::cuda

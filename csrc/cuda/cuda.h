// The operations of csrc/contracts/*.h on a GPU: the same parameters, and where to run. `threads` is not looked at.
#pragma once

#include "../contracts/operations.h"

namespace sfr::cuda {

// One of these can be forced, for tests and benchmarks.
//   warp          one warp to a problem, several problems to a block    up to 32 x 32
//   block         one block to a problem, plan in shared memory         while it fits
//   cooperative   blocks that wait for each other, each with a slab of the plan in its shared memory
//   stream        the same with everything in global memory             larger plans
#define SFR_STRATEGIES(ONE) ONE(automatic) ONE(warp) ONE(block) ONE(cooperative) ONE(stream)
SFR_CHOICES(Strategy, SFR_STRATEGIES)

// `queue` is the address of the CUDA stream, scratch is global memory.
#define SFR_WHERE(FIELD)                         \
  FIELD(int, device, 0)                          \
  FIELD(int64_t, queue, 0)                       \
  FIELD(Strategy, strategy, Strategy::automatic) \
  FIELD(void*, scratch, nullptr)                 \
  FIELD(int64_t, scratch_bytes, 0)
struct Where {
  SFR_FIELDS(Where, SFR_WHERE)

  void* stream() const { return reinterpret_cast<void*>(queue); }
};

// Each launches and returns 0; or launches nothing and returns the bytes of scratch that it needs, where it was given
// fewer. Throws std::runtime_error when a launch fails. Unsound weights give NaN for their problem.
// T is p.compute. Each file of kernels is compiled twice, for T = SFR_REAL = float and double.
#define SFR_DECLARE(name, Params) \
  template <class T>              \
  int64_t name(const Params&, const Where&);
SFR_OPERATIONS(SFR_DECLARE)
#undef SFR_DECLARE

}  // namespace sfr::cuda

// What a GPU's memory would have to do for each line: wavefronts of shared memory, sectors of global memory, lanes that
// have nothing to do, and how often warps meet. Counted in the flavour whose accesses are watched.
#pragma once

#include "scheduler.h"

namespace simt::counters {

// Instead of the watch for races.
extern bool on;

// One access of the running thread; `code`: its address in the module.
void access(const Thread& thread, uintptr_t address, size_t bytes, bool write, bool shared, uint32_t code);
// So many warps have come to a meeting point.
void meeting(const Meeting& meeting, int warps);
// What is still open of a launch that has ended.
void launch_ends();

}  // namespace simt::counters

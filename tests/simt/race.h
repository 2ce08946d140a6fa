// Races between threads: what the scheduler tells the watch of memory accesses about who is ordered after whom. Without
// SFR_SIMT_RACE nothing is watched.
#pragma once

#include "scheduler.h"

namespace simt::race {

#ifdef SFR_SIMT_RACE
void launch_begins(const Launch& launch);
void block_begins(Block& block);
// All lanes of the warp have met, and what each wrote the others now see.
void warp_meets(Warp& warp);
// All these warps of the block have met.
void warps_meet(Block& block, uint32_t warps);
// One thread makes what it knows known to those that wait for the counter, or learns it from them.
void releases(Thread& thread, const unsigned* counter);
void acquires(Thread& thread, const unsigned* counter);
// The running thread waits for what it has copied to shared memory.
void copied(const Thread& thread, const void* address, int bytes, const void* caller);
#else
inline void launch_begins(const Launch&) {}
inline void block_begins(Block&) {}
inline void warp_meets(Warp&) {}
inline void warps_meet(Block&, uint32_t) {}
inline void releases(Thread&, const unsigned*) {}
inline void acquires(Thread&, const unsigned*) {}
inline void copied(const Thread&, const void*, int, const void*) {}
#endif

}  // namespace simt::race

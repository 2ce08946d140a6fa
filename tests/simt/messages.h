// Words for errors: positions, meeting points, and what the threads of a block that cannot go on wait for.
#pragma once

#include <string>

#include "scheduler.h"

namespace simt {

std::string text(const Meeting& meeting);                  // "sync_threads(1, 64) (solve.cu:17)"
std::string text(const uint3& index, const dim3& extent);  // "5", or "(5, 0)" where there are two dimensions
std::string text(const Thread& thread);                    // "thread 5"
std::string ranges(uint32_t mask);                         // "0-3, 7"

// For every warp; warps in the same situation are named together.
std::string situation(const Block& block);

}  // namespace simt

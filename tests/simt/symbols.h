// Names for addresses of code, for messages.
#pragma once

#include <string>

namespace simt {

// The function that starts at this address, or "a kernel" where no name can be found.
std::string function_name(const void* code);

// The line that this return address comes back to, and those into which it was inlined: "team.cuh:51 in solve.cu:17".
// "?" without addr2line.
std::string line_of(const void* code);

}  // namespace simt

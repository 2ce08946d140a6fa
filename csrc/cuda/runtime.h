// Whether this process can use a GPU. Nothing here throws, and nothing needs a driver to be installed.
#pragma once

#include <string>

namespace sfr::cuda {

// Empty when there is a GPU that can be used, else the reason and what to do about it.
std::string why_unusable();

// Empty when this GPU can run the kernels that were compiled, else the reason. Unlike the others it makes a context on
// the GPU, if torch has not made it yet.
std::string why_unusable_on(int device);

// 1000 * major + 10 * minor: what was compiled with, and what the driver supports (0 without a driver).
int runtime_version();
int driver_version();

// 0 where why_unusable() gives a reason.
int device_count();

}  // namespace sfr::cuda

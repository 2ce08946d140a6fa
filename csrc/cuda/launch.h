// The host's side of a launch: the device that a tensor is on, the stream, shared memory above 48 KB, and an error that
// says what failed. Nothing here waits for the device.
#pragma once

#include "device.cuh"

#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace sfr::cuda {

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // so that the next call does not see it again
  throw std::runtime_error(std::string("sfr_ext: ") + what + ": " + cudaGetErrorString(error));
}

// A function of the driver, as it is since this release; null without a driver, or where the driver is older.
inline void* driver_function(const char* name, unsigned since) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult status;
#if CUDART_VERSION >= 12050
  const cudaError_t error = cudaGetDriverEntryPointByVersion(name, &found, since, cudaEnableDefault, &status);
#else
  const cudaError_t error = cudaGetDriverEntryPoint(name, &found, cudaEnableDefault, &status);
#endif
  if (error == cudaSuccess) return status == cudaDriverEntryPointSuccess ? found : nullptr;
  cudaGetLastError();
  return nullptr;
}

// Whether this process has a context on the GPU. Making the GPU current would give it one, and take hundreds of
// megabytes of its memory.
inline bool has_context(int device) {
  using Query = int(int device, unsigned* flags, int* active);
  static const auto query = reinterpret_cast<Query*>(driver_function("cuDevicePrimaryCtxGetState", 7000));
  unsigned flags = 0;
  int active = 0;
  return query && query(device, &flags, &active) == 0 && active != 0;
}

// Makes `device` current while it lives. A thread that never touched CUDA has GPU 0 for its own, without a context
// there: where going back would make one, the thread stays on `device`, as it does in PyTorch.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    check(cudaGetDevice(&before_), "asking for the current device failed");
    if (before_ != device) check(cudaSetDevice(device), "making the tensor's device current failed");
    changed_ = before_ != device;
  }
  ~OnDevice() {
    if (changed_ && has_context(before_)) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

// Of the device. A context may have fewer multiprocessors (a green context, a partition by MPS): blocks that wait for
// each other are launched as such, so that where they do not fit, the launch fails and does not hang.
struct DeviceLimits {
  int processors = 0;     // multiprocessors
  size_t shared = 0;      // bytes of shared memory that a block can have
  bool together = false;  // blocks of one launch can be made to run at the same time
  bool matrix = false;    // kernels have matrix instructions (device.cuh), those that run on it
};

inline int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device), "asking for a property of the device failed");
  return value;
}

// Asked once for each device.
inline DeviceLimits limits(int device) {
  static std::mutex mutex;
  static std::vector<DeviceLimits> known;
  const std::lock_guard<std::mutex> lock(mutex);
  if (size_t(device) >= known.size()) known.resize(size_t(device) + 1);
  DeviceLimits& of = known[size_t(device)];
  if (of.processors == 0) {
    of.shared = size_t(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    of.together = attribute(cudaDevAttrCooperativeLaunch, device) != 0;
    of.processors = attribute(cudaDevAttrMultiProcessorCount, device);
  }
  return of;
}

template <class Params>
using Kernel = void (*)(Params);

// Those of a device, and of the code of `kernel` that runs there: kernels of float and of double have code of their
// own.
template <class Params>
DeviceLimits limits_of(Kernel<Params> kernel, int device) {
  static std::mutex mutex;
  static std::vector<std::pair<std::pair<Kernel<Params>, int>, bool>> known;
  DeviceLimits of = limits(device);
  const std::lock_guard<std::mutex> lock(mutex);
  for (const auto& [which, matrix] : known)
    if (which == std::make_pair(kernel, device)) {
      of.matrix = matrix;
      return of;
    }
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel)),
        "asking for a property of a kernel failed");
  of.matrix = has_matrix_units(attributes.ptxVersion);
  known.emplace_back(std::make_pair(kernel, device), of.matrix);
  return of;
}

struct Launch {
  int blocks = 1, threads = 32;
  size_t shared = 0;
  bool together = false;  // the blocks wait for each other
  void* stream = nullptr;
};

// Lets the kernel have as much shared memory as the device gives; once for each kernel and device.
template <class Params>
void allow_shared(Kernel<Params> kernel, int device) {
  static std::mutex mutex;
  static std::vector<std::pair<Kernel<Params>, int>> allowed;
  const std::lock_guard<std::mutex> lock(mutex);
  for (const auto& [known, where] : allowed)
    if (known == kernel && where == device) return;
  check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                             int(limits(device).shared)),
        "asking for shared memory failed");
  allowed.emplace_back(kernel, device);
}

// Blocks of this kernel that the whole device runs at the same time.
template <class Params>
int resident_blocks(Kernel<Params> kernel, int device, int threads, size_t shared) {
  allow_shared(kernel, device);
  int each = 0;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, threads, shared),
        "asking how many blocks fit failed");
  return each * limits(device).processors;
}

template <class Params>
void launch(Kernel<Params> kernel, const Launch& how, const Params& params) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(how.blocks));
  config.blockDim = dim3(unsigned(how.threads));
  config.dynamicSmemBytes = how.shared;
  config.stream = static_cast<cudaStream_t>(how.stream);
  cudaLaunchAttribute together = {};
  together.id = cudaLaunchAttributeCooperative;
  together.val.cooperative = 1;
  config.attrs = &together;
  config.numAttrs = how.together ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, params), "launching a kernel failed");
}

}  // namespace sfr::cuda

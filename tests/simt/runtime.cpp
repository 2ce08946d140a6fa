// The runtime API of the emulated device, and the few functions by which tests set it up.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>

#include "scheduler.h"
#include "symbols.h"

#define SIMT_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

constexpr size_t kib = 1024;
constexpr size_t shared_by_default = 48 * kib;
constexpr size_t shared_reserved = 1 * kib;  // of each block, by the system
constexpr int most_blocks_per_processor = 16, most_threads_per_processor = 2048;
constexpr int device_count = 64;

int from_environment(const char* name, int otherwise) {
  const char* text = std::getenv(name);
  return text && *text ? std::atoi(text) : otherwise;
}

struct Device {
  int processors = from_environment("SFR_SIMT_PROCESSORS", 4);
  size_t shared = size_t(from_environment("SFR_SIMT_SHARED_KIB", 99)) * kib;  // for a block that asks
  int arch = from_environment("SFR_SIMT_ARCH", 90);  // that the kernels' code is for: which of it they take
  bool context = false;
};

std::recursive_mutex mutex;  // one launch at a time, and everything else in between
Device devices[device_count];
thread_local int current;
thread_local cudaError_t last = cudaSuccess;
thread_local std::string details;                       // of the last failed launch
std::map<std::pair<int, const void*>, size_t> allowed;  // shared memory for a block, by device and kernel

std::map<std::string, long> calls;  // of the runtime's functions, since simt_count_calls
std::string calls_text;

void called(const char* name) {
  const std::lock_guard<std::recursive_mutex> lock(mutex);
  ++calls[name];
}

cudaError_t result(cudaError_t error) {
  if (error != cudaSuccess) last = error;
  return error;
}

cudaError_t refused(cudaError_t error, const void* kernel, const std::string& why) {
  details = simt::function_name(kernel) + ": " + why;
  return result(error);
}

// The driver's cuDevicePrimaryCtxGetState.
int context_state(int device, unsigned* flags, int* active) {
  called("cuDevicePrimaryCtxGetState");
  const std::lock_guard<std::recursive_mutex> lock(mutex);
  *flags = 0, *active = devices[device].context;
  return 0;
}

size_t shared_allowed(const void* kernel) {
  const auto found = allowed.find({current, kernel});
  return found == allowed.end() ? std::min(shared_by_default, devices[current].shared) : found->second;
}

int blocks_per_processor(int threads, size_t shared) {
  const int warps = (threads + simt::lanes_per_warp - 1) / simt::lanes_per_warp;
  const size_t total = devices[current].shared + shared_reserved;
  return int(
      std::min({size_t(most_blocks_per_processor), size_t(most_threads_per_processor / (warps * simt::lanes_per_warp)),
                total / (shared + shared_reserved)}));
}

}  // namespace

namespace simt {

cudaError_t occupancy(int* blocks, const void* kernel, int threads, size_t shared) {
  called("cudaOccupancyMaxActiveBlocksPerMultiprocessor");
  const std::lock_guard<std::recursive_mutex> lock(mutex);
  devices[current].context = true;
  if (threads < 1) return result(cudaErrorInvalidValue);
  *blocks = threads > most_threads || shared > shared_allowed(kernel) ? 0 : blocks_per_processor(threads, shared);
  return cudaSuccess;
}

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, void (*body)(const void*),
                   const void* arguments) {
  called("cudaLaunchKernelEx");
  const std::lock_guard<std::recursive_mutex> lock(mutex);
  devices[current].context = true;
  Launch how;
  how.grid = config.gridDim, how.block = config.blockDim, how.shared = config.dynamicSmemBytes;
  how.kernel = kernel, how.body = body, how.arguments = arguments;
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config.attrs[i];
    if (attribute.id == cudaLaunchAttributeCooperative) how.together = attribute.val.cooperative != 0;
    if (attribute.id == cudaLaunchAttributeClusterDimension)
      return refused(cudaErrorNotSupported, kernel, "the emulator has no clusters");
  }
  const uint64_t threads = uint64_t(how.block.x) * how.block.y * how.block.z;
  if (threads < 1 || threads > most_threads || how.block.z > 64)
    return refused(cudaErrorInvalidConfiguration, kernel,
                   "a block has 1 to 1024 threads, got " + std::to_string(threads));
  const uint64_t blocks = uint64_t(how.grid.x) * how.grid.y * how.grid.z;
  if (blocks < 1 || how.grid.x > 0x7fffffffu || how.grid.y > 65535 || how.grid.z > 65535)
    return refused(cudaErrorInvalidConfiguration, kernel,
                   "no such grid: " + std::to_string(how.grid.x) + " x " + std::to_string(how.grid.y) + " x " +
                       std::to_string(how.grid.z));
  if (how.shared > shared_allowed(kernel))
    return refused(cudaErrorInvalidValue, kernel,
                   std::to_string(how.shared) + " bytes of shared memory asked for, " +
                       std::to_string(shared_allowed(kernel)) + " allowed; cudaFuncSetAttribute can allow more");
  const uint64_t resident = uint64_t(blocks_per_processor(int(threads), how.shared)) * devices[current].processors;
  if (how.together && blocks > resident)
    return refused(
        cudaErrorCooperativeLaunchTooLarge, kernel,
        std::to_string(blocks) + " blocks cannot run at the same time, " + std::to_string(resident) + " can");
  details = run(how);
  return result(details.empty() ? cudaSuccess : cudaErrorLaunchFailure);
}

}  // namespace simt

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "cudaSuccess";
    case cudaErrorInvalidValue:
      return "cudaErrorInvalidValue";
    case cudaErrorInvalidConfiguration:
      return "cudaErrorInvalidConfiguration";
    case cudaErrorInvalidDeviceFunction:
      return "cudaErrorInvalidDeviceFunction";
    case cudaErrorNoDevice:
      return "cudaErrorNoDevice";
    case cudaErrorInvalidDevice:
      return "cudaErrorInvalidDevice";
    case cudaErrorNoKernelImageForDevice:
      return "cudaErrorNoKernelImageForDevice";
    case cudaErrorUnsupportedPtxVersion:
      return "cudaErrorUnsupportedPtxVersion";
    case cudaErrorLaunchOutOfResources:
      return "cudaErrorLaunchOutOfResources";
    case cudaErrorLaunchFailure:
      return "cudaErrorLaunchFailure";
    case cudaErrorCooperativeLaunchTooLarge:
      return "cudaErrorCooperativeLaunchTooLarge";
    case cudaErrorNotSupported:
      return "cudaErrorNotSupported";
  }
  return "unrecognized error code";
}

const char* cudaGetErrorString(cudaError_t error) {
  thread_local std::string text;
  text = cudaGetErrorName(error);
  if (error != cudaSuccess && !details.empty()) text += ": " + details;
  return text.c_str();
}

cudaError_t cudaGetLastError() {
  return std::exchange(last, cudaSuccess);
}

cudaError_t cudaPeekAtLastError() {
  return last;
}

cudaError_t cudaGetDeviceCount(int* count) {
  called("cudaGetDeviceCount");
  *count = device_count;
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  called("cudaGetDevice");
  *device = current;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  called("cudaSetDevice");
  const std::lock_guard<std::recursive_mutex> lock(mutex);
  if (device < 0 || device >= device_count) return result(cudaErrorInvalidDevice);
  current = device;
  devices[device].context = true;
  return cudaSuccess;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* status) {
  const bool known = std::strcmp(name, "cuDevicePrimaryCtxGetState") == 0;
  *function = known ? reinterpret_cast<void*>(context_state) : nullptr;
  *status = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int device) {
  called("cudaDeviceGetAttribute");
  const std::lock_guard<std::recursive_mutex> lock(mutex);
  if (device < 0 || device >= device_count) return result(cudaErrorInvalidDevice);
  const Device& of = devices[device];
  switch (which) {
    case cudaDevAttrMaxThreadsPerBlock:
      *value = simt::most_threads;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *value = int(std::min(shared_by_default, of.shared));
      break;
    case cudaDevAttrWarpSize:
      *value = simt::lanes_per_warp;
      break;
    case cudaDevAttrMultiProcessorCount:
      *value = of.processors;
      break;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      *value = most_threads_per_processor;
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = 8;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = 6;
      break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = int(of.shared + shared_reserved);
      break;
    case cudaDevAttrCooperativeLaunch:
      *value = 1;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = int(of.shared);
      break;
    case cudaDevAttrMaxBlocksPerMultiprocessor:
      *value = most_blocks_per_processor;
      break;
    case cudaDevAttrReservedSharedMemoryPerBlock:
      *value = int(shared_reserved);
      break;
    default:
      return result(cudaErrorInvalidValue);
  }
  return cudaSuccess;
}

cudaError_t cudaDeviceSynchronize() {
  called("cudaDeviceSynchronize");
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t) {
  called("cudaStreamSynchronize");
  return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute which, int value) {
  called("cudaFuncSetAttribute");
  const std::lock_guard<std::recursive_mutex> lock(mutex);
  devices[current].context = true;
  if (which != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value < 0 || size_t(value) > devices[current].shared) return result(cudaErrorInvalidValue);
  allowed[{current, kernel}] = size_t(value);
  return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel) {
  called("cudaFuncGetAttributes");
  const std::lock_guard<std::recursive_mutex> lock(mutex);
  devices[current].context = true;
  *attributes = {0, simt::most_threads, 32, int(shared_allowed(kernel)), devices[current].arch};
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  called("cudaMemsetAsync");
  const std::lock_guard<std::recursive_mutex> lock(mutex);
  devices[current].context = true;
  std::memset(to, value, bytes);
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  called("cudaMemcpyAsync");
  const std::lock_guard<std::recursive_mutex> lock(mutex);
  devices[current].context = true;
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}

// Below 0: the natural order of blocks, warps and lanes.
SIMT_EXPORT void simt_set_seed(long long seed) {
  const std::lock_guard<std::recursive_mutex> lock(mutex);
  simt::set_seed(seed);
}

// Before the first use of the device, whose limits may be remembered. It then has no context.
SIMT_EXPORT void simt_set_device(int device, int processors, int shared_kib, int arch) {
  const std::lock_guard<std::recursive_mutex> lock(mutex);
  devices[device] = {processors, size_t(shared_kib) * kib, arch};
}

// Whether something made a context there, as on a GPU.
SIMT_EXPORT int simt_has_context(int device) {
  const std::lock_guard<std::recursive_mutex> lock(mutex);
  return devices[device].context;
}

// Forgets the calls so far.
SIMT_EXPORT void simt_count_calls() {
  const std::lock_guard<std::recursive_mutex> lock(mutex);
  calls.clear();
}

// "function number" for each function of the runtime that was called, one a line.
SIMT_EXPORT const char* simt_calls() {
  const std::lock_guard<std::recursive_mutex> lock(mutex);
  calls_text.clear();
  for (const auto& [name, number] : calls) calls_text += name + " " + std::to_string(number) + "\n";
  return calls_text.c_str();
}

// How far off exp2 and quotients of float are; 0, 0: exact.
SIMT_EXPORT void simt_approximate(int ulps, int flush, unsigned seed) {
  const std::lock_guard<std::recursive_mutex> lock(mutex);
  simt::approximate(ulps, flush != 0, seed);
}

// The device of the calling thread.
SIMT_EXPORT int simt_current_device() {
  return current;
}

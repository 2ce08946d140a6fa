#include "cuda/runtime.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdlib>
#include <thread>

namespace sfr::cuda {
namespace {

constexpr int oldest_toolkit = 12040;

__global__ void empty_kernel() {}

// 12040 -> "12.4"
std::string release(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

std::string words(cudaError_t error) {
  return std::string(cudaGetErrorString(error)) + " (error " + std::to_string(int(error)) + ")";
}

// A call that failed must not be seen by the next one that asks for the last error.
cudaError_t forget(cudaError_t error) {
  if (error != cudaSuccess) cudaGetLastError();
  return error;
}

std::string driver_too_old(int driver, int needed) {
  const int major = needed / 1000;
  std::string text = "the NVIDIA driver supports CUDA " + release(driver) + " and this build needs " +
                     std::to_string(major) + ".0: install a driver ";
  text += major == 13 ? "of version 580 or later" : major == 12 ? "of version 525 or later" : "for it";
  // A build runs on every driver of its toolkit's major version.
  if (driver / 1000 >= oldest_toolkit / 1000) {
    const std::string toolkit = release(std::max(driver, oldest_toolkit));
    text += ", or build with an older toolkit, in the folder of the sources: CUDACXX=/usr/local/cuda-" + toolkit +
            "/bin/nvcc pip install --force-reinstall --no-deps .";
  }
  return text;
}

}  // namespace

int runtime_version() {
  return CUDART_VERSION;
}

int driver_version() {
  int version = 0;
  return forget(cudaDriverGetVersion(&version)) == cudaSuccess ? version : 0;
}

int device_count() {
  int count = 0;
  return forget(cudaGetDeviceCount(&count)) == cudaSuccess ? count : 0;
}

std::string why_unusable() {
  const int driver = driver_version();
  if (driver == 0)
    return "no NVIDIA driver was found (libcuda.so.1; a container needs to be started with access to GPUs)";
  if (driver / 1000 < CUDART_VERSION / 1000) return driver_too_old(driver, CUDART_VERSION);
  int count = 0;
  const cudaError_t error = forget(cudaGetDeviceCount(&count));
  if (error == cudaErrorNoDevice || (error == cudaSuccess && count == 0)) {
    const char* visible = std::getenv("CUDA_VISIBLE_DEVICES");
    return std::string("the NVIDIA driver sees no GPU") +
           (visible ? " (CUDA_VISIBLE_DEVICES is '" + std::string(visible) + "')" : "");
  }
  return error == cudaSuccess ? "" : "the NVIDIA driver cannot be used: " + words(error);
}

std::string why_unusable_on(int device) {
  const std::string reason = why_unusable();
  if (!reason.empty()) return reason;
  int major = 0, minor = 0;
  cudaError_t error = cudaSuccess;
  // A thread of its own has a current device of its own: nothing has to be put back.
  std::thread([&] {
    cudaFuncAttributes attributes;
    error = cudaSetDevice(device);
    if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, empty_kernel);
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  }).join();
  if (error == cudaSuccess) return "";
  const std::string name = "GPU " + std::to_string(device);
  if (error != cudaErrorNoKernelImageForDevice && error != cudaErrorUnsupportedPtxVersion)
    return name + " cannot be used: " + words(error);
  const std::string own = std::to_string(10 * major + minor);
  return name + " has compute capability " + std::to_string(major) + "." + std::to_string(minor) +
         ", for which this build has no code (" + words(error) +
         "): build with a toolkit that knows it, in the folder of the sources: SFR_EXT_CUDA_ARCHS=" + own +
         " pip install --force-reinstall --no-deps .";
}

}  // namespace sfr::cuda

#include "shared_memory.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>

namespace simt {
namespace {

constexpr size_t alignment = 16;
constexpr unsigned char unwritten = 0xff, watched = 0xa5;

}  // namespace

SharedMemory::~SharedMemory() {
  std::free(memory_);
}

void SharedMemory::renew(size_t bytes) {
  // For AddressSanitizer every block has an allocation of its own.
  if (shared_margin == 0 || !memory_ || bytes > capacity_) {
    std::free(memory_);
    memory_ = nullptr, capacity_ = 0;
    void* memory = nullptr;
    if (posix_memalign(&memory, alignment, std::max(bytes + 2 * shared_margin, size_t(1))) != 0) throw std::bad_alloc();
    memory_ = static_cast<unsigned char*>(memory), capacity_ = bytes;
  }
  bytes_ = bytes;
  std::memset(memory_, watched, shared_margin);
  std::memset(data(), unwritten, bytes);
  std::memset(data() + bytes, watched, shared_margin);
}

bool SharedMemory::intact() const {
  const auto untouched = [](const unsigned char* from) {
    return std::all_of(from, from + shared_margin, [](unsigned char byte) { return byte == watched; });
  };
  return untouched(memory_) && untouched(data() + bytes_);
}

}  // namespace simt

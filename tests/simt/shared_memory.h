// The dynamic shared memory of one block: exactly as long as asked for, every byte 0xFF at the start (a float or double
// that nobody wrote is NaN), and what lies around it is watched.
#pragma once

#include <cstddef>

namespace simt {

// Bytes before and behind it that are watched. None where AddressSanitizer does it.
#ifdef __SANITIZE_ADDRESS__
constexpr size_t shared_margin = 0;
#else
constexpr size_t shared_margin = 256;
#endif

class SharedMemory {
 public:
  SharedMemory() = default;
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;
  ~SharedMemory();

  // Memory that nobody has written yet.
  void renew(size_t bytes);
  // Whether nothing was written around it.
  bool intact() const;

  unsigned char* data() const { return memory_ + shared_margin; }
  size_t bytes() const { return bytes_; }

 private:
  unsigned char* memory_ = nullptr;
  size_t bytes_ = 0, capacity_ = 0;
};

}  // namespace simt

// Lanes run one after the other here, and together on a GPU: the k-th time that a lane comes to an access, between two
// meetings of its warp, belongs to the k-th time of the other lanes. So lanes that take another way, or more rounds of
// a loop, are idle lanes of an access that the others make.
#include "counters.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <string>
#include <unordered_map>
#include <vector>

#define SIMT_EXPORT extern "C" __attribute__((visibility("default")))

namespace simt::counters {

bool on;

namespace {

constexpr int banks = 32, bank_bytes = 4, sector_bytes = 32;

// As tools/gpu_model/counters.py reads it.
struct Count {
  uint64_t code = 0;  // address in the module
  uint64_t shared = 0, write = 0, bytes = 0;
  uint64_t accesses = 0;  // of warps
  uint64_t lanes = 0;
  uint64_t cost = 0;   // wavefronts, or sectors
  uint64_t least = 0;  // as many bytes in the best of orders
};

struct Access {
  uint32_t lanes = 0;
  uint64_t addresses[lanes_per_warp];
  uint8_t bytes = 0;
  bool write = false, shared = false;
};

struct Open {
  unsigned round = 0;
  std::map<std::pair<uint32_t, uint32_t>, Access> accesses;  // by code and time
  std::unordered_map<uint64_t, uint32_t> times;              // by code and lane
};

std::unordered_map<const Warp*, Open> open_of;
std::map<std::pair<uint32_t, uint32_t>, Count> counts;  // by code, and whether it is a write to shared memory
std::map<std::pair<std::string, int>, uint64_t> meetings;
std::string meetings_text;

// Wavefronts of shared memory: lanes go in groups of 128 bytes; within one, a bank gives one word at a time.
int wavefronts(const Access& access) {
  const int group = access.bytes <= 4 ? 32 : access.bytes == 8 ? 16 : 8;
  int total = 0;
  for (int first = 0; first < lanes_per_warp; first += group) {
    std::vector<uint64_t> words;
    for (int lane = first; lane < first + group; ++lane)
      if (access.lanes >> lane & 1)
        for (uint64_t at = access.addresses[lane] / bank_bytes;
             at <= (access.addresses[lane] + access.bytes - 1) / bank_bytes; ++at)
          words.push_back(at);
    std::sort(words.begin(), words.end());
    words.erase(std::unique(words.begin(), words.end()), words.end());
    int per_bank[banks] = {};
    for (const uint64_t word : words) ++per_bank[word % banks];
    total += *std::max_element(per_bank, per_bank + banks);
  }
  return total;
}

int sectors(const Access& access) {
  std::vector<uint64_t> found;
  for (int lane = 0; lane < lanes_per_warp; ++lane)
    if (access.lanes >> lane & 1)
      for (uint64_t at = access.addresses[lane] / sector_bytes;
           at <= (access.addresses[lane] + access.bytes - 1) / sector_bytes; ++at)
        found.push_back(at);
  std::sort(found.begin(), found.end());
  return int(std::unique(found.begin(), found.end()) - found.begin());
}

// The fewest for as many different bytes.
int least(const Access& access) {
  std::vector<uint64_t> different;
  for (int lane = 0; lane < lanes_per_warp; ++lane)
    if (access.lanes >> lane & 1) different.push_back(access.addresses[lane]);
  std::sort(different.begin(), different.end());
  const uint64_t bytes = uint64_t(std::unique(different.begin(), different.end()) - different.begin()) * access.bytes;
  const uint64_t each = access.shared ? banks * bank_bytes : sector_bytes;
  return int((bytes + each - 1) / each);
}

void flush(Open& open) {
  for (const auto& [key, access] : open.accesses) {
    Count& count = counts[{key.first, uint32_t(access.shared)}];
    count.code = key.first, count.shared = access.shared, count.write = access.write;
    count.bytes = std::max<uint64_t>(count.bytes, access.bytes);
    ++count.accesses;
    count.lanes += uint64_t(__builtin_popcount(access.lanes));
    count.cost += uint64_t(access.shared ? wavefronts(access) : sectors(access));
    count.least += uint64_t(least(access));
  }
  open.accesses.clear(), open.times.clear();
}

}  // namespace

void access(const Thread& thread, uintptr_t address, size_t bytes, bool write, bool shared, uint32_t code) {
  Open& open = open_of[thread.warp];
  if (open.round != thread.warp->round) {
    flush(open);
    open.round = thread.warp->round;
  }
  const uint32_t time = open.times[uint64_t(code) << 5 | uint64_t(thread.lane)]++;
  Access& of = open.accesses[{code, time}];
  of.lanes |= 1u << thread.lane;
  of.addresses[thread.lane] = address;
  of.bytes = uint8_t(std::max<size_t>(of.bytes, std::min<size_t>(bytes, 16))), of.write = write, of.shared = shared;
}

void meeting(const Meeting& meeting, int warps) {
  if (on) meetings[{meeting.site.file ? meeting.site.file : "?", meeting.site.line}] += uint64_t(warps);
}

void launch_ends() {
  for (auto& [warp, open] : open_of) flush(open);
  open_of.clear();
}

}  // namespace simt::counters

// From now on, or no more; what was counted is forgotten.
SIMT_EXPORT void simt_count(int on) {
  using namespace simt::counters;
  simt::counters::on = on != 0;
  counts.clear(), meetings.clear(), open_of.clear();
}

// Copies up to `most` counts, 8 numbers each, and returns how many there are.
SIMT_EXPORT int simt_counts(uint64_t* out, int most) {
  using namespace simt::counters;
  int k = 0;
  for (const auto& [key, count] : counts) {
    if (k < most) std::memcpy(out + 8 * k, &count, sizeof(count));
    ++k;
  }
  return k;
}

// "file:line number" of each meeting point, one a line.
SIMT_EXPORT const char* simt_meetings() {
  using namespace simt::counters;
  meetings_text.clear();
  for (const auto& [site, number] : meetings)
    meetings_text += site.first + ":" + std::to_string(site.second) + " " + std::to_string(number) + "\n";
  return meetings_text.c_str();
}

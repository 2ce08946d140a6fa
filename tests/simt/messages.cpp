#include "messages.h"

#include <algorithm>
#include <utility>

#include "symbols.h"

namespace simt {

std::string text(const Meeting& meeting) {
  const std::string where = " (" + line_of(meeting.caller) + ")";
  switch (meeting.kind) {
    case Meeting::shuffle:
      return "shuffle" + where;
    case Meeting::shuffle_xor:
      return "shuffle_xor" + where;
    case Meeting::matrix:
      return "multiply_tf32" + where;
    case Meeting::warp:
      return "sync_warp" + where;
    case Meeting::block:
      return "sync_block" + where;
    default:
      return "sync_threads(" + std::to_string(meeting.id) + ", " + std::to_string(meeting.count) + ")" + where;
  }
}

std::string text(const uint3& index, const dim3& extent) {
  std::string all = std::to_string(index.x);
  if (extent.y == 1 && extent.z == 1) return all;
  all = "(" + all + ", " + std::to_string(index.y);
  if (extent.z > 1) all += ", " + std::to_string(index.z);
  return all + ")";
}

std::string text(const Thread& thread) {
  return "thread " + text(thread.index, blockDim);
}

std::string ranges(uint32_t mask) {
  std::string all;
  for (int i = 0; i < 32; ++i) {
    if (!(mask >> i & 1)) continue;
    const int from = i;
    while (i < 31 && mask >> (i + 1) & 1) ++i;
    all += (all.empty() ? "" : ", ") + std::to_string(from) + (i > from ? "-" + std::to_string(i) : "");
  }
  return all;
}

std::string situation(const Block& block) {
  std::vector<std::pair<std::string, uint32_t>> groups;
  for (const Warp& warp : block.warps) {
    std::string what;
    const auto add = [&](uint32_t lanes, const std::string& state) {
      what += what.empty() ? "" : ", ";
      if (lanes != warp.all) what += (lanes & (lanes - 1) ? "lanes " : "lane ") + ranges(lanes) + " ";
      what += state;
    };
    if (warp.waiting) add(warp.waiting, "at " + text(warp.meeting));
    if (warp.exited) add(warp.exited, "exited");
    for (const Thread* thread : block.counting) {
      if (thread->warp != &warp) continue;
      add(1u << thread->lane, "in arrive_and_wait (" + line_of(thread->caller) + ") for " +
                                  std::to_string(thread->target) + " where the counter stands at " +
                                  std::to_string(*thread->counter));
    }
    const auto known = std::find_if(groups.begin(), groups.end(), [&](auto& group) { return group.first == what; });
    if (known == groups.end()) {
      groups.emplace_back(what, 1u << warp.number);
    } else {
      known->second |= 1u << warp.number;
    }
  }
  std::string all;
  for (const auto& [what, warps] : groups)
    all +=
        (all.empty() ? "" : "; ") + std::string(warps & (warps - 1) ? "warps " : "warp ") + ranges(warps) + ": " + what;
  return all;
}

}  // namespace simt

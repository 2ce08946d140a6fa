// The watch of memory accesses: built only for the flavour whose kernels are compiled with -fsanitize=thread, which
// calls the functions at the end of this file before every load and store.
//
// A warp counts the points at which its lanes see each other's writes (sync_warp and the barriers, not shuffles): its
// clock. Each warp also knows up to which clock it is ordered after every other warp; barriers and arrive_and_wait pass
// that knowledge on. Memory remembers by whom and when it was last written, and read since. An access that is not
// ordered after an earlier one of another thread, where one of the two writes, is a race, whichever came first today.
#ifdef SFR_SIMT_RACE

#include "race.h"

#include <dlfcn.h>
#include <link.h>

#include <algorithm>
#include <cstdio>
#include <memory>
#include <unordered_map>

#include "counters.h"
#include "messages.h"
#include "symbols.h"

namespace simt::race {
namespace {

using Clocks = std::vector<uint32_t>;

struct Known {
  Clocks clocks;  // of all warps that run at the same time; what happened before them is seen
  Clocks learnt;  // by one lane in arrive_and_wait, for all at the warp's next meeting
  uint32_t learner = 0;
};

// Accesses by lanes of one warp at one clock.
struct Mark {
  uint32_t who = 0;  // the warp, counted through the whole launch from 1
  uint32_t clock = 0;
  uint32_t lanes = 0;
  uint32_t code = 0;  // of one of them: the address within the module
};

struct Cell {
  Mark write;
  Mark reads[3];  // the latest ones that are not ordered after each other
};

constexpr size_t page_bytes = 4096, coarse = 4;
constexpr size_t most_pages = 8192;  // kept from one launch to the next: 512 MiB

// Cells for 4 bytes each until there is an access to fewer, then for single bytes.
struct Page {
  uint64_t generation = 0;
  size_t grain = coarse;
  std::unique_ptr<Cell[]> cells;

  void renew(uint64_t now) {
    if (generation == now) return;
    generation = now;
    if (!cells) {
      cells.reset(new Cell[page_bytes / grain]);
    } else {
      std::fill(cells.get(), cells.get() + page_bytes / grain, Cell());
    }
  }

  void refine() {
    std::unique_ptr<Cell[]> fine(new Cell[page_bytes]);
    for (size_t i = 0; i < page_bytes; ++i) fine[i] = cells[i / grain];
    cells = std::move(fine), grain = 1;
  }
};

struct SharedPages {
  uint64_t generation = 0;
  std::vector<Page> pages;
};

bool together;
uint32_t warps_per_block;
uint64_t generation;
std::vector<Known> known;               // by place of the block and number of the warp
std::vector<SharedPages> shared_pages;  // by place of the block
std::unordered_map<uintptr_t, Page> global_pages;
struct {
  uintptr_t number = 0;
  Page* page = nullptr;
} recent_pages[256];  // kernels go through few arrays at a time
std::unordered_map<const unsigned*, Clocks> counters;
uintptr_t image, image_end;  // of the module

uint32_t block_number(const Block& block) {
  return block.index.x + gridDim.x * (block.index.y + gridDim.y * block.index.z);
}

size_t index_of(const Warp& warp) {
  return size_t(warp.block->place) * warps_per_block + size_t(warp.number);
}

void join(Clocks& to, const Clocks& from) {
  for (size_t i = 0; i < from.size(); ++i) to[i] = std::max(to[i], from[i]);
}

// What the warp did so far becomes the past.
void step(Warp& warp) {
  const size_t index = index_of(warp);
  Known& of = known[index];
  if (of.learner) join(of.clocks, of.learnt), of.learner = 0;
  ++of.clocks[index];
}

// The running thread.
struct Self {
  const Known& of;
  uint32_t who, first, clock, bit;
  bool has_learnt;

  explicit Self(const Thread& thread)
      : of(known[index_of(*thread.warp)]),
        who(block_number(*thread.warp->block) * warps_per_block + uint32_t(thread.warp->number) + 1),
        first(together ? 1 : who - uint32_t(thread.warp->number)),
        clock(of.clocks[index_of(*thread.warp)]),
        bit(1u << thread.lane),
        has_learnt(of.learner == bit) {}

  bool after(const Mark& mark) const {
    if (mark.who == who) return mark.clock < clock || mark.lanes == bit;
    const size_t index = mark.who - first;
    if (index >= of.clocks.size()) return mark.who == 0;  // another block of a launch whose blocks are not ordered
    return of.clocks[index] > mark.clock || (has_learnt && of.learnt[index] > mark.clock);
  }

  bool is(const Mark& mark) const { return mark.who == who && mark.clock == clock; }
};

// Messages.

std::string place_of(uint32_t code) {
  return line_of(reinterpret_cast<const void*>(image + code));
}

std::string memory(uintptr_t address, bool shared) {
  const auto base = uintptr_t(running->warp->block->shared.data());
  char text[64];
  if (shared) {
    std::snprintf(text, sizeof(text), "byte %lld of shared memory", (long long)(address - base));
  } else {
    std::snprintf(text, sizeof(text), "memory at %#zx", size_t(address));
  }
  return text;
}

struct Access {
  uintptr_t address;
  size_t bytes;
  bool write, shared;
  uint32_t code;

  std::string text() const {
    return (write ? "writes " : "reads ") + memory(address, shared) + " (" + place_of(code) + ")";
  }
};

[[noreturn]] __attribute__((noinline, cold)) void fail_race(const Access& access, const Mark& mark, bool wrote) {
  const uint32_t warp = (mark.who - 1) % warps_per_block, block = (mark.who - 1) / warps_per_block;
  const bool several = mark.lanes & (mark.lanes - 1);
  std::string other = (several ? "lanes " : "lane ") + ranges(mark.lanes) + " of warp " + std::to_string(warp);
  if (block != block_number(*running->warp->block)) other += " of block " + std::to_string(block);
  fail(access.text() + ", which " + other + (wrote ? " wrote (" : " read (") + place_of(mark.code) +
       "): a race, nothing orders the two");
}

[[noreturn]] __attribute__((noinline, cold)) void fail_unwritten(const Access& access) {
  fail(access.text() + ", which nobody has written");
}

[[noreturn]] __attribute__((noinline, cold)) void fail_outside(const Access& access) {
  fail(access.text() + ", which has " + std::to_string(running->warp->block->shared.bytes()) + " bytes");
}

// Accesses.

void check_read(const Self& self, Cell& cell, const Access& access) {
  if (!self.after(cell.write)) fail_race(access, cell.write, true);
  if (access.shared && cell.write.who == 0) fail_unwritten(access);
  Mark* slot = nullptr;
  for (Mark& mark : cell.reads) {
    if (self.is(mark)) {
      mark.lanes |= self.bit;
      return;
    }
    if (!slot && self.after(mark)) slot = &mark;
  }
  if (!slot) slot = &cell.reads[self.who % 3];
  *slot = {self.who, self.clock, self.bit, access.code};
}

void check_write(const Self& self, Cell& cell, const Access& access) {
  if (!self.after(cell.write)) fail_race(access, cell.write, true);
  for (const Mark& mark : cell.reads)
    if (!self.after(mark)) fail_race(access, mark, false);
  cell.write = {self.who, self.clock, self.bit, access.code};
  for (Mark& mark : cell.reads) mark = {};
}

Page& page_of(const Thread& thread, const Access& access, uintptr_t offset) {
  if (access.shared) {
    SharedPages& all = shared_pages[size_t(thread.warp->block->place)];
    Page& page = all.pages[offset / page_bytes];
    page.renew(all.generation);
    return page;
  }
  const uintptr_t number = offset / page_bytes;
  auto& entry = recent_pages[number % 256];
  if (entry.number != number || !entry.page) entry = {number, &global_pages[number]};
  entry.page->renew(generation);
  return *entry.page;
}

template <bool write>
void look(const void* address, size_t bytes, const void* caller) {
  if (!running) return;
  const Thread& thread = *running;
  const auto at = uintptr_t(address);
  if (at - uintptr_t(thread.fiber.stack) < thread.fiber.bytes) return;
  if (!write && at - image < image_end - image) return;  // constants and threadIdx
  const SharedMemory& memory = thread.warp->block->shared;
  const uintptr_t from_shared = at - uintptr_t(memory.data());
  Access access{at, bytes, write, from_shared < memory.bytes(), uint32_t(uintptr_t(caller) - image)};
  if (access.shared ? from_shared + bytes > memory.bytes()
                    : at + shared_margin - uintptr_t(memory.data()) < memory.bytes() + 2 * shared_margin) {
    access.shared = true;
    fail_outside(access);
  }
  if (counters::on) {
    counters::access(thread, access.shared ? from_shared : at, bytes, write, access.shared, access.code);
    return;
  }
  const Self self(thread);
  uintptr_t offset = access.shared ? from_shared : at;
  for (const uintptr_t end = offset + bytes; offset < end;) {
    Page& page = page_of(thread, access, offset);
    if (page.grain > 1 && (offset % coarse != 0 || end - offset < coarse)) page.refine();
    Cell& cell = page.cells[offset % page_bytes / page.grain];
    write ? check_write(self, cell, access) : check_read(self, cell, access);
    offset += page.grain, access.address += page.grain;
  }
}

}  // namespace

void launch_begins(const Launch& launch) {
  const size_t threads = size_t(launch.block.x) * launch.block.y * launch.block.z;
  const size_t blocks = launch.together ? size_t(launch.grid.x) * launch.grid.y * launch.grid.z : 1;
  together = launch.together;
  warps_per_block = uint32_t((threads + lanes_per_warp - 1) / lanes_per_warp);
  ++generation;
  if (global_pages.size() > most_pages) {
    global_pages.clear();
    for (auto& recent : recent_pages) recent = {};
  }
  known.assign(blocks * warps_per_block, {});
  for (size_t i = 0; i < known.size(); ++i) {
    known[i].clocks.assign(known.size(), 0), known[i].learnt.assign(known.size(), 0);
    known[i].clocks[i] = 1;
  }
  counters.clear();
  if (shared_pages.size() < blocks) shared_pages.resize(blocks);
  Dl_info where;
  if (!image && dladdr(reinterpret_cast<void*>(&launch_begins), &where)) {
    image = uintptr_t(where.dli_fbase), image_end = image;
    dl_iterate_phdr(
        [](dl_phdr_info* info, size_t, void*) {
          if (uintptr_t(info->dlpi_addr) != image) return 0;
          for (int i = 0; i < info->dlpi_phnum; ++i)
            if (info->dlpi_phdr[i].p_type == PT_LOAD)
              image_end = std::max(image_end, image + info->dlpi_phdr[i].p_vaddr + info->dlpi_phdr[i].p_memsz);
          return 1;
        },
        nullptr);
  }
}

void block_begins(Block& block) {
  static uint64_t blocks_so_far;
  SharedPages& of = shared_pages[size_t(block.place)];
  of.generation = ++blocks_so_far;
  const size_t pages = (block.shared.bytes() + page_bytes - 1) / page_bytes;
  if (of.pages.size() < pages) of.pages.resize(pages);
}

void warp_meets(Warp& warp) {
  step(warp);
}

void warps_meet(Block& block, uint32_t warps) {
  static Clocks all;
  all.assign(known.size(), 0);
  const auto each = [&](auto&& f) {
    for (Warp& warp : block.warps)
      if (warps >> warp.number & 1) f(warp);
  };
  each([](Warp& warp) { step(warp); });
  each([](Warp& warp) { join(all, known[index_of(warp)].clocks); });
  each([](Warp& warp) { known[index_of(warp)].clocks = all; });
}

void releases(Thread& thread, const unsigned* counter) {
  Clocks& seen = counters[counter];
  seen.resize(known.size(), 0);
  step(*thread.warp);
  join(seen, known[index_of(*thread.warp)].clocks);
}

void acquires(Thread& thread, const unsigned* counter) {
  Known& of = known[index_of(*thread.warp)];
  if (of.learner) join(of.clocks, of.learnt);
  of.learnt = counters[counter], of.learner = 1u << thread.lane;
}

void copied(const Thread&, const void* address, int bytes, const void* caller) {
  if (!counters::on) look<true>(address, size_t(bytes), caller);  // counted when it was asked for
}

}  // namespace simt::race

// What the compiler calls.

using simt::race::look;

#define SIMT_HOOK extern "C" __attribute__((visibility("hidden"))) void
#define SIMT_CALLER __builtin_return_address(0)

SIMT_HOOK __tsan_init() {}
SIMT_HOOK __tsan_func_entry(void*) {}
SIMT_HOOK __tsan_func_exit() {}
SIMT_HOOK __tsan_vptr_update(void**, void*) {}
SIMT_HOOK __tsan_vptr_read(void**) {}

#define SIMT_ACCESS(bytes)                                 \
  SIMT_HOOK __tsan_read##bytes(void* address) {            \
    look<false>(address, bytes, SIMT_CALLER);              \
  }                                                        \
  SIMT_HOOK __tsan_write##bytes(void* address) {           \
    look<true>(address, bytes, SIMT_CALLER);               \
  }                                                        \
  SIMT_HOOK __tsan_unaligned_read##bytes(void* address) {  \
    look<false>(address, bytes, SIMT_CALLER);              \
  }                                                        \
  SIMT_HOOK __tsan_unaligned_write##bytes(void* address) { \
    look<true>(address, bytes, SIMT_CALLER);               \
  }
SIMT_ACCESS(1)
SIMT_ACCESS(2)
SIMT_ACCESS(4)
SIMT_ACCESS(8)
SIMT_ACCESS(16)

SIMT_HOOK __tsan_read_range(void* address, unsigned long bytes) {
  look<false>(address, bytes, SIMT_CALLER);
}
SIMT_HOOK __tsan_write_range(void* address, unsigned long bytes) {
  look<true>(address, bytes, SIMT_CALLER);
}

// The guards of the launchers' static variables; kernels have no atomic operation of their own.
extern "C" __attribute__((visibility("hidden"))) char __tsan_atomic8_load(const volatile char* address, int) {
  return __atomic_load_n(address, __ATOMIC_SEQ_CST);
}

#endif

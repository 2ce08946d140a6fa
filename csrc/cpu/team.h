// Threads: several problems at once, and several threads to a problem when there are fewer problems than threads.
//
// One thread solves a problem from its first step to its last, and puts up the blocks of each longer phase for others
// to help with. It waits for no helper that has not begun: one that does not get a processor holds nobody up. Work is
// cut into blocks by a problem's shape alone and every sum over blocks is taken in order, so that results have the same
// bits whatever the number of threads.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <exception>
#include <initializer_list>
#include <new>
#include <type_traits>

#include "threads.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace sfr::cpu::SFR_ISA {

// Hands out aligned pieces of one allocation. With no memory behind it, it only counts the bytes.
class Arena {
 public:
  explicit Arena(char* base = nullptr) : base_(base) {}

  template <class T>
  T* take(int64_t count) {
    T* piece = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    used_ += (count * int64_t(sizeof(T)) + 63) / 64 * 64;
    return piece;
  }

  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

class Memory {
 public:
  explicit Memory(int64_t bytes) : data_(std::aligned_alloc(64, (bytes + 127) / 64 * 64)) {
    if (!data_) throw std::bad_alloc();
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory() { std::free(data_); }
  char* data() const { return static_cast<char*>(data_); }

 private:
  void* data_;
};

// Blocks of a phase that some thread is to begin with, and all that it needs to know of them, in one line of memory.
struct alignas(64) Share {
  using Run = void(const void* f, int64_t begin, int64_t end, char* own);

  // How many are left, marked with the phase: nobody takes a block of a phase for one of another.
  std::atomic<uint64_t> left{0};
  std::atomic<int64_t> end{0};
  std::atomic<Run*> run{nullptr};
  std::atomic<const void*> f{nullptr};

  static constexpr uint64_t unmarked = 0xffffffff;

  void put(uint64_t phase, Run* how, const void* what, int64_t first, int64_t last) {
    end.store(last, std::memory_order_relaxed);
    run.store(how, std::memory_order_relaxed);
    f.store(what, std::memory_order_relaxed);
    left.store(phase << 32 | uint64_t(last - first), std::memory_order_release);
  }
  bool any() const { return (left.load(std::memory_order_relaxed) & unmarked) != 0; }

  // Calls f for what is left, in ever smaller pieces: who comes late finds something, and nobody waits long for the
  // last one. Returns for how much.
  int64_t take(char* own) {
    int64_t taken = 0;
    uint64_t seen = left.load(std::memory_order_acquire);
    while (const int64_t rest = int64_t(seen & unmarked)) {
      const int64_t piece = (rest + 3) / 4, first = end.load(std::memory_order_relaxed) - rest;
      Run* const how = run.load(std::memory_order_relaxed);
      const void* const what = f.load(std::memory_order_relaxed);
      // If it fails, what was read may be of another phase.
      if (!left.compare_exchange_weak(seen, seen - uint64_t(piece), std::memory_order_acq_rel,
                                      std::memory_order_acquire))
        continue;
      how(what, first, first + piece, own);
      taken += piece;
      seen = left.load(std::memory_order_acquire);
    }
    return taken;
  }
};

// What one thread has put up for others to help with.
struct alignas(64) Phase {
  std::atomic<int64_t> unfinished{0};  // blocks
  Bell finished;
  uint64_t number = 0;
  Share* shares = nullptr;
};

// What the threads of one call share.
class Crew {
 public:
  Crew(int64_t problems, int64_t shares, Phase* phases, Share* each)
      : problems(problems), shares(shares), phases(phases) {
    for (int64_t i = 0; i < problems; ++i) {
      new (phases + i) Phase;
      phases[i].shares = each + i * shares;
      for (int64_t k = 0; k < shares; ++k) new (phases[i].shares + k) Share;
    }
  }

  const int64_t problems, shares;  // at most, at a time; into which a phase is cut
  Phase* const phases;
  std::atomic<int64_t> helpers{0};
  Bell work;

  // Calls f for all blocks of a new phase, here and wherever somebody helps. Returns how long it slept.
  Nanoseconds perform(Phase& phase, Share::Run* run, const void* f, int64_t count, char* own) {
    phase.unfinished.store(count, std::memory_order_relaxed);
    ++phase.number;
    for (int64_t k = shares - 1; k >= 0; --k)
      phase.shares[k].put(phase.number, run, f, count * k / shares, count * (k + 1) / shares);
    work.ring();
    take_part(phase, 0, own);
    return phase.finished.wait([&] { return phase.unfinished.load(std::memory_order_acquire) == 0; });
  }

  // Helps whoever has blocks left until all_done(). Returns how long it slept.
  template <class Done>
  Nanoseconds help(char* own, Done&& all_done) {
    const int64_t me = helpers.fetch_add(1), first = me % problems, share = 1 + me / problems % (shares - 1);
    const auto help_somebody = [&] {
      bool helped = false;
      for (int64_t i = 0; i < problems; ++i) {
        Phase& phase = phases[(first + i) % problems];
        if (!phase.shares[share].any()) continue;  // those of others are left in peace
        take_part(phase, share, own);
        helped = true;
      }
      return helped;
    };
    Nanoseconds slept = 0;
    while (!all_done()) slept += work.wait([&] { return help_somebody() || all_done(); });
    return slept;
  }

 private:
  void take_part(Phase& phase, int64_t share, char* own) {
    int64_t taken = 0;
    for (int64_t k = 0; k < shares; ++k, share = share + 1 < shares ? share + 1 : 0)
      taken += phase.shares[share].take(own);
    if (taken > 0 && phase.unfinished.fetch_sub(taken, std::memory_order_acq_rel) == taken) phase.finished.ring();
  }
};

// Who solves one problem: a thread, and those that help with blocks of it.
class Team {
 public:
  Team(char* memory, char* own, Crew* crew, Phase* phase, Nanoseconds* slept)
      : memory(memory), own(own), crew_(crew), phase_(phase), slept_(slept) {}

  char* const memory;  // the problem's workspace
  char* const own;     // workspace of the thread that leads; blocks that need one take that of who runs them
  static constexpr int rank = 0, size = 1;
  void barrier() const {}

  // Calls f(block) or f(block, own workspace) for each block of a phase; any thread may, in any order.
  template <class F>
  void blocks(int64_t count, F&& f) const {
    if (!crew_ || count < 2 || crew_->helpers.load(std::memory_order_relaxed) == 0) return run<F>(&f, 0, count, own);
    *slept_ += crew_->perform(*phase_, run<F>, &f, count, own);
  }

  // Without helpers.
  Team alone() const { return Team(memory, own, nullptr, nullptr, nullptr); }

 private:
  template <class F>
  static void run(const void* f, int64_t begin, int64_t end, char* own) {
    const auto& call = *static_cast<const std::remove_reference_t<F>*>(f);
    for (int64_t block = begin; block < end; ++block) {
      if constexpr (std::is_invocable_v<decltype(call), int64_t, char*>)
        call(block, own);
      else
        call(block);
    }
  }

  Crew* crew_;
  Phase* phase_;
  Nanoseconds* slept_;
};

struct Workload {
  int64_t items;           // problems
  double nanoseconds;      // that one takes, roughly: decides how many threads are worth waking
  int64_t thread_bytes;    // workspace of each thread
  int threads;             // at most
  int64_t team_bytes = 0;  // workspace of a team
};

// Calls task(team, item) for every item. Threads take one after the other; who finds none left helps the others.
template <class Task>
void for_each_problem(const Workload& work, Task&& task) {
  if (work.items == 0) return;
  constexpr double worth_a_thread = 2.5e4, worth_a_team = 6e4;
  int64_t threads = work.threads;
  if (work.nanoseconds < worth_a_team && threads > work.items) threads = work.items;
  const double all = work.nanoseconds * double(work.items), worth = all / worth_a_thread;
  if (worth < double(threads)) threads = worth < 1 ? 1 : int64_t(worth);
  threads = threads_to_use(threads, all);

  const int64_t team_bytes = (work.team_bytes + 4095) / 4096 * 4096 + 64;
  const int64_t thread_bytes = (work.thread_bytes + 4095) / 4096 * 4096 + 64;
  const int64_t problems = threads < work.items ? threads : work.items;
  const Memory team_memory(team_bytes * problems), thread_memory(thread_bytes * threads);
#if defined(_OPENMP)
  if (threads > 1) {
    const int64_t shares = problems < threads ? (threads + problems - 1) / problems : 2;
    const Memory phases(int64_t(sizeof(Phase)) * problems), each(int64_t(sizeof(Share)) * problems * shares);
    Crew crew(problems, shares, reinterpret_cast<Phase*>(phases.data()), reinterpret_cast<Share*>(each.data()));
    std::atomic<int64_t> next{1}, left{work.items}, teams{0};
    std::atomic<Nanoseconds> gained{0};
    std::atomic<bool> failed{false};
    std::exception_ptr failure;
    const Nanoseconds start = now();
    Nanoseconds waited = 0, end = start;
#pragma omp parallel num_threads(int(threads))
    {
      // The thread that called takes the first problem: it is surely running.
      const bool caller = omp_get_thread_num() == 0;
      const Nanoseconds begin = caller ? now() : spent_by_this_thread();
      char* const own = thread_memory.data() + thread_bytes * omp_get_thread_num();
      Nanoseconds slept = 0;
      int64_t place = -1;
      for (int64_t item = caller ? 0 : next.fetch_add(1); item < work.items; item = next.fetch_add(1)) {
        if (place < 0) place = teams.fetch_add(1);
        try {
          task(Team(team_memory.data() + team_bytes * place, own, &crew, crew.phases + place, &slept), item);
        } catch (...) {
          if (!failed.exchange(true)) failure = std::current_exception();
        }
        if (left.fetch_sub(1) == 1) crew.work.ring();
      }
      slept += crew.help(own, [&] { return left.load(std::memory_order_acquire) == 0; });
      if (caller) {
        end = now();
        waited = begin - start + slept;
      } else {
        gained += spent_by_this_thread() - begin;
      }
    }
    judge(waited + now() - end, gained);
    if (failed) std::rethrow_exception(failure);
    return;
  }
#endif
  for (int64_t item = 0; item < work.items; ++item)
    task(Team(team_memory.data(), thread_memory.data(), nullptr, nullptr, nullptr), item);
}

// The same with a workspace: calls task(team, item, work) with a Work that was made for the item, as Work(arena, from),
// and takes its memory from that of the team.
template <class Work, class From, class Task>
void for_each_problem_in(Workload workload, const From& from, Task&& task) {
  Arena measure;
  Work(measure, from);
  workload.team_bytes = measure.used() + int64_t(sizeof(Work)) + 64;
  for_each_problem(workload, [&](const Team& team, int64_t item) {
    Arena arena(team.memory);
    Work* work = arena.take<Work>(1);
    new (work) Work(arena, from);
    task(team, item, *work);
  });
}

}  // namespace sfr::cpu::SFR_ISA

// Threads: several problems at once, and a team of threads per problem when there are fewer problems than
// threads. Work inside a problem is cut into blocks by its shape alone and every sum over blocks is taken in
// order, so that results have the same bits whatever the number of threads.
#pragma once

#include <sched.h>

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <initializer_list>
#include <new>

#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
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

// What the threads of one team share.
struct alignas(64) Meeting {
  std::atomic<int> arrived{0};
  std::atomic<int> round{0};
  int64_t item = 0;
};

class Team {
 public:
  Team(int rank, int size, Meeting* meeting, char* memory, char* own)
      : rank(rank), size(size), memory(memory), own(own), meeting_(meeting) {}

  const int rank, size;
  char* const memory;  // the team's workspace
  char* const own;     // this thread's workspace

  // Spins: phases are microseconds long. Yields after a while in case there are more threads than cores.
  void barrier() const {
    if (size == 1) return;
    const int round = meeting_->round.load(std::memory_order_relaxed);
    if (meeting_->arrived.fetch_add(1, std::memory_order_acq_rel) == size - 1) {
      meeting_->arrived.store(0, std::memory_order_relaxed);
      meeting_->round.store(round + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; meeting_->round.load(std::memory_order_acquire) == round; ++spins) {
      if (spins > 4096) {
        sched_yield();
      } else {
#if defined(__x86_64__)
        _mm_pause();
#endif
      }
    }
  }

  // Blocks of a phase, dealt out in turn.
  template <class F>
  void blocks(int64_t count, F&& f) const {
    for (int64_t block = rank; block < count; block += size) f(block);
  }

  Team alone() const { return Team(0, 1, nullptr, memory, own); }
  Meeting& meeting() const { return *meeting_; }

 private:
  Meeting* meeting_;
};

struct Workload {
  int64_t items;         // problems
  double operations;     // of one problem, roughly: decides how many threads are worth waking
  int64_t thread_bytes;  // workspace of each thread
  int threads;
  int64_t team_bytes = 0;  // workspace of a team
};

// Calls task(team, item) for every item, from every thread of the team that has it.
template <class Task>
void for_each_problem(const Workload& work, Task&& task) {
  if (work.items == 0) return;
  constexpr double worth_a_thread = 1e5, worth_a_team = 1e6;
  int64_t threads = work.threads;
  if (work.operations < worth_a_team && threads > work.items) threads = work.items;
  const double worth = work.operations * double(work.items) / worth_a_thread;
  if (worth < double(threads)) threads = worth < 1 ? 1 : int64_t(worth);

  const int64_t team_bytes = (work.team_bytes + 4095) / 4096 * 4096 + 64;
  const int64_t thread_bytes = (work.thread_bytes + 4095) / 4096 * 4096 + 64;
  const int64_t most_teams = threads < work.items ? threads : work.items;
  const Memory team_memory(team_bytes * most_teams), thread_memory(thread_bytes * threads);
  const Memory meeting_memory(int64_t(sizeof(Meeting)) * most_teams);
  Meeting* meetings = reinterpret_cast<Meeting*>(meeting_memory.data());
  for (int64_t i = 0; i < most_teams; ++i) new (meetings + i) Meeting;
  std::atomic<int64_t> next{0};

  const auto run = [&](int64_t thread, int64_t count) {
    const int64_t teams = count < work.items ? count : work.items;
    const int64_t index = thread * teams / count;
    const int64_t first = (index * count + teams - 1) / teams;
    const int64_t last = ((index + 1) * count + teams - 1) / teams;
    const Team team(int(thread - first), int(last - first), meetings + index, team_memory.data() + team_bytes * index,
                    thread_memory.data() + thread_bytes * thread);
    for (;;) {
      if (team.rank == 0) team.meeting().item = next.fetch_add(1);
      team.barrier();
      const int64_t item = team.meeting().item;
      team.barrier();
      if (item >= work.items) return;
      task(team, item);
      team.barrier();
    }
  };

#if defined(_OPENMP)
  if (threads > 1) {
#pragma omp parallel num_threads(int(threads))
    run(omp_get_thread_num(), omp_get_num_threads());
    return;
  }
#endif
  run(0, 1);
}

// The same with a workspace: calls task(team, item, work) with a Work that was made for the item, as Work(arena, from),
// by the first thread of its team, and takes its memory from that of the team.
template <class Work, class From, class Task>
void for_each_problem_in(Workload workload, const From& from, Task&& task) {
  Arena measure;
  Work(measure, from);
  workload.team_bytes = measure.used() + int64_t(sizeof(Work)) + 64;
  for_each_problem(workload, [&](const Team& team, int64_t item) {
    Arena arena(team.memory);
    Work* work = arena.take<Work>(1);
    if (team.rank == 0) new (work) Work(arena, from);
    team.barrier();
    task(team, item, *work);
  });
}

}  // namespace sfr::cpu::SFR_ISA

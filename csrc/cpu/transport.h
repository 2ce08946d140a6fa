// One transport problem of a team: its weights, and the solver's memory. What sinkhorn.cpp and emd.cpp share.
#pragma once

#include <limits>

#include "../contracts/sinkhorn.h"
#include "../solver/problem.h"

namespace sfr::cpu::SFR_ISA {

// A side's weights must be finite and non-negative.
template <class T>
bool weights_are_valid(const WeightView& view, int64_t B, int64_t G, int64_t N) {
  if (!view.data) return true;
  if (view.stride_g == 0) G = 1;
  for (int64_t b = 0; b < B; ++b)
    for (int64_t g = 0; g < G; ++g) {
      const T* w = static_cast<const T*>(view.data) + b * view.stride_b + g * view.stride_g;
      bool sound = true;
      for (int64_t i = 0; i < N; ++i) {
        const T x = w[i * view.stride_n];
        sound = sound && x >= 0 && x <= std::numeric_limits<T>::max();
      }
      if (!sound) return false;
    }
  return true;
}

// Of both sides of a problem, `a` and `b`.
template <class T, class Sides>
Status check_weights(const Sides& sides, int64_t B, int64_t G, int64_t N, int64_t M) {
  if (!weights_are_valid<T>(sides.a, B, G, N)) return Status::bad_a;
  if (!weights_are_valid<T>(sides.b, B, G, M)) return Status::bad_b;
  return Status::ok;
}

// One side's normalised weights, without those that are 0.
template <class T>
struct Weights {
  int32_t* list = nullptr;
  const int32_t* kept = nullptr;  // indices of the weights above 0; null: all of them
  int64_t count = 0, all = 0;
  double total = 1;
  bool light = false;  // some weight is next to nothing

  void reserve(Arena& arena, int64_t n) { list = arena.take<int32_t>(n); }

  void read(const WeightView& view, int64_t b, int64_t g, int64_t n, T* out) {
    all = count = n;
    kept = nullptr;
    total = 1;
    light = false;
    if (!view.data) {
      for (int64_t i = 0; i < n; ++i) out[i] = T(1) / T(n);
      return;
    }
    const T* w = static_cast<const T*>(view.data) + b * view.stride_b + g * view.stride_g;
    count = 0;
    double sum = 0;
    // In units of the largest, so that no sum overflows and no weight that counts is lost.
    T most = 0;
    for (int64_t i = 0; i < n; ++i) most = w[i * view.stride_n] > most ? w[i * view.stride_n] : most;
    const T least = std::numeric_limits<T>::min() * T(n);  // what is kept is a normal number, once divided by the sum
    for (int64_t i = 0; most > 0 && i < n; ++i) {
      const T unit = w[i * view.stride_n] / most;
      if (unit < least) continue;
      out[count] = unit;
      list[count++] = int32_t(i);
      sum += double(unit);
      light = light || unit < Rules<T>::nothing * T(n);
    }
    for (int64_t i = 0; i < count; ++i) out[i] = T(double(out[i]) / sum);
    total = sum * double(most);
    if (count < n) kept = list;
  }

  // Of an empty problem nothing is kept on either side.
  void remove_all() {
    kept = list;
    count = 0;
  }

  Kept patches() const { return {kept, count, all, light}; }
  int64_t index(int64_t i) const { return kept ? kept[i] : i; }

  void scatter(const T* in, T* out) const {
    if (count < all) std::memset(out, 0, sizeof(T) * all);
    for (int64_t i = 0; i < count; ++i) out[index(i)] = in[i];
  }
};

template <class T>
struct Transport {
  int64_t N = 0, M = 0;
  bool of_features = false;
  Weights<T> a, b;
  PlanMemory<T> memory;

  void reserve(Arena& arena, int64_t n, int64_t m) {
    N = n;
    M = m;
    a.reserve(arena, n);
    b.reserve(arena, m);
    memory.reserve(arena, n, m);
  }

  void read_weights(const Solve& solve, int64_t batch, int64_t group) {
    a.read(solve.a, batch, group, N, memory.rows);
    b.read(solve.b, batch, group, M, memory.columns);
    if (a.count > 0 && b.count > 0) return;
    a.remove_all();
    b.remove_all();
  }

  // Row length of the costs between kept patches, and of the plan.
  int64_t ld() const { return padded<T>(b.count); }

  static double nanoseconds(int64_t n, int64_t m) { return 13 * double(n) * double(m); }
};

// Calls f(plan, totals) from the threads that solve a problem, whose weights have been read and whose costs lie in
// `cost` [a.count][ld]: one thread, where a problem is one block of rows.
template <class T, class F>
void with_plan(const Team& whole, const Transport<T>& work, const T* cost, F&& f) {
  const bool alone = whole_vectors<T>(work.a.count) <= single_block_rows;
  if (alone && whole.rank > 0) return;
  const Team team = alone ? whole.alone() : whole;
  Plan<T> plan(team, work.memory, cost, work.a.patches(), work.b.patches());
  plan.of_features = work.of_features;
  const auto held = [](double total) {
    return T(total < double(Number<T>::largest) ? total : double(Number<T>::largest));
  };
  f(plan, Totals<T>{held(work.a.total), held(work.b.total), T(1 / work.a.total), T(1 / work.b.total)});
}

// Both compiled once, in transport.cpp.
template <class T>
void transport_forward(const Team& team, const Transport<T>& work, const T* cost, const Solve& out, int64_t p) {
  with_plan(team, work, cost, [&](Plan<T>& plan, Totals<T> totals) { problem_forward(plan, out, totals, true, p); });
}

// Leaves d/dC in work.memory.P [a.count][ld]. False: the problem holds a NaN, and everything about it is NaN.
template <class T>
bool transport_backward(const Team& team, const Transport<T>& work, const T* cost, const SolveGrad& grad, int64_t p) {
  with_plan(team, work, cost, [&](Plan<T>& plan, Totals<T> totals) { problem_backward(plan, grad, totals, p); });
  team.barrier();
  return is_sound<T>(grad, p);
}

#define SFR_TRANSPORT(prefix, T)                                                                             \
  prefix template void transport_forward(const Team&, const Transport<T>&, const T*, const Solve&, int64_t); \
  prefix template bool transport_backward(const Team&, const Transport<T>&, const T*, const SolveGrad&, int64_t);
SFR_TRANSPORT(extern, float)
SFR_TRANSPORT(extern, double)

}  // namespace sfr::cpu::SFR_ISA

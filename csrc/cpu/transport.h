// One transport problem from its weights to its outputs, and back: what sinkhorn.cpp and emd.cpp share.
#pragma once

#include <limits>

#include "adjoint.h"
#include "symmetric.h"

namespace sfr::cpu::SFR_ISA {

// A side's weights must be finite and non-negative, with one above 0.
template <class T>
bool weights_are_valid(const WeightView& view, int64_t B, int64_t G, int64_t N) {
  if (!view.data) return true;
  if (view.stride_g == 0) G = 1;
  for (int64_t b = 0; b < B; ++b)
    for (int64_t g = 0; g < G; ++g) {
      const T* w = static_cast<const T*>(view.data) + b * view.stride_b + g * view.stride_g;
      bool some = false, sound = true;
      for (int64_t i = 0; i < N; ++i) {
        const T x = w[i * view.stride_n];
        sound = sound && x >= 0 && x <= std::numeric_limits<T>::max();
        some = some || x > 0;
      }
      if (!sound || !some) return false;
    }
  return true;
}

template <class T>
Status check_weights(const Solve& solve, int64_t B, int64_t G, int64_t N, int64_t M) {
  if (!weights_are_valid<T>(solve.a, B, G, N)) return Status::bad_a;
  if (!weights_are_valid<T>(solve.b, B, G, M)) return Status::bad_b;
  return Status::ok;
}

// One side's normalised weights, without those that are 0.
template <class T>
struct Weights {
  int32_t* list = nullptr;
  const int32_t* kept = nullptr;  // indices of the weights above 0; null: all of them
  int64_t count = 0, all = 0;
  double total = 1;

  void reserve(Arena& arena, int64_t n) { list = arena.take<int32_t>(n); }

  void read(const WeightView& view, int64_t b, int64_t g, int64_t n, T* out) {
    all = count = n;
    kept = nullptr;
    total = 1;
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
    for (int64_t i = 0; i < n; ++i) {
      const T unit = w[i * view.stride_n] / most;
      if (unit < std::numeric_limits<T>::min()) continue;
      out[count] = unit;
      list[count++] = int32_t(i);
      sum += double(unit);
    }
    for (int64_t i = 0; i < count; ++i) out[i] = T(double(out[i]) / sum);
    total = sum * double(most);
    if (count < n) kept = list;
  }

  int64_t index(int64_t i) const { return kept ? kept[i] : i; }

  void scatter(const T* in, T* out) const {
    if (count < all) std::memset(out, 0, sizeof(T) * all);
    for (int64_t i = 0; i < count; ++i) out[index(i)] = in[i];
  }
};

template <class T>
struct Transport {
  int64_t N = 0, M = 0;
  Weights<T> a, b;
  Plan<T> plan;
  PlanSystem<T> system;
  Adjoint<T> adjoint;
  T *grad_a = nullptr, *grad_b = nullptr;

  void reserve(Arena& arena, int64_t n, int64_t m, bool backward) {
    N = n;
    M = m;
    a.reserve(arena, n);
    b.reserve(arena, m);
    plan.reserve(arena, n, m);
    system.reserve(arena, plan, n, m);
    if (!backward) return;
    adjoint.reserve(arena, system, n, m);
    grad_a = arena.take<T>(whole_vectors<T>(n));
    grad_b = arena.take<T>(padded<T>(m));
  }

  void read_weights(const Solve& solve, int64_t batch, int64_t group) {
    a.read(solve.a, batch, group, N, plan.rows.weight);
    b.read(solve.b, batch, group, M, plan.columns.weight);
  }

  // A problem of one block of rows is one thread's.
  static Team solvers(const Team& team, int64_t n) {
    return whole_vectors<T>(n) <= single_block_rows ? team.alone() : team;
  }

  // Sets what the plan's exponents are made of.
  void place(const SolverOptions& options, T mean, T eps) {
    plan.mean = mean;
    plan.factor = eps > 0 ? 1 / (eps * T(ln2)) : T(0);
    if (options.reach_a > 0) plan.rows.bend(T(options.reach_a), eps, mean, T(a.total));
    if (options.reach_b > 0) plan.columns.bend(T(options.reach_b), eps, mean, T(b.total));
  }

  static double operations(int64_t n, int64_t m) { return 200.0 * double(n) * double(m); }
};

template <class T>
bool finite(T x) {
  return x - x == 0;
}

// eps of problem p in units of the cost: within what the type can hold, and 0 where all costs are equal.
template <class T>
T regularisation(const Solve& solve, const Spread<T>& spread, int64_t p) {
  const SolverOptions& options = solve.options;
  const bool relative = options.relative && !solve.eps_given;
  constexpr T negligible = sizeof(T) == 4 ? T(1e-37) : T(1e-300);
  T eps = solve.eps_given ? static_cast<const T*>(solve.eps_given)[p] : T(options.eps);
  if (relative) eps *= spread.deviation;
  const T least = spread.largest * T(1e-30);
  if (eps < least) eps = least;
  if (eps < negligible) eps = relative ? T(0) : negligible;
  // Costs that differ by rounding alone are equal.
  const T mean = magnitude(spread.mean);
  if (relative && spread.deviation <= 2 * std::numeric_limits<T>::epsilon() * mean) {
    const double reach = options.reach_a > 0 ? options.reach_a : options.reach_b;
    eps = reach > 0 ? T(options.eps) * (mean > 0 ? mean : T(reach)) : T(0);
  }
  return eps;
}

// Solves problem p, whose weights have been read and whose costs lie in `cost` [a.count][padded b.count].
template <class T>
void transport_forward(const Team& whole_team, Transport<T>& work, const T* cost, const Solve& solve_params,
                       int64_t p) {
  const Team team = Transport<T>::solvers(whole_team, work.a.count);
  if (team.size == 1 && whole_team.rank > 0) return;
  const SolverOptions& options = solve_params.options;
  Plan<T>& plan = work.plan;
  if (team.rank == 0) plan.set(cost, work.a.count, work.b.count, padded<T>(work.b.count));
  team.barrier();
  const Spread<T> spread = measure(team, plan);
  const T eps = regularisation(solve_params, spread, p);
  const bool sound = finite(spread.mean) && finite(spread.deviation) && finite(eps);
  const T to_cost = eps * T(ln2), nan = std::numeric_limits<T>::quiet_NaN();

  Solution<T> solution;
  if (sound) {
    if (team.rank == 0) {
      work.place(options, spread.mean, eps);
      const T* init = static_cast<const T*>(solve_params.init_g);
      for (int64_t j = 0; j < plan.ld; ++j) {
        plan.columns.log[j] = plan.columns.log_weight[j];
        if (init && j < work.b.count)
          plan.columns.log[j] += (init[p * work.M + work.b.index(j)] - spread.mean / 2) * plan.factor;
      }
    }
    team.barrier();
    const T wide = eps > 0 && !solve_params.init_g ? spread.deviation / eps : T(0);  // with a start, none is sought
    solution = options.symmetric
                   ? solve_symmetric(team, plan, T(options.tol), options.max_iter)
                   : solve(team, plan, work.system, options.method, wide, T(options.tol), options.max_iter);
  }
  if (team.rank > 0) return;

  T dual = 0;
  const auto potentials = [&](const Margin<T>& side, const Weights<T>& weights, void* out) {
    T* values = side.scale;  // no longer needed
    T sum = 0;
    for (int64_t i = 0; i < side.count; ++i) {
      const T f = values[i] = sound ? (side.log[i] - side.log_weight[i]) * to_cost : nan;
      if (side.soft > 0) {
        const T reach = eps / side.soft;
        sum -= side.weight[i] * reach * exponential_minus_1((-f - spread.mean / 2) / reach);
      } else {
        sum += side.weight[i] * f;
      }
    }
    dual += side.soft > 0 ? sum : sum + spread.mean / 2;
    weights.scatter(values, static_cast<T*>(out));
  };
  potentials(plan.rows, work.a, static_cast<T*>(solve_params.f) + p * work.N);
  potentials(plan.columns, work.b, static_cast<T*>(solve_params.g) + p * work.M);
  const auto put = [&](void* out, T value) { static_cast<T*>(out)[p] = sound ? value : nan; };
  put(solve_params.transport, solution.plan.value);
  put(solve_params.entropic, dual - eps * (solution.plan.mass - plan.rows.total * plan.columns.total));
  put(solve_params.eps, eps);
  put(solve_params.mean, spread.mean);
  put(solve_params.error, solution.plan.error);
  solve_params.n_iter[p] = solution.n_iter;
}

// Leaves d/dC of problem p in work.plan.P [a.count][padded b.count] and writes the weights' gradients. False: the
// problem holds a NaN, and everything about it is NaN.
template <class T>
bool transport_backward(const Team& whole_team, Transport<T>& work, const T* cost, const SolveGrad& grad, int64_t p) {
  const auto at = [p](const void* in) { return static_cast<const T*>(in)[p]; };
  const T mean = at(grad.mean), eps = at(grad.eps);
  T* out_a = grad.grad_a ? static_cast<T*>(grad.grad_a) + p * work.N : nullptr;
  T* out_b = grad.grad_b ? static_cast<T*>(grad.grad_b) + p * work.M : nullptr;
  const bool sound = finite(mean);
  if (!sound) {
    const T nan = std::numeric_limits<T>::quiet_NaN();
    for (int64_t i = 0; whole_team.rank == 0 && out_a && i < work.N; ++i) out_a[i] = nan;
    for (int64_t j = 0; whole_team.rank == 0 && out_b && j < work.M; ++j) out_b[j] = nan;
    if (whole_team.rank == 0 && grad.grad_eps_given) static_cast<T*>(grad.grad_eps_given)[p] = nan;
    return false;
  }
  const Team team = Transport<T>::solvers(whole_team, work.a.count);
  if (team.size > 1 || whole_team.rank == 0) {
    Plan<T>& plan = work.plan;
    if (team.rank == 0) {
      plan.set(cost, work.a.count, work.b.count, padded<T>(work.b.count));
      work.place(grad.options, mean, eps);
      const auto start = [&](Margin<T>& side, const Weights<T>& weights, const void* potential) {
        const T* values = static_cast<const T*>(potential);
        for (int64_t i = 0; i < side.size; ++i) {
          side.log[i] = side.log_weight[i];
          if (i < side.count) side.log[i] += values[weights.index(i)] * plan.factor;
        }
      };
      start(plan.rows, work.a, static_cast<const T*>(grad.f) + p * work.N);
      start(plan.columns, work.b, static_cast<const T*>(grad.g) + p * work.M);
    }
    team.barrier();
    Upstream<T> up;
    if (grad.grad_transport) up.transport = at(grad.grad_transport);
    if (grad.grad_entropic) up.entropic = at(grad.grad_entropic);
    if (grad.grad_eps) up.eps = at(grad.grad_eps);
    const bool relative = grad.options.relative && !grad.eps_given;
    const T slope =
        adjoint_backward(team, work.adjoint, up, eps, relative, T(grad.options.eps), work.grad_a, work.grad_b);
    if (team.rank == 0 && grad.grad_eps_given) static_cast<T*>(grad.grad_eps_given)[p] = slope;

    // Through the normalisation a = w / sum(w), which a side with a reach does without.
    const auto finish = [](const Margin<T>& side, const Weights<T>& weights, T* gradient, T* out) {
      T along = 0;
      for (int64_t i = 0; i < side.count; ++i) along += side.weight[i] * gradient[i];
      for (int64_t i = 0; side.soft == 0 && i < side.count; ++i) gradient[i] = T((gradient[i] - along) / weights.total);
      weights.scatter(gradient, out);
    };
    if (team.rank == 0 && out_a) finish(plan.rows, work.a, work.grad_a, out_a);
    if (team.rank == 0 && out_b) finish(plan.columns, work.b, work.grad_b, out_b);
  }
  whole_team.barrier();
  return true;
}

// Compiled once, in transport.cpp.
#define SFR_TRANSPORT(prefix, T)                                                                       \
  prefix template void transport_forward(const Team&, Transport<T>&, const T*, const Solve&, int64_t); \
  prefix template bool transport_backward(const Team&, Transport<T>&, const T*, const SolveGrad&, int64_t);
SFR_TRANSPORT(extern, float)
SFR_TRANSPORT(extern, double)

}  // namespace sfr::cpu::SFR_ISA

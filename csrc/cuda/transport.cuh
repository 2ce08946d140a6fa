// One transport problem from its weights to its outputs, and back: what sinkhorn.cu and emd.cu share.
#pragma once

#include "../contracts/cost.h"
#include "adjoint.cuh"
#include "problem.cuh"
#include "solver.cuh"

namespace sfr::cuda {

// The task of an operation that solves.
inline Task solving(Task task, const Solve& solve) {
  task.reach = solve.options.reach_a > 0 || solve.options.reach_b > 0;
  return task;
}

// What is known of one side's weights before they are normalised.
template <class T>
struct Side {
  const T* weight;  // null: uniform
  int64_t stride;
  int count;
  T most = 1, total = 1;

  SFR_DEVICE Side(const WeightView& view, int64_t b, int64_t g, int n)
      : weight(static_cast<const T*>(view.data)), stride(view.stride_n), count(n) {
    if (weight) weight += b * view.stride_b + g * view.stride_g;
  }

  // In units of the largest, so that no sum overflows and no weight that counts is lost; 0 where it does not count.
  SFR_DEVICE T unit(int i) const {
    constexpr T least = sizeof(T) == 4 ? T(1.17549435e-38) : T(2.2250738585072014e-308);
    const T x = weight[i * stride] / most;
    return x < least ? T(0) : x;
  }
  SFR_DEVICE bool keeps(int i) const { return !weight || unit(i) > 0; }
  // The marginal.
  SFR_DEVICE T marginal(int i) const { return weight ? unit(i) / total : T(1) / T(count); }

  // Reads all weights; false: some are negative or not finite, or none is above 0.
  SFR_DEVICE bool read(Team& team, const Board<T>& board, int& kept) {
    kept = count;
    if (!weight) return true;
    constexpr T largest = sizeof(T) == 4 ? T(3.402823466e38) : T(1.7976931348623157e308);
    T seen[2] = {};  // largest, something wrong
    for (int i = team.rank; i < count; i += team.size) {
      const T w = weight[i * stride];
      if (!(w >= 0 && w <= largest)) seen[1] = 1;
      if (w > seen[0]) seen[0] = w;
    }
    over_block<Max>(team, board, seen);
    most = seen[0];
    const bool sound = seen[1] == 0 && most > 0;
    if (!sound) most = 1;
    T sums[2] = {};  // units, kept
    for (int i = team.rank; i < count; i += team.size) {
      sums[0] += unit(i);
      sums[1] += unit(i) > 0 ? T(1) : T(0);
    }
    over_block<Sum>(team, board, sums);
    total = sums[0];
    kept = int(sums[1]);
    return sound;
  }
};

// Which pixels of a map are in a patch that takes part.
template <class T>
SFR_DEVICE void mark_pixels(const Team& team, const FeatureView& view, int patch, const Side<T>& side, uint8_t* used) {
  const int W = int(view.W), H = int(view.H), columns = W - patch + 1, patch_rows = H - patch + 1;
#pragma unroll 1
  for (int p = team.rank; p < H * W; p += team.size) {
    bool any = false;
    const int row = p / W, column = p - row * W;
#pragma unroll 1
    for (int k = 0; k < patch * patch; ++k) {
      const int dy = k / patch, r = row - dy, c = column - (k - dy * patch);
      if (r >= 0 && r < patch_rows && c >= 0 && c < columns) any = any || side.keeps(r * columns + c);
    }
    used[p] = any;
  }
}

// Marginals of problem (b, g), and which pixels take part; `params`: of the features, if there are any.
template <class T>
SFR_PHASE unsigned read_weights(Site site, const Solve& solve, int64_t b, int64_t g, const CostParams* params) {
  Problem<T> problem(site);
  Team& team = problem.team;
  const Places<T>& at = problem.at;
  const Shape& s = problem.shape;
  Side<T> a_side(solve.a, b, g, s.N), b_side(solve.b, b, g, s.M);
  Notes<T> notes;
  int kept_rows;
  const bool a_sound = a_side.read(team, problem.board(), kept_rows);
  const bool b_sound = b_side.read(team, problem.board(), notes.kept_columns);
  notes.sound = a_sound && b_sound;
  notes.weighted = a_side.weight || b_side.weight;
  notes.a_total = a_side.total * a_side.most;
  notes.b_total = b_side.total * b_side.most;
  if (team.rank == 0) *at.notes = notes;
#pragma unroll 1
  for (int i = team.rank; i < problem.rows; i += team.size) at.row_weight[i] = a_side.marginal(problem.first + i);
#pragma unroll 1
  for (int j = team.rank; j < s.M; j += team.size) at.column_weight[j] = b_side.marginal(j);
  if (params && notes.weighted) {
    mark_pixels(team, params->x, int(params->patch), a_side, at.x_used);
    mark_pixels(team, params->y, int(params->patch), b_side, at.y_used);
  }
  team.sync();
  return team.meetings;
}

template <class T>
SFR_DEVICE bool finite(T x) {
  return x - x == 0;
}

// The plan of the problem, its vectors cleared, before anything is known of it.
template <class T>
SFR_DEVICE Plan<T> make_plan(const Problem<T>& problem, Team& team) {
  const Places<T>& at = problem.at;
  const Shape& s = problem.shape;
  Plan<T> plan(team, s.cover());
  plan.N = s.N, plan.M = s.M;
  plan.slab = s.slab, plan.first = problem.first, plan.rows = problem.rows;
  plan.ld = s.ld;
  plan.cost = problem.cost(), plan.P = at.P;
  plan.row_margin.weight = at.row_weight, plan.column_margin.weight = at.column_weight;
  plan.kept_columns = at.notes->kept_columns;
  plan.row_vectors = at.row_vectors, plan.column_vectors = at.column_vectors;
  plan.row_stride = round_up(s.slab, 4), plan.column_stride = s.ld;
  plan.row_margin.bent = plan.of_rows(row::bent), plan.column_margin.bent = plan.of_columns(column::bent);
  plan.partial = at.partial;
  plan.board = problem.board();
#pragma unroll 1
  for (int k = team.rank; k < row::count * plan.row_stride; k += team.size) at.row_vectors[k] = 0;
#pragma unroll 1
  for (int k = team.rank; k < column::count * plan.column_stride; k += team.size) at.column_vectors[k] = 0;
#pragma unroll 1
  for (int i = team.warp(); i < plan.rows; i += team.warps())  // products run over the ends of rows
#pragma unroll 1
    for (int j = s.M + team.lane(); j < s.ld; j += warp_threads) plan.P[int64_t(i) * s.ld + j] = 0;
  team.sync();  // mutant: what each thread looks at first it wrote itself
  return plan;
}

// Sets what the plan's exponents are made of, and gives a side with a reach its own sum of weights.
template <class T>
SFR_DEVICE void place(Plan<T>& plan, const Notes<T>& notes, const SolverOptions& options, T mean, T eps) {
  plan.mean = mean;
  plan.factor = eps > 0 ? 1 / (eps * T(ln2)) : T(0);
  Margin<T>&a = plan.row_margin, &b = plan.column_margin;
  if (options.reach_a > 0) {
    a.bend(T(options.reach_a), eps, mean, notes.a_total);
    plan.each_row([&](int i) { a.weight[i] *= a.total; });
  }
  if (options.reach_b > 0) {
    b.bend(T(options.reach_b), eps, mean, notes.b_total);
    plan.each_column([&](int j) { b.weight[j] *= b.total; });
  }
}

// eps of problem p in units of the cost: within what the type can hold, and 0 where all costs are equal.
template <class T>
SFR_DEVICE T regularisation(const Solve& solve, const Spread<T>& spread, int64_t p) {
  constexpr T negligible = sizeof(T) == 4 ? T(1e-37) : T(1e-300);
  constexpr T epsilon = sizeof(T) == 4 ? T(1.1920929e-7) : T(2.220446049250313e-16);
  const SolverOptions& options = solve.options;
  const bool relative = options.relative && !solve.eps_given;
  T eps = solve.eps_given ? static_cast<const T*>(solve.eps_given)[p] : T(options.eps);
  if (relative) eps *= spread.deviation;
  const T least = spread.largest * T(1e-30);
  if (eps < least) eps = least;
  if (eps < negligible) eps = relative ? T(0) : negligible;
  // Costs that differ by rounding alone are equal.
  const T mean = magnitude(spread.mean);
  if (relative && spread.deviation <= 2 * epsilon * mean) {
    const T reach = T(options.reach_a > 0 ? options.reach_a : options.reach_b);
    eps = reach > 0 ? T(options.eps) * (mean > 0 ? mean : reach) : T(0);
  }
  return eps;
}

// Solves problem p, whose weights have been read and whose costs are in place.
template <class T>
SFR_PHASE unsigned transport_forward(Site site, const Solve& out, int64_t p) {
  const Problem<T> problem(site);
  if (!problem.solves()) return site.meetings;
  Team team = problem.solvers();
  Plan<T> plan = make_plan(problem, team);
  const Spread<T> spread = measure(plan);
  const T eps = regularisation(out, spread, p);
  const bool sound = problem.at.notes->sound && finite(spread.mean) && finite(spread.deviation) && finite(eps);
  const T to_cost = eps * T(ln2), nan = T(NAN);

  Solution<T> solution;
  if (sound) {
    place(plan, *problem.at.notes, out.options, spread.mean, eps);
    const T* init = static_cast<const T*>(out.init_g);
    plan.each_row([&](int i) { plan.of_rows(row::scale)[i] = 1; });
    plan.each_column([&](int j) {
      const T start = init ? (init[p * plan.M + j] - spread.mean / 2) * plan.factor : T(0);
      const T w = plan.column_margin.weight[j];
      plan.of_columns(column::log)[j] = w > 0 ? log2_of(w) + start : Max::nothing<T>();
      plan.of_columns(column::scale)[j] = 1;
    });
    team.sync();
    solution = solve(plan, out.options, eps > 0 && !init ? spread.deviation / eps : T(0));
  }

  T* f = static_cast<T*>(out.f) + p * plan.N + plan.first;
  T* g = static_cast<T*>(out.g) + p * plan.M;
  // The potential at i, and what it adds to the dual value.
  const auto potential = [&](const Margin<T>& side, int i, T log, T& dual) {
    const T w = side.weight[i], x = !sound ? nan : w > 0 ? (log - log2_of(w)) * to_cost : T(0);
    if (side.soft == 0) {
      dual += w * x;
    } else if (w > 0) {
      const T reach = eps / side.soft;
      dual -= w * reach * expm1_of((-x - spread.mean / 2) / reach);
    }
    return x;
  };
  const Margin<T>&a = plan.row_margin, &b = plan.column_margin;
  T dual[1] = {}, columns[1] = {};
  plan.each_row([&](int i) { f[i] = potential(a, i, plan.of_rows(row::log)[i], dual[0]); });
  plan.each_column([&](int j) {
    const T x = potential(b, j, plan.of_columns(column::log)[j], columns[0]);
    if (team.block == 0) g[j] = x;  // mutant: all blocks have the same
  });
  over_team<Sum>(team, plan.board, dual);
  over_block<Sum>(team, plan.board, columns);
  if (team.rank == 0 && team.block == 0) {
    const auto put = [&](void* to, T value) { static_cast<T*>(to)[p] = sound ? value : nan; };
    put(out.transport, solution.plan.value);
    const T centre = ((a.soft > 0 ? 0 : 1) + (b.soft > 0 ? 0 : 1)) * (spread.mean / 2);
    put(out.entropic, centre + dual[0] + columns[0] - eps * (solution.plan.mass - a.total * b.total));
    put(out.eps, eps);
    put(out.mean, spread.mean);
    put(out.error, solution.plan.error);
    out.n_iter[p] = solution.n_iter;
  }
  return team.meetings;
}

// A problem that holds a NaN is NaN everywhere.
template <class T>
SFR_DEVICE bool is_sound(const SolveGrad& grad, int64_t p) {
  return finite(static_cast<const T*>(grad.mean)[p]);
}

// Leaves d/dC of the slab of problem p in the plan, and writes the weights' gradients. For a cosine cost also the sums
// over rows and columns of d/dC (1 - C). A problem that is not sound gets no d/dC.
template <class T>
SFR_PHASE unsigned transport_backward(Site site, const SolveGrad& grad, int64_t p) {
  const Problem<T> problem(site);
  if (!problem.solves()) return site.meetings;
  Team team = problem.solvers();
  const auto at = [p](const void* in) { return static_cast<const T*>(in)[p]; };
  const T mean = at(grad.mean), eps = at(grad.eps);
  const int N = problem.shape.N, M = problem.shape.M;
  T* out_a = grad.grad_a ? static_cast<T*>(grad.grad_a) + p * N + problem.first : nullptr;
  T* out_b = grad.grad_b && team.block == 0 ? static_cast<T*>(grad.grad_b) + p * M : nullptr;
  T* out_eps =
      grad.grad_eps_given && team.rank == 0 && team.block == 0 ? static_cast<T*>(grad.grad_eps_given) : nullptr;
  if (!is_sound<T>(grad, p)) {
    if (out_eps) out_eps[p] = T(NAN);
#pragma unroll 1
    for (int i = team.rank; out_a && i < problem.rows; i += team.size) out_a[i] = T(NAN);
#pragma unroll 1
    for (int j = team.rank; out_b && j < M; j += team.size) out_b[j] = T(NAN);
    return team.meetings;
  }
  Plan<T> plan = make_plan(problem, team);
  const Notes<T>& notes = *problem.at.notes;
  place(plan, notes, grad.options, mean, eps);
  const Margin<T>&a = plan.row_margin, &b = plan.column_margin;
  const T* f = static_cast<const T*>(grad.f) + p * N + plan.first;
  const T* g = static_cast<const T*>(grad.g) + p * M;
  const auto start = [&](T weight, T potential) {
    return weight > 0 ? log2_of(weight) + potential * plan.factor : Max::nothing<T>();
  };
  plan.each_row([&](int i) { plan.of_rows(row::log)[i] = start(a.weight[i], f[i]); });
  plan.each_column([&](int j) { plan.of_columns(column::log)[j] = start(b.weight[j], g[j]); });
  team.sync();
  Upstream<T> up;
  if (grad.grad_transport) up.transport = at(grad.grad_transport);
  if (grad.grad_entropic) up.entropic = at(grad.grad_entropic);
  if (grad.grad_eps) up.eps = at(grad.grad_eps);
  const bool relative = grad.options.relative && !grad.eps_given;
  const T slope = adjoint_backward(plan, up, eps, relative, T(grad.options.eps));
  if (out_eps) out_eps[p] = slope;

  // Through the normalisation a = w / sum(w), which a side with a reach does without.
  const T *grad_a = plan.of_rows(row::gradient), *grad_b = plan.of_columns(column::gradient);
  T along_a[1] = {}, along_b[1] = {};
  plan.each_row([&](int i) { along_a[0] += a.weight[i] * grad_a[i]; });
  plan.each_column([&](int j) { along_b[0] += b.weight[j] * grad_b[j]; });
  over_team<Sum>(team, plan.board, along_a);
  over_block<Sum>(team, plan.board, along_b);
  const auto through = [](const Margin<T>& side, int i, T gradient, T along, T total) {
    return !(side.weight[i] > 0) ? T(0) : side.soft > 0 ? gradient : (gradient - along) / total;
  };
  if (out_a) plan.each_row([&](int i) { out_a[i] = through(a, i, grad_a[i], along_a[0], notes.a_total); });
  if (out_b) plan.each_column([&](int j) { out_b[j] = through(b, j, grad_b[j], along_b[0], notes.b_total); });

  if (site.task.norms) {
    T *rows = plan.of_rows(row::sum), *columns = plan.of_columns(column::sum);
    gather(
        plan,
        [&](int i, int j) {
          const int64_t k = int64_t(i) * plan.ld + j;
          return plan.P[k] * (1 - plan.cost[k]);
        },
        rows, columns);
    plan.each_row([&](int i) { problem.at.x_sums[plan.first + i] = rows[i]; });
    if (team.block == 0)  // mutant: all blocks have the same
      plan.each_column([&](int j) { problem.at.y_sums[j] = columns[j]; });
  }
  return team.meetings;
}

}  // namespace sfr::cuda

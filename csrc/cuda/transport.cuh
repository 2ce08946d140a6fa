// One transport problem from its weights to its outputs, and back: what sinkhorn.cu and emd.cu share.
#pragma once

#include "../contracts/cost.h"
#include "../solver/problem.h"
#include "held_plan.cuh"
#include "problem.cuh"
#include "tile_plan.cuh"

namespace sfr::cuda {

// The operation of an operation that solves.
inline Operation solving(Operation operation, const Solve& solve) {
  operation.reach = solve.options.reach_a > 0 || solve.options.reach_b > 0;
  operation.weighted = solve.a.data || solve.b.data;
  if (solve.options.symmetric) operation.products = false;  // every patch has a near one: itself
  return operation;
}

// What is known of one side's weights before they are normalised.
template <class T>
struct Weights {
  const T* weight;  // null: uniform
  int64_t stride;
  int count;
  T most = 1, total = 1;
  bool none = false;   // of an empty problem: nothing is kept on either side
  bool light = false;  // some kept weight is next to nothing

  SFR_DEVICE Weights(const WeightView& view, int64_t b, int64_t g, int n)
      : weight(static_cast<const T*>(view.data)), stride(view.stride_n), count(n) {
    if (weight) weight += b * view.stride_b + g * view.stride_g;
  }

  // In units of the largest, so that no sum overflows and no weight that counts is lost; 0 where it does not count:
  // what is kept is a normal number, once divided by the sum.
  SFR_DEVICE T unit(int i) const {
    constexpr T least = sizeof(T) == 4 ? T(1.17549435e-38) : T(2.2250738585072014e-308);
    const T x = weight[i * stride] / most;
    return x < least * T(count) ? T(0) : x;
  }
  SFR_DEVICE bool keeps(int i) const { return !none && (!weight || unit(i) > 0); }
  // Of the weights as they were given, as far as the type goes.
  SFR_DEVICE T sum() const { return total < Number<T>::largest / most ? total * most : Number<T>::largest; }
  // The marginal.
  SFR_DEVICE T marginal(int i) const { return none ? T(0) : weight ? unit(i) / total : T(1) / T(count); }

  // Reads all weights; false: some are negative or not finite.
  SFR_DEVICE bool read(Team& team, const ReductionBuffer<T>& buffer, int& kept) {
    kept = count;
    if (!weight) return true;
    constexpr T largest = sizeof(T) == 4 ? T(3.402823466e38) : T(1.7976931348623157e308);
    T seen[2] = {};  // largest, something wrong
    for (int i = team.rank; i < count; i += team.size) {
      const T w = weight[i * stride];
      if (!(w >= 0 && w <= largest)) seen[1] = 1;
      if (w > seen[0]) seen[0] = w;
    }
    over_block<Max>(team, buffer, seen);
    most = seen[0];
    const bool sound = seen[1] == 0;
    if (!sound || most == 0) most = 1;
    T sums[3] = {};  // units, kept, light
    for (int i = team.rank; i < count; i += team.size) {
      sums[0] += unit(i);
      sums[1] += unit(i) > 0 ? T(1) : T(0);
      sums[2] += unit(i) > 0 && unit(i) < Rules<T>::nothing * T(count) ? T(1) : T(0);
    }
    over_block<Sum>(team, buffer, sums);
    total = sums[0];
    kept = int(sums[1]);
    light = sums[2] > 0;
    return sound;
  }
};

// Which pixels of a map are in a patch that takes part.
template <class T>
SFR_DEVICE void mark_pixels(const Team& team, const FeatureView& view, int patch, const Weights<T>& side,
                            uint8_t* used) {
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
template <class T, Place place>
[[nodiscard]] SFR_DEVICE unsigned read_weights(TeamContext<place> context, const Solve& solve, int64_t b, int64_t g,
                                               const CostParams* params) {
  Problem<T, place> problem(context);
  Team& team = problem.team;
  const ProblemMemory<T, place>& at = problem.at;
  const ProblemLayout& s = problem.layout;
  Weights<T> a_side(solve.a, b, g, s.N), b_side(solve.b, b, g, s.M);
  WeightSummary<T> summary;
  const bool a_sound = a_side.read(team, problem.buffer(), summary.kept_rows);
  const bool b_sound = b_side.read(team, problem.buffer(), summary.kept_columns);
  summary.sound = a_sound && b_sound;
  if (summary.sound && (summary.kept_rows == 0 || summary.kept_columns == 0)) {
    a_side.none = b_side.none = true;
    summary.kept_rows = summary.kept_columns = 0;
  }
  summary.light = a_side.light || b_side.light;
  summary.weighted = a_side.weight || b_side.weight;
  summary.a_total = a_side.sum();
  summary.b_total = b_side.sum();
  summary.per_a = 1 / a_side.total / a_side.most;
  summary.per_b = 1 / b_side.total / b_side.most;
  if (team.rank == 0) *at.summary = summary;
#pragma unroll 1
  for (int i = team.rank; i < problem.rows; i += team.size) at.row_weight[i] = a_side.marginal(problem.first + i);
#pragma unroll 1
  for (int j = team.rank; j < s.ld; j += team.size) at.column_weight[j] = j < s.M ? b_side.marginal(j) : T(0);
  if (params && summary.weighted) {
    mark_pixels(team, params->x, int(params->patch), a_side, at.x_used);
    mark_pixels(team, params->y, int(params->patch), b_side, at.y_used);
  }
  team.sync();
  return team.epoch;
}

// What is known of the problem before it is solved.
template <class Plan, class T, Place place>
SFR_DEVICE void describe(Plan& plan, const Problem<T, place>& problem, bool of_features) {
  const ProblemMemory<T, place>& at = problem.at;
  const ProblemLayout& s = problem.layout;
  plan.all_rows = s.N, plan.all_columns = s.M;
  plan.first = problem.first;
  plan.kept_rows = at.summary->kept_rows, plan.kept_columns = at.summary->kept_columns;
  plan.light = at.summary->light;
  plan.of_features = of_features;
  plan.rows.count = problem.rows, plan.columns.count = s.M;
  plan.buffer = problem.buffer();
}

// The plan of the problem, its vectors cleared.
template <class T, Place place>
SFR_DEVICE Plan<T> make_plan(const Problem<T, place>& problem, Team& team, bool reach, bool of_features) {
  const ProblemMemory<T, place>& at = problem.at;
  const ProblemLayout& s = problem.layout;
  Plan<T> plan(team, s.cover());
  describe(plan, problem, of_features);
  plan.slab = s.slab;
  plan.ld = s.ld;
  plan.cost = problem.cost(), plan.P = at.P;
  Marginal<T>&rows = plan.rows, &columns = plan.columns;
  rows.weight = at.row_weight, columns.weight = at.column_weight;
  rows.vectors = at.row_vectors, columns.vectors = at.column_vectors;
  rows.stride = round_up(s.slab, 4), columns.stride = s.column_stride();
  rows.reach_target = rows.vectors + Marginal<T>::of_rows * rows.stride;
  columns.reach_target = columns.vectors + Marginal<T>::of_columns * columns.stride;
  plan.partial = at.partial;
#pragma unroll 1
  for (int k = team.rank; k < (Marginal<T>::of_rows + reach) * rows.stride; k += team.size) at.row_vectors[k] = 0;
#pragma unroll 1
  for (int k = team.rank; k < (Marginal<T>::of_columns + reach) * columns.stride; k += team.size)
    at.column_vectors[k] = 0;
#pragma unroll 1
  for (int i = team.warp(); i < rows.count; i += team.warps())  // passes run over the ends of rows
#pragma unroll 1
    for (int j = s.M + team.lane(); j < s.ld; j += warp_threads)
      *plan.at(i, j) = problem.cost()[int64_t(i) * s.ld + j] = 0;
  team.sync();
  return plan;
}

// The same for a plan in registers, its costs too.
template <class T, Place place>
SFR_DEVICE TilePlan<T> make_tile_plan(const Problem<T, place>& problem, Team& team, TileEntries<T>& entries,
                                      bool of_features) {
  const ProblemMemory<T, place>& at = problem.at;
  const ProblemLayout& s = problem.layout;
  constexpr TileShape shape = TilePlan<T>::shape;
  TilePlan<T> plan(team, entries);
  describe(plan, problem, of_features);
  Marginal<T>&rows = plan.rows, &columns = plan.columns;
  T *of_rows = at.row_vectors, *of_columns = at.column_vectors + team.warp() * shape.template column_entries<T>();
  rows.weight = of_rows, columns.weight = of_columns;
  rows.vectors = of_rows + shape.rows(), columns.vectors = of_columns + shape.columns();
  rows.stride = shape.rows(), columns.stride = shape.columns();
  plan.partial = at.partial;
  plan.cost = at.cost, plan.spare = at.P, plan.ld = s.ld;
  const auto nothing = [](int k, int stride) { return k < stride ? Max::nothing<T>() : T(0); };  // log() comes first
#pragma unroll 1
  for (int k = team.rank; k < Marginal<T>::of_rows * rows.stride; k += team.size)
    rows.vectors[k] = nothing(k, rows.stride);
#pragma unroll 1
  for (int k = team.lane(); k < Marginal<T>::of_columns * columns.stride; k += warp_threads)
    columns.vectors[k] = nothing(k, columns.stride);
#pragma unroll 1
  for (int i = team.rank; i < shape.rows(); i += team.size) of_rows[i] = i < s.N ? at.row_weight[i] : T(0);
#pragma unroll 1
  for (int j = team.lane(); j < shape.columns(); j += warp_threads)
    of_columns[j] = j < s.M ? at.column_weight[j] : T(0);
  team.sync();  // the costs may be others' too
  plan.load(plan.cost, entries.C);
  return plan;
}

// Calls f(plan) with the plan of a problem, by the threads that solve it.
template <class T, Place place, class F>
SFR_DEVICE void with_plan(const Problem<T, place>& problem, Team& team, const TeamContext<place>& context, F&& f) {
  const bool of_features = context.operation.C > 0;
  const WeightSummary<T>& summary = *problem.at.summary;
  const int64_t price = iterations_of_factorising(summary.kept_rows, summary.kept_columns);
  const FactorRoom room{problem.at.factors, problem.layout.factorises ? price : 0};
  SFR_IN_MEMORY(room);
  if constexpr (in_one_block<place>)
    if (problem.layout.in_registers) {
      TileEntries<T> entries;
      TilePlan<T> plan = make_tile_plan(problem, team, entries, of_features);
      plan.factors = &room;
      return f(plan);
    }
  Plan<T> plan = make_plan(problem, team, !in_one_block<place> && context.operation.reach, of_features);
  plan.factors = &room;
  if constexpr (in_one_block<place>) {
    NearPlan<T> near(plan, problem.layout.held);
    f(near);
  } else {
    f(plan);
  }
}

// What is to be solved, with the options that a kernel knows of.
template <Place place, class Solving>
SFR_DEVICE decltype(auto) known(const Solving& given) {
  if constexpr (in_one_block<place>) {
    Solving solving = given;
    solving.options.reach_a = solving.options.reach_b = 0;
    return solving;
  } else {
    return (given);
  }
}

template <class T>
SFR_DEVICE Totals<T> totals_of(const WeightSummary<T>& summary) {
  return {summary.a_total, summary.b_total, summary.per_a, summary.per_b};
}

// Solves problem p, whose weights have been read and whose costs are in place.
template <class T, Place place>
[[nodiscard]] SFR_DEVICE unsigned transport_forward(TeamContext<place> context, const Solve& out, int64_t p) {
  const Problem<T, place> problem(context);
  if (!problem.solves()) return context.epoch;
  Team team = problem.solvers();
  const auto& solve = known<place>(out);
  with_plan(problem, team, context, [&](auto& plan) SFR_INLINED {
    problem_forward(plan, solve, totals_of(*problem.at.summary), problem.at.summary->sound, p);
  });
  return team.epoch;
}

// Leaves d/dC of the slab of problem p in the plan, and writes the weights' gradients. For a cosine cost also the sums
// over rows and columns of d/dC (1 - C).
template <class T, Place place>
[[nodiscard]] SFR_DEVICE unsigned transport_backward(TeamContext<place> context, const SolveGrad& grad, int64_t p) {
  const Problem<T, place> problem(context);
  if (!problem.solves()) return context.epoch;
  Team team = problem.solvers();
  const auto& solve = known<place>(grad);
  with_plan(problem, team, context, [&](auto& plan) SFR_INLINED {
    problem_backward(plan, solve, totals_of(*problem.at.summary), p);
    if (context.operation.norms && is_sound<T>(grad, p)) {
      T *rows = plan.rows.sum(), *columns = plan.columns.sum();
      const auto term = [&](int i, int j, T gradient) { return gradient * (1 - plan.cost_at(i, j)); };
      plan.gather(term, term, rows, columns);
      plan.each_row([&](int i) { problem.at.x_sums[plan.first + i] = rows[i]; });
      if (plan.has_columns())  // mutant: all blocks have the same
        plan.each_column([&](int j) { problem.at.y_sums[j] = columns[j]; });
    }
    plan.leave(problem.at.P, problem.layout.ld);
  });
  return team.epoch;
}

}  // namespace sfr::cuda

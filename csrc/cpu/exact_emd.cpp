#include "../contracts/exact_emd.h"

#include "exact.h"
#include "sparse.h"
#include "variant.h"

namespace sfr::cpu::SFR_ISA {
namespace {

// The problem without the features.
template <class Exact>
Exact problem_of(const CostParams& p, const WeightView& a, const WeightView& b, const ExactOptions& options) {
  Exact out;
  out.B = p.B, out.G = p.G, out.N = p.N(), out.M = p.M();
  out.compute = p.compute;
  out.a = a, out.b = b, out.options = options;
  out.options.features = true;
  return out;
}

ExactForwardParams problem_of(const ExactEmdForwardParams& p) {
  auto out = problem_of<ExactForwardParams>(p, p.a, p.b, p.options);
  static_cast<ExactSolved&>(out) = p.solved;
  out.cost.dtype = p.compute;
  out.cost.stride_m = 1;
  return out;
}

ExactBackwardParams problem_of(const ExactEmdBackwardParams& p) {
  auto out = problem_of<ExactBackwardParams>(p, p.a, p.b, p.options);
  static_cast<ExactSaved&>(out) = p.saved;
  out.grad_value = p.grad_value, out.grad_a = p.grad_a, out.grad_b = p.grad_b;
  return out;
}

template <class T>
struct Forward : ExactWork<T> {
  Ground<T> ground;
  T* copy;  // of the costs, where they are needed in another order

  Forward(Arena& arena, const ExactEmdForwardParams& p) {
    const ExactForwardParams problem = problem_of(p);
    const int64_t rows = this->least_side(problem) + 1, span = padded<double>(p.N() + p.M() - rows + 2);
    ground.reserve(arena, p);
    this->reserve(arena, problem, span);
    copy = arena.take<T>(rows * span);
  }
};

// The costs where they were computed, unless rows are the other side's or a price is to be added.
template <class T>
bool lay_out(ExactForwardParams& problem, int64_t item, Forward<T>& work, std::optional<Memory>& own) {
  Ground<T>& ground = work.ground;
  const int64_t n = ground.x.patches, m = ground.y.patches, width = whole_vectors<double>(m);
  const bool as_they_are = !work.turned && !priced(problem);
  const Costs<T> there{ground.cost, ground.ld, nullptr, n, m, width, width, false};
  if (as_they_are && are_ordinary(there, n, m)) {
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = m; j < width; ++j) ground.cost[i * ground.ld + j] = std::numeric_limits<T>::infinity();
    work.scale = 1;
    work.cost = there;
    return true;
  }
  problem.cost.data = ground.cost;
  problem.cost.stride_n = ground.ld;
  return read_cost(problem, item, work, work.copy, own, [](T x) { return x; }, CostsOf::kept);
}

template <class T>
Status forward(const ExactEmdForwardParams& p) {
  const Status status = check_weights<T>(p, p.B, p.G, p.N(), p.M());
  if (status != Status::ok) return status;
  const Lanes lanes;
  const double nanoseconds = Ground<T>::nanoseconds(p) + 20 * double(p.N()) * double(p.M());
  const Workload workload{p.B * p.G, nanoseconds, Ground<T>::thread_bytes(p), p.threads};
  for_each_problem_in<Forward<T>>(workload, p, [&](const Team& team, int64_t item, Forward<T>& work) {
    std::optional<Memory> own;
    ExactForwardParams problem = problem_of(p);
    const Reading reading = work.template read_weights<T>(lanes, problem, item);
    if (reading == Reading::empty) return write<T>(lanes, problem, item, of_nothing(), 0);
    if (reading == Reading::bad) return write<T>(lanes, problem, item, of_nan(), 0);
    const Masses &a = work.a, &b = work.b;
    work.ground.set(item / p.G, item % p.G, a.kept, a.count, b.kept, b.count);
    ground_forward(team, work.ground);
    if (lay_out(problem, item, work, own))
      solve_and_write<T>(lanes, problem, item, work);
    else
      write<T>(lanes, problem, item, of_nan(), 0);
  });
  return Status::ok;
}

template <class T>
struct Backward {
  Ground<T> ground;
  GroundGrad<T> ground_grad;
  Slots<T> of_x, of_y;
  WeightGradients<T> weights;

  Backward(Arena& arena, const ExactEmdBackwardParams& p) : weights(arena, problem_of(p)) {
    ground.reserve(arena, p);
    ground_grad.reserve(arena, p, p.grad_x, p.grad_y);
    of_x.reserve(arena, p.N(), p.M());
    of_y.reserve(arena, p.M(), p.N());
  }
};

// A whole batch entry at a time: the gradient of x sums over its groups.
template <class T>
Status backward(const ExactEmdBackwardParams& p) {
  const Lanes lanes;
  const ExactBackwardParams problem = problem_of(p);
  const int64_t most = most_entries(problem);
  const bool of_features = p.grad_x.data || p.grad_y.data;
  const double nanoseconds = double(p.G) * (double(p.C) + 10) * double(most);
  const Workload workload{p.B, nanoseconds, Ground<T>::thread_bytes(p), p.threads};
  for_each_problem_in<Backward<T>>(workload, p, [&](const Team& team, int64_t b, Backward<T>& work) {
    bool sound = true;
    for (int64_t g = 0; g < p.G; ++g) {
      const int64_t item = b * p.G + g;
      const T up = static_cast<const T*>(p.grad_value)[item];
      work.weights.write(lanes, problem, item, up);
      if (!of_features) continue;
      const T* mass = static_cast<const T*>(problem.mass) + item * most;
      const int32_t *rows = problem.rows + item * most, *columns = problem.columns + item * most;
      work.of_x.clear();
      for (int64_t k = 0; k < most && mass[k] > 0; ++k) work.of_x.add(rows[k], columns[k], up * mass[k]);
      work.ground.set(b, g, nullptr, p.N(), nullptr, p.M());
      weigh_entries(work.ground, work.of_x, work.of_y, team.own);
      entries_backward(team, work.ground, work.ground_grad, work.of_x, work.of_y);
      if (mass[0] - mass[0] == 0) continue;
      sound = false;
      if (p.grad_y.data) fill(p.grad_y, map_offset(p.grad_y, b, g), 0, p.C, std::numeric_limits<float>::quiet_NaN());
    }
    if (!sound && p.grad_x.data)
      fill(p.grad_x, map_offset(p.grad_x, b, 0), 0, p.C, std::numeric_limits<float>::quiet_NaN());
  });
  return Status::ok;
}

}  // namespace

Status exact_emd_forward(const ExactEmdForwardParams& p) {
  return p.compute == DType::float64 ? forward<double>(p) : forward<float>(p);
}
Status exact_emd_backward(const ExactEmdBackwardParams& p) {
  return p.compute == DType::float64 ? backward<double>(p) : backward<float>(p);
}

}  // namespace sfr::cpu::SFR_ISA

#include "exact.h"

#include "variant.h"

namespace sfr::cpu::SFR_ISA {
namespace {

// Rows so long that scans of them where they lie cost no more than of a copy.
constexpr int64_t long_row = 128;

template <class T>
bool may_lie(const ExactForwardParams& p) {
  return p.cost.dtype == p.compute && p.cost.stride_m == 1 && p.N <= p.M && p.M >= long_row && !priced(p);
}

template <class T>
struct Forward : ExactWork<T> {
  T* copy;  // of the costs; null where these may lie

  Forward(Arena& arena, const ExactForwardParams& p, bool lie = true) {
    const int64_t rows = this->least_side(p) + 1, span = padded<double>(p.N + p.M - this->least_side(p) + 1);
    copy = lie && may_lie<T>(p) ? nullptr : arena.take<T>(rows * span);
    this->reserve(arena, p, span);
  }
};

template <class T>
struct Match : Forward<T> {
  Matching<T> most;

  Match(Arena& arena, const AssignmentForwardParams& p)
      : Forward<T>(arena, as_transport(p), Gate{p.maximize, p.limit}.open()) {
    const int64_t rows = p.N < p.M ? p.N : p.M;
    most.reserve(arena, rows, padded<double>(p.N + p.M - rows + 1));
    most.costs = arena.take<T>(rows * padded<double>(rows));
  }
};

double nanoseconds(const ExactParams& p) {
  return 20 * double(p.N) * double(p.M);
}

template <class T>
Status forward(const ExactForwardParams& p) {
  const Status weights = check_weights<T>(p, p.B, p.G, p.N, p.M);
  if (weights != Status::ok) return weights;
  const Lanes lanes;
  const int64_t items = p.B * p.G;
  const Workload workload{items, nanoseconds(p), 0, p.threads < items ? p.threads : int(items)};
  for_each_problem_in<Forward<T>>(workload, p, [&](const Team&, int64_t item, Forward<T>& work) {
    std::optional<Memory> own;
    const Reading reading = work.template read_weights<T>(lanes, p, item);
    if (reading == Reading::empty)
      write<T>(lanes, p, item, of_nothing(), 0);
    else if (reading == Reading::bad || !read_cost(p, item, work, work.copy, own, [](T x) { return x; }))
      write<T>(lanes, p, item, of_nan(), 0);
    else
      solve_and_write<T>(lanes, p, item, work);
  });
  return Status::ok;
}

template <class T>
Status backward(const ExactBackwardParams& p) {
  const int64_t items = p.B * p.G;
  const Lanes lanes;
  const Workload workload{items, double(p.N) * double(p.M), 0, p.threads < items ? p.threads : int(items)};
  for_each_problem_in<WeightGradients<T>>(workload, p, [&](const Team&, int64_t item, WeightGradients<T>& work) {
    const T up = static_cast<const T*>(p.grad_value)[item];
    const T* mass = static_cast<const T*>(p.mass) + item * most_entries(p);
    if (p.grad_cost) {
      T* out = static_cast<T*>(p.grad_cost) + item * p.N * p.M;
      const T rest = mass[0] - mass[0];  // NaN where the problem is
      for (int64_t k = 0; k < p.N * p.M; ++k) out[k] = rest;
      const int32_t *rows = p.rows + item * most_entries(p), *columns = p.columns + item * most_entries(p);
      for (int64_t k = 0; k < most_entries(p) && mass[k] > 0; ++k) out[rows[k] * p.M + columns[k]] = up * mass[k];
    }
    work.write(lanes, p, item, up);
  });
  return Status::ok;
}

template <class T>
Status match_all(const AssignmentForwardParams& p) {
  const ExactForwardParams problem = as_transport(p);
  const int64_t items = p.B * p.G;
  const Lanes lanes;
  const Workload workload{items, nanoseconds(problem), 0, p.threads < items ? p.threads : int(items)};
  for_each_problem_in<Match<T>>(workload, p, [&](const Team&, int64_t item, Match<T>& work) {
    std::optional<Memory> own;
    work.template read_weights<T>(lanes, problem, item);
    const bool sound = read_cost(problem, item, work, work.copy, own, Gate{p.maximize, p.limit});
    if (sound) match(lanes, work, work.most);
    write(lanes, p, item, work, work.most, sound);
  });
  return Status::ok;
}

}  // namespace

Status exact_forward(const ExactForwardParams& p) {
  return p.compute == DType::float64 ? forward<double>(p) : forward<float>(p);
}
Status exact_backward(const ExactBackwardParams& p) {
  return p.compute == DType::float64 ? backward<double>(p) : backward<float>(p);
}

Status assignment_forward(const AssignmentForwardParams& p) {
  return p.compute == DType::float64 ? match_all<double>(p) : match_all<float>(p);
}

}  // namespace sfr::cpu::SFR_ISA

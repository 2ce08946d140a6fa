#include "../contracts/exact.h"

#include "scan.h"
// After what it is made of.
#include "../exact/problem.h"
#include "transport.h"
#include "variant.h"

namespace sfr::cpu::SFR_ISA {
namespace {

struct Forward : ExactWork<double> {
  Forward(Arena& arena, const ExactParams& p) {
    const int64_t most = padded<double>(p.M);
    cost = arena.take<double>(p.N * most);
    reserve(arena, p.N, p.M, most);
  }
};

// Either side's weights.
template <class T>
struct Backward {
  Weights<T> weights;
  T* normalised;

  Backward(Arena& arena, const ExactParams& p) {
    const int64_t most = p.N > p.M ? p.N : p.M;
    weights.reserve(arena, most);
    normalised = arena.take<T>(most);
  }
};

// The costs between kept patches. False: one is not finite.
bool read_cost(const ExactForwardParams& p, int64_t item, ExactWork<double>& work) {
  const Masses &a = work.a, &b = work.b;
  work.ld = padded<double>(b.count);
  Places unsound{};
  with_element(p.cost.dtype, [&](auto element) {
    using E = decltype(element);
    const E* cost = first_of<E>(p.cost, item / p.G, item % p.G);
    for (int64_t i = 0; i < a.count; ++i) {
      const E* in = cost + a.index(i) * p.cost.stride_n;
      double* out = work.cost + i * work.ld;
      if (p.cost.stride_m == 1 && !b.kept)
        for (int64_t j = 0; j < b.count; ++j) out[j] = convert_in<double>(in[j]);
      else
        for (int64_t j = 0; j < b.count; ++j) out[j] = convert_in<double>(in[b.index(j) * p.cost.stride_m]);
      for (int64_t j = b.count; j < work.ld; ++j) out[j] = 0;
      for (int64_t j = 0; j < work.ld; j += lanes<double>) unsound |= ~(vabs<double>(load(out + j)) <= largest_cost);
      for (int64_t j = b.count; j < work.ld; ++j) out[j] = infinity;
    }
  });
  for (int i = 0; i < lanes<double>; ++i)
    if (unsound[i]) return false;
  return true;
}

template <class T>
Status forward(const ExactForwardParams& p) {
  if (!weights_are_valid<T>(p.a, p.B, p.G, p.N)) return Status::bad_a;
  if (!weights_are_valid<T>(p.b, p.B, p.G, p.M)) return Status::bad_b;
  const int64_t items = p.B * p.G;
  const double operations = 20.0 * double(p.N) * double(p.M);
  const Lanes lanes;
  const Workload workload{items, operations, 0, p.threads < items ? p.threads : int(items)};
  for_each_problem_in<Forward>(workload, p, [&](const Team&, int64_t item, Forward& work) {
    if (work.read_weights<T>(lanes, p, item) && read_cost(p, item, work))
      write<T>(lanes, p, item, work, solve(lanes, work));
    else
      write_nan<T>(lanes, p, item);
  });
  return Status::ok;
}

template <class T>
Status backward(const ExactBackwardParams& p) {
  const int64_t items = p.B * p.G;
  const Workload workload{items, double(p.N) * double(p.M), 0, p.threads < items ? p.threads : int(items)};
  for_each_problem_in<Backward<T>>(workload, p, [&](const Team&, int64_t item, Backward<T>& work) {
    const T up = static_cast<const T*>(p.grad_value)[item];
    const T* mass = static_cast<const T*>(p.mass) + item * most_entries(p);
    if (p.grad_cost) {
      T* out = static_cast<T*>(p.grad_cost) + item * p.N * p.M;
      const T rest = mass[0] - mass[0];  // NaN where the problem is
      for (int64_t k = 0; k < p.N * p.M; ++k) out[k] = rest;
      const int32_t *rows = p.rows + item * most_entries(p), *columns = p.columns + item * most_entries(p);
      for (int64_t k = 0; k < most_entries(p) && mass[k] > 0; ++k) out[rows[k] * p.M + columns[k]] = up * mass[k];
    }
    // Through the normalisation a = w / sum(w).
    const auto finish = [&](const WeightView& view, const void* potentials, int64_t n, void* gradient) {
      if (!gradient) return;
      auto& [weights, normalised] = work;
      weights.read(view, item / p.G, item % p.G, n, normalised);
      const T* potential = static_cast<const T*>(potentials) + item * n;
      T *out = static_cast<T*>(gradient) + item * n, along = 0;
      for (int64_t i = 0; i < weights.count; ++i) along += normalised[i] * potential[weights.index(i)];
      for (int64_t i = 0; i < weights.count; ++i)
        normalised[i] = T(up * (potential[weights.index(i)] - along) / weights.total);
      weights.scatter(normalised, out);
    };
    finish(p.a, p.f, p.N, p.grad_a);
    finish(p.b, p.g, p.M, p.grad_b);
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

}  // namespace sfr::cpu::SFR_ISA

#include "../exact.h"

#include "assignment.h"
#include "features.h"
#include "masses.h"
#include "transport.h"
#include "transportation.h"
#include "variant.h"

namespace sfr::cpu::SFR_ISA {
namespace {

struct Work {
  Masses a, b;
  int64_t ld = 0;          // row length of cost
  double* cost = nullptr;  // between kept patches, padding +inf
  Entry* entry = nullptr;  // of the plan
  double *row_sum = nullptr, *column_sum = nullptr;
  Assignment assignment;
  Transportation transportation;

  Work(Arena& arena, int64_t N, int64_t M) {
    const int64_t most = padded<double>(M);
    a.reserve(arena, N);
    b.reserve(arena, M);
    cost = arena.take<double>(N * most);
    entry = arena.take<Entry>(N + M);
    row_sum = arena.take<double>(N);
    column_sum = arena.take<double>(M);
    assignment.reserve(arena, N < M ? N : M, most);
    transportation.reserve(arena, N, M, most);
  }
};

// Costs beyond this count as infinite: sums of a few of them must not overflow.
constexpr double beyond = 1e300;

// The costs between kept patches. False: one is not finite.
bool read_cost(const ExactForwardParams& p, int64_t item, Work& work) {
  const Masses &a = work.a, &b = work.b;
  work.ld = padded<double>(b.count);
  Places unsound{};
  with_element(p.cost_dtype, [&](auto element) {
    using E = decltype(element);
    const E* cost = static_cast<const E*>(p.cost) + item / p.G * p.stride_b + item % p.G * p.stride_g;
    for (int64_t i = 0; i < a.count; ++i) {
      const E* in = cost + a.index(i) * p.stride_n;
      double* out = work.cost + i * work.ld;
      if (p.stride_m == 1 && !b.kept)
        for (int64_t j = 0; j < b.count; ++j) out[j] = convert_in<double>(in[j]);
      else
        for (int64_t j = 0; j < b.count; ++j) out[j] = convert_in<double>(in[b.index(j) * p.stride_m]);
      for (int64_t j = b.count; j < work.ld; ++j) out[j] = 0;
      for (int64_t j = 0; j < work.ld; j += lanes<double>) unsound |= ~(vabs<double>(load(out + j)) <= beyond);
      for (int64_t j = b.count; j < work.ld; ++j) out[j] = infinity;
    }
  });
  for (int i = 0; i < lanes<double>; ++i)
    if (unsound[i]) return false;
  return true;
}

// Optimal dual variables, and how many entries of the work's hold an optimal plan.
struct Solved {
  double *u = nullptr, *v = nullptr;
  int64_t entries = 0, n_iter = 0;
};

Solved solve(Work& work) {
  Masses &a = work.a, &b = work.b;
  Solved out;
  if (a.equal() && b.equal() && a.count == b.count) {
    Assignment& assignment = work.assignment;
    assignment.n = a.count;
    assignment.ld = work.ld;
    assignment.cost = work.cost;
    out.n_iter = assign(assignment);
    out.u = assignment.u;
    out.v = assignment.v;
    out.entries = a.count;
    for (int64_t i = 0; i < a.count; ++i) work.entry[i] = {int32_t(i), assignment.column[i], 1};
    return out;
  }
  balance(a, b);
  Transportation& transportation = work.transportation;
  transportation.set(work.cost, work.ld, a.units, a.count, b.units, b.count);
  out.n_iter = ship(transportation, work.entry, out.entries);
  out.u = transportation.u;
  out.v = transportation.v();
  return out;
}

// What is left of a side's weights once the plan's sums are taken off.
template <class T>
double marginal_error(const WeightView& view, int64_t batch, int64_t group, const Masses& side, const double* sum) {
  const T* w = static_cast<const T*>(view.data);
  if (w) w += batch * view.stride_b + group * view.stride_g;
  const auto weight = [&](int64_t i) { return w ? double(w[side.index(i) * view.stride_n]) : 1.0; };
  double total = 0, error = 0;
  for (int64_t i = 0; i < side.count; ++i) total += weight(i);
  for (int64_t i = 0; i < side.count; ++i) error += std::fabs(sum[i] - weight(i) / total);
  return error;
}

// The dual variable of a removed patch: the least cost - potential over the other side's kept patches.
template <class E>
double slope(const E* cost, int64_t stride, const Masses& other, const double* potential) {
  double least = infinity;
  for (int64_t k = 0; k < other.count; ++k) {
    const double x = convert_in<double>(cost[other.index(k) * stride]) - potential[k];
    if (x < least && x - x == 0) least = x;
  }
  return least < infinity ? least : 0;
}

template <class T>
void write(const ExactForwardParams& p, int64_t item, Work& work, const Solved& solved) {
  const Masses &a = work.a, &b = work.b;
  const double unit = 1 / double(a.sum);
  double dual_a = 0, dual_b = 0, value = 0;
  for (int64_t i = 0; i < a.count; ++i) dual_a += double(a.units[i]) * unit * solved.u[i], work.row_sum[i] = 0;
  for (int64_t j = 0; j < b.count; ++j) dual_b += double(b.units[j]) * unit * solved.v[j], work.column_sum[j] = 0;
  const double shift = (dual_b - dual_a) / 2;
  for (int64_t i = 0; i < a.count; ++i) solved.u[i] += shift;
  for (int64_t j = 0; j < b.count; ++j) solved.v[j] -= shift;

  const int64_t most = p.entries();
  int32_t *rows = p.rows + item * most, *columns = p.columns + item * most;
  T* mass = static_cast<T*>(p.mass) + item * most;
  for (int64_t k = 0; k < most; ++k) {
    rows[k] = columns[k] = 0;
    mass[k] = 0;
    if (k >= solved.entries) continue;
    const Entry& e = work.entry[k];
    const double moved = double(e.units) * unit;
    value += moved * work.cost[e.row * work.ld + e.column];
    work.row_sum[e.row] += moved;
    work.column_sum[e.column] += moved;
    rows[k] = int32_t(a.index(e.row));
    columns[k] = int32_t(b.index(e.column));
    mass[k] = T(moved);
  }

  T *f = static_cast<T*>(p.f) + item * p.N, *g = static_cast<T*>(p.g) + item * p.M;
  if (a.kept || b.kept)
    with_element(p.cost_dtype, [&](auto element) {
      using E = decltype(element);
      const E* cost = static_cast<const E*>(p.cost) + item / p.G * p.stride_b + item % p.G * p.stride_g;
      for (int64_t i = 0; i < p.N; ++i) f[i] = T(slope(cost + i * p.stride_n, p.stride_m, b, solved.v));
      for (int64_t j = 0; j < p.M; ++j) g[j] = T(slope(cost + j * p.stride_m, p.stride_n, a, solved.u));
    });
  for (int64_t i = 0; i < a.count; ++i) f[a.index(i)] = T(solved.u[i]);
  for (int64_t j = 0; j < b.count; ++j) g[b.index(j)] = T(solved.v[j]);

  static_cast<T*>(p.value)[item] = T(value);
  static_cast<T*>(p.gap)[item] = T(value - (dual_a + dual_b));
  static_cast<T*>(p.error)[item] = T(marginal_error<T>(p.a, item / p.G, item % p.G, a, work.row_sum) +
                                     marginal_error<T>(p.b, item / p.G, item % p.G, b, work.column_sum));
  p.n_iter[item] = solved.n_iter;
}

// A problem with a NaN in it.
template <class T>
void write_nan(const ExactForwardParams& p, int64_t item) {
  const T nan = std::numeric_limits<T>::quiet_NaN();
  const auto fill = [&](void* out, int64_t count) {
    for (int64_t k = 0; k < count; ++k) static_cast<T*>(out)[item * count + k] = nan;
  };
  fill(p.value, 1), fill(p.gap, 1), fill(p.error, 1);
  fill(p.f, p.N), fill(p.g, p.M), fill(p.mass, p.entries());
  std::memset(p.rows + item * p.entries(), 0, sizeof(int32_t) * p.entries());
  std::memset(p.columns + item * p.entries(), 0, sizeof(int32_t) * p.entries());
  p.n_iter[item] = 0;
}

template <class T>
Status forward(const ExactForwardParams& p) {
  if (!weights_are_valid<T>(p.a, p.B, p.G, p.N)) return Status::bad_a;
  if (!weights_are_valid<T>(p.b, p.B, p.G, p.M)) return Status::bad_b;
  Arena measure;
  Work(measure, p.N, p.M);
  const int64_t items = p.B * p.G;
  const double operations = 20.0 * double(p.N) * double(p.M);
  for_each_problem({items, operations, measure.used() + 64, 0, p.threads < items ? p.threads : int(items)},
                   [&](const Team& team, int64_t item) {
                     Arena arena(team.memory);
                     Work work(arena, p.N, p.M);
                     work.a.read<T>(p.a, item / p.G, item % p.G, p.N);
                     work.b.read<T>(p.b, item / p.G, item % p.G, p.M);
                     if (read_cost(p, item, work))
                       write<T>(p, item, work, solve(work));
                     else
                       write_nan<T>(p, item);
                   });
  return Status::ok;
}

template <class T>
Status backward(const ExactBackwardParams& p) {
  Arena measure;
  const auto lay_out = [&](Arena& arena, Weights<T>& weights, T*& normalised) {
    const int64_t most = p.N > p.M ? p.N : p.M;
    weights.reserve(arena, most);
    normalised = arena.take<T>(most);
  };
  Weights<T> none;
  T* nowhere;
  lay_out(measure, none, nowhere);
  const int64_t items = p.B * p.G;
  for_each_problem(
      {items, double(p.N) * double(p.M), measure.used() + 64, 0, p.threads < items ? p.threads : int(items)},
      [&](const Team& team, int64_t item) {
        const T up = static_cast<const T*>(p.grad_value)[item];
        const T* mass = static_cast<const T*>(p.mass) + item * p.entries();
        if (p.grad_cost) {
          T* out = static_cast<T*>(p.grad_cost) + item * p.N * p.M;
          const T rest = mass[0] - mass[0];  // NaN where the problem is
          for (int64_t k = 0; k < p.N * p.M; ++k) out[k] = rest;
          const int32_t *rows = p.rows + item * p.entries(), *columns = p.columns + item * p.entries();
          for (int64_t k = 0; k < p.entries() && mass[k] > 0; ++k) out[rows[k] * p.M + columns[k]] = up * mass[k];
        }
        // Through the normalisation a = w / sum(w).
        const auto finish = [&](const WeightView& view, const void* potentials, int64_t n, void* gradient) {
          if (!gradient) return;
          Arena arena(team.memory);
          Weights<T> weights;
          T* normalised;
          lay_out(arena, weights, normalised);
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

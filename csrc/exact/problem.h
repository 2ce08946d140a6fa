// One problem: its weights and costs in a workspace, the solver that fits, and its outputs.
#pragma once

#include "../contracts/exact.h"
#include "assignment.h"
#include "masses.h"
#include "transportation.h"

namespace SFR_EXACT_NAMESPACE {

// Costs beyond this count as infinite: sums of a few of them must not overflow.
constexpr double largest_cost = 1e300;

SFR_LANES int64_t most_entries(const ExactParams& p) {
  return p.N + p.M - 1;
}

template <class S>
struct ExactWork {
  Masses a, b;
  int64_t ld = 0;     // row length of cost
  S* cost = nullptr;  // between kept patches, padding +inf; laid out by the device
  Entry* entry = nullptr;
  double *row_sum = nullptr, *column_sum = nullptr;
  Assignment<S> assignment;
  Transportation<S> transportation;

  template <class Memory>
  SFR_ANYWHERE void reserve(Memory& memory, int64_t N, int64_t M, int64_t row_length) {
    a.reserve(memory, N);
    b.reserve(memory, M);
    entry = memory.template take<Entry>(N + M);
    row_sum = memory.template take<double>(N);
    column_sum = memory.template take<double>(M);
    assignment.reserve(memory, N < M ? N : M, row_length);
    transportation.reserve(memory, N, M, row_length);
  }

  template <class T>
  SFR_LANES bool read_weights(const Lanes& lanes, const ExactParams& p, int64_t item) {
    const bool a_sound = a.template read<T>(lanes, p.a, item / p.G, item % p.G, p.N);
    return b.template read<T>(lanes, p.b, item / p.G, item % p.G, p.M) && a_sound;
  }
};

// Optimal dual variables, and how many entries of the work's hold an optimal plan.
struct Solved {
  double *u = nullptr, *v = nullptr;
  int64_t entries = 0, n_iter = 0;
};

template <class S>
SFR_LANES Solved solve(const Lanes& lanes, ExactWork<S>& work) {
  Masses &a = work.a, &b = work.b;
  Solved out;
  if (a.equal() && b.equal() && a.count == b.count) {
    Assignment<S>& assignment = work.assignment;
    assignment.n = out.entries = a.count;
    assignment.ld = work.ld;
    assignment.cost = work.cost;
    out.n_iter = assign(lanes, assignment);
    out.u = assignment.u;
    out.v = assignment.v;
    lanes.each(a.count, [&](int64_t i) { work.entry[i] = {int32_t(i), assignment.column[i], 1}; });
  } else {
    balance(lanes, a, b);
    Transportation<S>& transportation = work.transportation;
    transportation.set(work.cost, work.ld, a.units, a.count, b.units, b.count, work.entry);
    out.n_iter = transport(lanes, transportation, out.entries);
    out.u = transportation.u;
    out.v = transportation.v();
  }
  return out;
}

// |sum - weights / their sum|_1 of one side.
template <class T>
SFR_LANES double marginal_error(const Lanes& lanes, const WeightView& view, int64_t b, int64_t g, const Masses& side,
                                const double* sum) {
  const T* w = static_cast<const T*>(view.data);
  if (w) w += b * view.stride_b + g * view.stride_g;
  const auto weight = [&](int64_t i) { return w ? double(w[side.index(i) * view.stride_n]) : 1.0; };
  const double total = lanes.sum(side.count, weight);
  return lanes.sum(side.count, [&](int64_t i) { return fabs(sum[i] - weight(i) / total); });
}

// The dual variable of a removed patch: the least cost - potential over the other side's kept patches.
template <class E>
SFR_LANES double slope(const E* cost, int64_t stride, const Masses& other, const double* potential) {
  double least = infinity;
  for (int64_t k = 0; k < other.count; ++k) {
    const double x = to_double(cost[other.index(k) * stride]) - potential[k];
    if (x < least && x - x == 0) least = x;
  }
  return least < infinity ? least : 0;
}

template <class T, class S>
SFR_LANES void write(const Lanes& lanes, const ExactForwardParams& p, int64_t item, const ExactWork<S>& work,
                     const Solved& solved) {
  const Masses &a = work.a, &b = work.b;
  const double unit = 1 / double(a.sum);
  const double dual_a = lanes.sum(a.count, [&](int64_t i) { return double(a.units[i]) * unit * solved.u[i]; });
  const double dual_b = lanes.sum(b.count, [&](int64_t j) { return double(b.units[j]) * unit * solved.v[j]; });
  const double shift = (dual_b - dual_a) / 2;
  lanes.each(a.count, [&](int64_t i) { solved.u[i] += shift, work.row_sum[i] = 0; });
  lanes.each(b.count, [&](int64_t j) { solved.v[j] -= shift, work.column_sum[j] = 0; });

  T *f = static_cast<T*>(p.f) + item * p.N, *g = static_cast<T*>(p.g) + item * p.M;
  if (a.kept || b.kept)
    with_element(p.cost.dtype, [&](auto element) {
      using E = decltype(element);
      const E* cost = first_of<E>(p.cost, item / p.G, item % p.G);
      lanes.each(p.N, [&](int64_t i) { f[i] = T(slope(cost + i * p.cost.stride_n, p.cost.stride_m, b, solved.v)); });
      lanes.each(p.M, [&](int64_t j) { g[j] = T(slope(cost + j * p.cost.stride_m, p.cost.stride_n, a, solved.u)); });
    });
  lanes.each(a.count, [&](int64_t i) { f[a.index(i)] = T(solved.u[i]); });
  lanes.each(b.count, [&](int64_t j) { g[b.index(j)] = T(solved.v[j]); });

  const int64_t most = most_entries(p);
  const Entry* entry = work.entry;
  const auto moved = [&](int64_t k) { return double(entry[k].units) * unit; };
  const double value = lanes.sum(solved.entries, [&](int64_t k) {
    return moved(k) * double(work.cost[entry[k].row * work.ld + entry[k].column]);
  });
  lanes.each(most, [&](int64_t k) {
    const bool used = k < solved.entries;
    p.rows[item * most + k] = used ? int32_t(a.index(entry[k].row)) : 0;
    p.columns[item * most + k] = used ? int32_t(b.index(entry[k].column)) : 0;
    static_cast<T*>(p.mass)[item * most + k] = used ? T(moved(k)) : T(0);
  });
  if (lanes.first)
    for (int64_t k = 0; k < solved.entries; ++k) {
      work.row_sum[entry[k].row] += moved(k);
      work.column_sum[entry[k].column] += moved(k);
    }
  lanes.sync();
  const double error = marginal_error<T>(lanes, p.a, item / p.G, item % p.G, a, work.row_sum) +
                       marginal_error<T>(lanes, p.b, item / p.G, item % p.G, b, work.column_sum);
  if (lanes.first) {
    static_cast<T*>(p.value)[item] = T(value);
    static_cast<T*>(p.gap)[item] = T(value - (dual_a + dual_b));
    static_cast<T*>(p.error)[item] = T(error);
    p.n_iter[item] = solved.n_iter;
  }
}

// A problem with a NaN in it.
template <class T>
SFR_LANES void write_nan(const Lanes& lanes, const ExactForwardParams& p, int64_t item) {
  const int64_t most = most_entries(p);
  const auto fill = [&](void* out, int64_t count) {
    lanes.each(count, [&](int64_t k) { static_cast<T*>(out)[item * count + k] = T(NAN); });
  };
  fill(p.value, 1), fill(p.gap, 1), fill(p.error, 1);
  fill(p.f, p.N), fill(p.g, p.M), fill(p.mass, most);
  lanes.each(most, [&](int64_t k) { p.rows[item * most + k] = p.columns[item * most + k] = 0; });
  if (lanes.first) p.n_iter[item] = 0;
}

}  // namespace SFR_EXACT_NAMESPACE

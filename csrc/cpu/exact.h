// Exact transport on a CPU: a problem's costs as the solver wants them, and the gradients of its weights. What
// exact.cpp and exact_emd.cpp share.
#pragma once

#include <optional>

#include "scan.h"
// After what it is made of.
#include "../exact/matching.h"
#include "transport.h"

namespace sfr::cpu::SFR_ISA {

// Whether all are finite, and none is large.
template <class T>
bool are_ordinary(const Costs<T>& cost, int64_t rows, int64_t columns) {
  const int64_t whole = columns / lanes<double> * lanes<double>;
  Indices ordinary = every(-1);
  for (int64_t i = 0; i < rows; ++i) {
    const T* row = cost.row(i);
    over_row(row, 0, whole,
             [&](Vec<double> x, int64_t) { ordinary &= vabs<double>(x) <= splat<double>(largest_cost); });
    for (int64_t j = whole; j < columns; ++j)
      if (!(std::fabs(double(row[j])) <= largest_cost)) return false;
  }
  return !any_lane(~ordinary);
}

// What kinds of costs there are.
template <class T>
CostKinds kinds_of(const Costs<T>& cost, int64_t rows, int64_t columns) {
  if (are_ordinary(cost, rows, columns)) return {true, false, false};
  Indices finite_or_inf = every(-1), infinite{}, large{};
  for (int64_t i = 0; i < rows; ++i) {
    const T* row = cost.row(i);
    const auto see = [&](Vec<double> x, Indices counted) {
      finite_or_inf &= (x > -infinity) | ~counted;
      infinite |= (x == infinity) & counted;
      large |= (vabs<double>(x) > largest_cost) & (x < infinity) & counted;
    };
    over_row(row, 0, columns, [&](Vec<double> x, int64_t j) { see(x, lane_numbers() + j < columns); });
  }
  return {!any_lane(~finite_or_inf), any_lane(infinite), any_lane(large)};
}

// Which patches the costs are of.
enum class CostsOf { all, kept };

// Rows of kept patches beside each other, as they count.
template <class T, class Counts>
void copy_costs(const ExactForwardParams& p, int64_t item, ExactWork<T>& work, T* out, Counts counts, CostsOf of) {
  Masses rows = work.rows(), columns = work.columns();
  if (of == CostsOf::kept) rows.kept = columns.kept = nullptr;
  const int64_t between_rows = work.turned ? p.cost.stride_m : p.cost.stride_n,
                along = work.turned ? p.cost.stride_n : p.cost.stride_m;
  Costs<T>& cost = work.cost;
  cost = {out, cost.span, nullptr, cost.n, cost.m, cost.span, cost.span, false};
  with_element(p.cost.dtype, [&](auto element) {
    using E = decltype(element);
    const E* in = first_of<E>(p.cost, item / p.G, item % p.G);
    const auto copy = [&](int64_t i, int64_t j) {
      out[i * cost.stride + j] = counts(convert_in<T>(in[rows.index(i) * between_rows + columns.index(j) * along]));
    };
    if (between_rows < along) {
      for (int64_t j = 0; j < columns.count; ++j)
        for (int64_t i = 0; i < rows.count; ++i) copy(i, j);
    } else if (along == 1 && !columns.kept) {
      for (int64_t i = 0; i < rows.count; ++i) {
        const E* row = in + rows.index(i) * between_rows;
        for (int64_t j = 0; j < columns.count; ++j) out[i * cost.stride + j] = counts(convert_in<T>(row[j]));
      }
    } else {
      for (int64_t i = 0; i < rows.count; ++i)
        for (int64_t j = 0; j < columns.count; ++j) copy(i, j);
    }
  });
  for (int64_t i = 0; i < cost.n; ++i)
    for (int64_t j = columns.count; j < cost.stride; ++j) out[i * cost.stride + j] = std::numeric_limits<T>::infinity();
  if (!priced(p)) return;
  const double row_price = work.turned ? p.options.price_b : p.options.price_a,
               column_price = work.turned ? p.options.price_a : p.options.price_b;
  for (int64_t i = 0; i < rows.count; ++i) out[i * cost.stride + columns.count] = counts(T(row_price));
  T* more = out + rows.count * cost.stride;
  for (int64_t j = 0; j < columns.count; ++j) more[j] = counts(T(column_price));
  more[columns.count] = 0;
}

// The costs between kept patches, where they lie or in `out`, or in `own` if there is no `out` and they cannot stay.
// False: one is not a cost.
template <class T, class Counts>
bool read_cost(const ExactForwardParams& p, int64_t item, ExactWork<T>& work, T* out, std::optional<Memory>& own,
               Counts counts, CostsOf of = CostsOf::all) {
  const Masses &rows = work.rows(), &columns = work.columns();
  Costs<T>& cost = work.cost;
  const int64_t more = priced(p) ? 1 : 0;
  cost.n = rows.count + more, cost.m = columns.count + more;
  cost.span = padded<double>(cost.m);
  work.scale = 1;
  const auto room = [&] {
    if (out) return out;
    own.emplace(cost.n * cost.span * int64_t(sizeof(T)));
    return reinterpret_cast<T*>(own->data());
  };
  if (!out && !columns.kept && !work.turned) {
    cost.data = first_of<T>(p.cost, item / p.G, item % p.G);
    cost.stride = p.cost.stride_n;
    cost.kept = rows.kept;
    cost.width = cost.m;
  } else {
    copy_costs(p, item, work, room(), counts, of);
  }
  const CostKinds found = kinds_of(cost, rows.count, columns.count);
  cost.forbidden = found.forbidden;
  if (!found.sound || (p.options.features && found.forbidden)) return false;
  if (found.large) {
    copy_costs(p, item, work, room(), [&](T x) { return counts(x) * T(scaled_down); }, of);
    work.scale = 1 / scaled_down;
  }
  return true;
}

// d/da and d/db: dual variables, through the normalisation a = w / sum(w) unless the side keeps its sum. Where nothing
// weighs, potentials are 0.
template <class T>
struct WeightGradients {
  Weights<T> weights;  // of either side
  T* normalised;

  WeightGradients() = default;
  WeightGradients(Arena& arena, const ExactParams& p) {
    const int64_t most = p.N > p.M ? p.N : p.M;
    weights.reserve(arena, most);
    normalised = arena.take<T>(most);
  }

  void write(const Lanes& lanes, const ExactBackwardParams& p, int64_t item, T up) {
    write(lanes, p.a, p.options.price_a < infinity, item, p.G, p.N, p.f, up, p.grad_a);
    write(lanes, p.b, p.options.price_b < infinity, item, p.G, p.M, p.g, up, p.grad_b);
  }

 private:
  void write(const Lanes& lanes, const WeightView& view, bool keeps_its_sum, int64_t item, int64_t G, int64_t n,
             const void* potentials, T up, void* gradient) {
    if (!gradient) return;
    const T* w = static_cast<const T*>(view.data);
    if (w) w += item / G * view.stride_b + item % G * view.stride_g;
    const auto weighs = [&](int64_t i) { return !w || w[i * view.stride_n] > 0; };
    const T* potential = static_cast<const T*>(potentials) + item * n;
    T *out = static_cast<T*>(gradient) + item * n, along = 0;
    if (keeps_its_sum || lanes.find(n, weighs) == n) {
      for (int64_t i = 0; i < n; ++i) out[i] = weighs(i) ? up * potential[i] : T(0);
      return;
    }
    weights.read(view, item / G, item % G, n, normalised);
    // Fused whether or not patches are removed, which are two loops to the compiler: padding changes no bit.
    for (int64_t i = 0; i < weights.count; ++i) along = std::fma(normalised[i], potential[weights.index(i)], along);
    for (int64_t i = 0; i < weights.count; ++i)
      normalised[i] = T(up * (potential[weights.index(i)] - along) / weights.total);
    weights.scatter(normalised, out);
  }
};

}  // namespace sfr::cpu::SFR_ISA

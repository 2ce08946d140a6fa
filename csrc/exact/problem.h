// One problem: its weights and costs in a workspace, the solver that fits, and its outputs.
//
// The side with fewer patches is the rows, whichever it is.
#pragma once

#include "../contracts/exact.h"
#include "masses.h"
#include "monge.h"
#include "ties.h"

namespace SFR_EXACT_NAMESPACE {

// Larger costs are scaled down first: sums of a few of them must not overflow.
constexpr double largest_cost = 1e300, scaled_down = 0x1p-64;

SFR_ANYWHERE int64_t most_entries(const ExactParams& p) {
  return p.N + p.M - 1;
}

SFR_ANYWHERE bool priced(const ExactParams& p) {
  return p.options.price_a < infinity || p.options.price_b < infinity;
}

template <class S>
struct ExactWork {
  Masses a, b;
  bool turned = false;  // rows are b's patches
  Costs<S> cost;        // between kept patches; with prices a row and a column more; laid out by the device
  double scale = 1;     // what costs are to be multiplied with
  double *row_sum = nullptr, *column_sum = nullptr;
  Assignment<S> assignment;
  Transportation<S> transportation;

  // `span`: of the longest row in whole vectors.
  template <class Memory>
  SFR_ANYWHERE void reserve(Memory& memory, const ExactParams& p, int64_t span) {
    const int64_t more = priced(p) ? 1 : 0, rows = least_side(p) + more, columns = p.N + p.M - least_side(p) + more;
    a.reserve(memory, p.N);
    b.reserve(memory, p.M);
    row_sum = memory.template take<double>(rows);
    column_sum = memory.template take<double>(columns);
    assignment.reserve(memory, rows, columns, span);
    transportation.reserve(memory, rows, columns, span, TightPairs::size(rows, span));
    assignment.spare = transportation.tree.indices;
  }

  static SFR_ANYWHERE int64_t least_side(const ExactParams& p) { return p.N < p.M ? p.N : p.M; }

  template <class T>
  SFR_LANES Reading read_weights(const Lanes& lanes, const ExactParams& p, int64_t item) {
    const Reading of_a = a.template read<T>(lanes, p.a, item / p.G, item % p.G, p.N);
    const Reading of_b = b.template read<T>(lanes, p.b, item / p.G, item % p.G, p.M);
    turned = a.count > b.count;
    if (of_a == Reading::bad || of_b == Reading::bad) return Reading::bad;
    return of_a == Reading::empty ? of_a : of_b;
  }

  SFR_LANES Masses& rows() { return turned ? b : a; }
  SFR_LANES Masses& columns() { return turned ? a : b; }
  SFR_LANES const Masses& rows() const { return turned ? b : a; }
  SFR_LANES const Masses& columns() const { return turned ? a : b; }
};

// Whether there is a plan; and if so its value's certificate, dual variables, and how many of the entries hold it.
struct Solved {
  bool feasible = false;
  Certificate certificate;
  double *u = nullptr, *v = nullptr;
  int64_t entries = 0, n_iter = 0;
};

// Of a matching that is an optimal plan if u and v say so.
template <class S>
SFR_LANES Certificate certify(const Lanes& lanes, const Assignment<S>& work) {
  const int64_t n = work.cost.n;
  const auto cost = [&](int64_t i) { return work.cost.at(i, work.column[i]); };
  Certificate out;
  out.slack = lanes.sum(n, [&](int64_t i) {
    const double slack = reduced(cost(i), work.v[work.column[i]], 0.0, -work.u[i], 0.0);
    return slack > 0 ? slack / double(n) : 0;
  });
  out.magnitude = lanes.sum(n, [&](int64_t i) { return fabs(cost(i)) / double(n); });
  out.blur = -lanes.least(n, [&](int64_t i) { return -fabs(work.u[i]); }) * 0x1p-53;
  return out;
}

// Rows that may be scanned in searches before the simplex method is quicker.
SFR_LANES int64_t search_budget(int64_t n) {
  return 64 + 12 * n;
}

// What the simplex method is to start from: nothing, as there is no plan or as it is optimal, or a plan; `parts`: one
// whose potentials are nothing to start from.
enum class Start { impossible, optimal, parts, plan };

// Of one unit each, as many rows as columns.
template <class S>
SFR_LANES Start start_from_matching(const Lanes& lanes, ExactWork<S>& work, double tolerance, Solved& out) {
  Assignment<S>& assignment = work.assignment;
  const Transportation<S>& rest = work.transportation;
  int64_t waiting;
  assignment.cost = work.cost;
  const Matched matched = assign(lanes, assignment, search_budget(work.cost.n), waiting, out.n_iter);
  if (matched == Matched::impossible) return Start::impossible;
  out.entries = work.cost.n - waiting;
  if (matched == Matched::all) {
    out.u = assignment.u;
    out.v = assignment.v;
    out.certificate = certify(lanes, assignment);
    lanes.each(out.entries, [&](int64_t i) { rest.entry[i] = {int32_t(i), assignment.column[i], 1}; });
    if (out.certificate.holds()) return Start::optimal;
  }
  // What is matched is a start; rows that wait take what is left.
  lanes.each(work.cost.n, [&](int64_t i) {
    rest.row_left[i] = assignment.column[i] < 0 ? 1 : 0;
    rest.put_potential(i, {-assignment.u[i], 0});
  });
  lanes.each(work.cost.span, [&](int64_t j) { rest.v()[j] = assignment.v[j]; });
  lanes.each(work.cost.m, [&](int64_t j) { rest.column_left[j] = assignment.row[j] < 0 ? 1 : 0; });
  if (waiting == 0) return Start::parts;
  if (lanes.first) {
    int64_t count = 0;
    for (int64_t i = 0; i < work.cost.n; ++i)
      if (assignment.column[i] >= 0) rest.entry[count++] = {int32_t(i), assignment.column[i], 1};
  }
  lanes.sync();
  const int64_t detours = ship_the_rest(lanes, rest, out.entries);
  return detours == 0 || avoid(lanes, rest, tolerance, out.entries, out.n_iter) ? Start::plan : Start::impossible;
}

template <class S>
SFR_LANES Start start_from_shipping(const Lanes& lanes, const Transportation<S>& work, double tolerance, Solved& out) {
  const int64_t detours = first_plan(lanes, work, out.entries);
  lanes.each(work.cost.n, [&](int64_t i) { work.put_potential(i, {}); });
  return detours == 0 || avoid(lanes, work, tolerance, out.entries, out.n_iter) ? Start::plan : Start::impossible;
}

// Between units that are in balance, up to a `tolerance` of any sum of them. `matching`: one of each row and column.
template <class S>
SFR_LANES Solved solve_units(const Lanes& lanes, ExactWork<S>& work, bool matching, double tolerance) {
  Transportation<S>& transportation = work.transportation;
  const double unit = work.rows().unit;
  transportation.set(work.cost, work.rows().units, work.columns().units);
  Solved out;
  out.u = transportation.u;
  out.v = transportation.v();
  Start start = Start::plan;
  const Ordered ordered = plan_in_order(lanes, transportation, unit, out.entries, out.certificate);
  if (ordered == Ordered::proven)
    start = Start::optimal;
  else if (ordered == Ordered::no)
    start = matching ? start_from_matching(lanes, work, tolerance, out)
                     : start_from_shipping(lanes, transportation, tolerance, out);
  out.feasible = start != Start::impossible;
  if (start == Start::impossible || start == Start::optimal) return out;
  out.certificate = improve(lanes, transportation, start == Start::parts, unit, out.entries, out.n_iter);
  out.u = transportation.u;
  out.v = transportation.v();
  return out;
}

// With prices each side gets one more patch, which may take all of the other.
SFR_LANES void add_what_is_left(const Lanes& lanes, Masses& a, Masses& b) {
  const Units of_a = a.sum, of_b = b.sum;
  if (lanes.first) a.units[a.count] = of_b, b.units[b.count] = of_a;
  lanes.sync();
  a.sum = b.sum = of_a + of_b;
}

template <class T, class S>
SFR_LANES Solved solve(const Lanes& lanes, const ExactParams& p, ExactWork<S>& work) {
  Masses &a = work.a, &b = work.b;
  const double tolerance = 64 * (p.options.rounding > last_digit<T> ? p.options.rounding : last_digit<T>);
  const bool matching = !priced(p) && a.equal() && b.equal() && a.count == b.count;
  if (matching) {
    a.unit = b.unit = 1 / double(a.count);
  } else if (priced(p)) {
    measure(lanes, a, b, p.options.price_a < infinity, p.options.price_b < infinity, tolerance);
    add_what_is_left(lanes, a, b);
  } else {
    balance(lanes, a, b);
  }
  return solve_units(lanes, work, matching, tolerance);
}

// sum |sums - weights| of one side.
template <class T>
SFR_LANES double marginal_error(const Lanes& lanes, const WeightView& view, int64_t b, int64_t g, const Masses& side,
                                const double* sum, bool normalised) {
  const T* w = static_cast<const T*>(view.data);
  if (w) w += b * view.stride_b + g * view.stride_g;
  const auto weight = [&](int64_t i) { return w ? double(w[side.index(i) * view.stride_n]) : 1.0; };
  // In a smaller unit where the sum of float64 weights overflows.
  const auto sum_of = [&](double unit) { return lanes.sum(side.count, [&](int64_t i) { return weight(i) * unit; }); };
  double unit = 1, total = !w ? double(side.count) : normalised ? sum_of(unit) : 1.0;
  if (total == infinity) unit = 0x1p-128, total = sum_of(unit);
  return lanes.sum(side.count, [&](int64_t i) { return fabs(sum[i] - weight(i) * unit / total); });
}

// The dual variable of a removed patch: the least cost - potential over the other side's kept patches.
template <class E>
SFR_LANES double slope(const E* cost, int64_t stride, const Masses& other, const double* potential, double scale,
                       double price) {
  double least = price;
  for (int64_t k = 0; k < other.count; ++k) {
    const double x = to_double(cost[other.index(k) * stride]) - potential[k] * scale;
    if (x < least && x - x == 0) least = x;
  }
  return least < infinity ? least : 0;
}

// Shifts u and v to what is promised of f and g. `left_alone`: with prices, all of both sides is.
template <class S>
SFR_LANES void shift(const Lanes& lanes, const ExactParams& p, const ExactWork<S>& work, const Solved& solved) {
  const Masses &rows = work.rows(), &columns = work.columns();
  double shift;
  if (priced(p)) {
    const auto both = [&](int64_t k) {
      const Entry& e = work.transportation.entry[k];
      return e.row < rows.count && e.column < columns.count;
    };
    if (lanes.find(solved.entries, both) == solved.entries) {
      const double row_price = work.turned ? p.options.price_b : p.options.price_a,
                   column_price = work.turned ? p.options.price_a : p.options.price_b;
      lanes.each(rows.count, [&](int64_t i) { solved.u[i] = row_price / work.scale; });
      lanes.each(columns.count, [&](int64_t j) { solved.v[j] = column_price / work.scale; });
      return;
    }
    shift = solved.v[columns.count];
  } else {
    const double unit = rows.unit;
    const double of_rows = lanes.sum(rows.count, [&](int64_t i) { return double(rows.units[i]) * unit * solved.u[i]; });
    const double of_columns =
        lanes.sum(columns.count, [&](int64_t j) { return double(columns.units[j]) * unit * solved.v[j]; });
    shift = (of_columns - of_rows) / 2;
  }
  lanes.each(rows.count, [&](int64_t i) { solved.u[i] += shift; });
  lanes.each(columns.count, [&](int64_t j) { solved.v[j] -= shift; });
}

template <class T, class S>
SFR_LANES void write(const Lanes& lanes, const ExactForwardParams& p, int64_t item, const ExactWork<S>& work,
                     const Solved& solved) {
  const Masses &rows = work.rows(), &columns = work.columns();
  const Entry* entry = work.transportation.entry;
  const double unit = rows.unit;
  const auto moved = [&](int64_t k) { return double(entry[k].units) * unit; };
  const auto real = [&](int64_t k) { return entry[k].row < rows.count && entry[k].column < columns.count; };
  const double value =
      lanes.sum(solved.entries, [&](int64_t k) { return moved(k) * work.cost.at(entry[k].row, entry[k].column); });

  shift(lanes, p, work, solved);
  T *f = static_cast<T*>(p.f) + item * p.N, *g = static_cast<T*>(p.g) + item * p.M;
  const double *of_a = work.turned ? solved.v : solved.u, *of_b = work.turned ? solved.u : solved.v;
  if (p.options.features) {
    lanes.each(p.N, [&](int64_t i) { f[i] = 0; });
    lanes.each(p.M, [&](int64_t j) { g[j] = 0; });
  } else if (work.a.kept || work.b.kept) {
    with_element(p.cost.dtype, [&](auto element) {
      using E = decltype(element);
      const E* cost = first_of<E>(p.cost, item / p.G, item % p.G);
      lanes.each(p.N, [&](int64_t i) {
        f[i] = T(slope(cost + i * p.cost.stride_n, p.cost.stride_m, work.b, of_b, work.scale, p.options.price_a));
      });
      lanes.each(p.M, [&](int64_t j) {
        g[j] = T(slope(cost + j * p.cost.stride_m, p.cost.stride_n, work.a, of_a, work.scale, p.options.price_b));
      });
    });
  }
  lanes.each(work.a.count, [&](int64_t i) { f[work.a.index(i)] = T(of_a[i] * work.scale); });
  lanes.each(work.b.count, [&](int64_t j) { g[work.b.index(j)] = T(of_b[j] * work.scale); });

  const int64_t most = most_entries(p);
  T* mass = static_cast<T*>(p.mass) + item * most;
  int32_t *of_row = (work.turned ? p.columns : p.rows) + item * most,
          *of_column = (work.turned ? p.rows : p.columns) + item * most;
  lanes.each(rows.count, [&](int64_t i) { work.row_sum[i] = 0; });
  lanes.each(columns.count, [&](int64_t j) { work.column_sum[j] = 0; });
  int64_t used = 0;
  if (lanes.first)
    for (int64_t k = 0; k < solved.entries; ++k) {
      const Entry& e = entry[k];
      if (e.row < rows.count) work.row_sum[e.row] += moved(k);
      if (e.column < columns.count) work.column_sum[e.column] += moved(k);
      if (!real(k)) continue;
      of_row[used] = int32_t(rows.index(e.row));
      of_column[used] = int32_t(columns.index(e.column));
      mass[used++] = T(moved(k));
    }
  lanes.sync();
  used = lanes.of_first(used);
  lanes.each(most - used, [&](int64_t k) { of_row[used + k] = of_column[used + k] = 0, mass[used + k] = 0; });

  const double* sum_a = work.turned ? work.column_sum : work.row_sum;
  const double* sum_b = work.turned ? work.row_sum : work.column_sum;
  const double error =
      marginal_error<T>(lanes, p.a, item / p.G, item % p.G, work.a, sum_a, !(p.options.price_a < infinity)) +
      marginal_error<T>(lanes, p.b, item / p.G, item % p.G, work.b, sum_b, !(p.options.price_b < infinity));
  if (lanes.first) {
    static_cast<T*>(p.value)[item] = T(value * work.scale);
    static_cast<T*>(p.gap)[item] = T(solved.certificate.gap() * work.scale);
    static_cast<T*>(p.magnitude)[item] = T(solved.certificate.magnitude * work.scale);
    static_cast<T*>(p.error)[item] = T(error);
    p.n_iter[item] = solved.n_iter;
  }
}

// A problem without a plan: the same everywhere.
struct Blank {
  double value, gap, error, rest;  // rest: plan, magnitude and dual variables
};
SFR_LANES Blank of_nothing() {
  return {0, 0, 0, 0};
}
SFR_LANES Blank of_nan() {
  return {NAN, NAN, NAN, NAN};
}
SFR_LANES Blank without_a_plan() {
  return {infinity, infinity, 2, 0};
}

template <class T>
SFR_LANES void write(const Lanes& lanes, const ExactForwardParams& p, int64_t item, Blank blank, int64_t n_iter) {
  const int64_t most = most_entries(p);
  const auto fill = [&](void* out, int64_t count, double value) {
    lanes.each(count, [&](int64_t k) { static_cast<T*>(out)[item * count + k] = T(value); });
  };
  fill(p.value, 1, blank.value), fill(p.gap, 1, blank.gap), fill(p.error, 1, blank.error),
      fill(p.magnitude, 1, blank.rest);
  fill(p.f, p.N, blank.rest), fill(p.g, p.M, blank.rest), fill(p.mass, most, blank.rest);
  lanes.each(most, [&](int64_t k) { p.rows[item * most + k] = p.columns[item * most + k] = 0; });
  if (lanes.first) p.n_iter[item] = n_iter;
}

// From weights that were read and costs that are laid out.
template <class T, class S>
SFR_LANES void solve_and_write(const Lanes& lanes, const ExactForwardParams& p, int64_t item, ExactWork<S>& work) {
  const Solved solved = solve<T>(lanes, p, work);
  if (solved.feasible)
    write<T>(lanes, p, item, work, solved);
  else
    write<T>(lanes, p, item, without_a_plan(), solved.n_iter);
}

}  // namespace SFR_EXACT_NAMESPACE

// Points on a line, products, and whatever else grows apart in order: a plan without a search.
//
// Where rows and columns can be sorted so that C_ij + C_kl <= C_il + C_kj for i < k and j < l (a permuted Monge array),
// filling them from the first of both on is optimal, and the path that this takes gives u and v (Hoffman, 1963).
// Nothing relies on costs being so: such a plan is the last one only where its certificate holds.
#pragma once

#include "transportation.h"

namespace SFR_EXACT_NAMESPACE {

// Some rows that are as far from each other in this order as those that were looked at.
struct Apart {
  bool found;
  int64_t first, last;
};

// Between two columns the difference of costs grows or falls along the order of the rows. A few of both tell costs that
// are in no order from those that may be; every lane looks.
template <class S>
SFR_LANES Apart look_for_order(const Costs<S>& cost) {
  constexpr int rows = 8, columns = 4, gaps = columns - 1, pairs = rows * (rows - 1) / 2;
  constexpr double noise = 32 * last_digit<S>;
  if (cost.forbidden || cost.n < rows || cost.m < rows) return {};
  double grows[gaps][rows], largest = 0;
  const auto row = [&](int k) { return k * (cost.n - 1) / (rows - 1); };
  for (int k = 0; k < rows; ++k) {
    double before = 0;
    for (int l = 0; l < columns; ++l) {
      const double x = cost.at(row(k), l * (cost.m - 1) / (columns - 1));
      if (l > 0) grows[l - 1][k] = x - before;
      if (fabs(x) > largest) largest = fabs(x);
      before = x;
    }
  }
  const auto compare = [&](int gap, int k, int l) {
    const double more = grows[gap][k] - grows[gap][l];
    return fabs(more) <= noise * largest ? 0 : more > 0 ? 1 : -1;
  };
  int most = 0, first = 0, last = 0;
  for (int gap = 0; gap < gaps; ++gap) {
    int least = 0, greatest = 0;
    for (int k = 1; k < rows; ++k) {
      if (grows[gap][k] < grows[gap][least]) least = k;
      if (grows[gap][k] > grows[gap][greatest]) greatest = k;
    }
    if (compare(gap, greatest, least) == 0) continue;  // all alike, as constant costs are
    int differ = 0, along = 0, against = 0;
    for (int k = 1; k < rows; ++k)
      for (int l = 0; l < k; ++l) {
        const int here = compare(gap, k, l), there = here * compare(0, k, l);
        differ += here != 0;
        along += there > 0;
        against += there < 0;
        if (along > 0 && against > 0) return {};
      }
    if (differ > most) most = differ, first = greatest, last = least;
  }
  if (2 * most < pairs) return {};
  return {true, row(first), row(last)};
}

// Rows and columns in order. False: there is none.
//
// The two rows tell columns at the beginning from columns at the end. What a row's costs grow by from the former to
// the latter puts all rows in order; two that are equal in this are alike. Then the first row and the last one do the
// same for the columns.
template <class S>
SFR_LANES bool put_in_order(const Lanes& lanes, const Transportation<S>& work, Apart apart, int32_t* rows,
                            int32_t* columns) {
  const Costs<S>& cost = work.cost;
  double *side = work.room, *row_key = work.u, *column_key = work.v();
  const auto compare_rows = [&](int64_t first, int64_t last) {
    const S *low = cost.row(first), *high = cost.row(last);
    lanes.each(cost.m, [&](int64_t j) { column_key[j] = double(high[j]) - double(low[j]); });
  };
  compare_rows(apart.first, apart.last);
  const double least = lanes.least(cost.m, [&](int64_t j) { return column_key[j]; });
  const double most = -lanes.least(cost.m, [&](int64_t j) { return -column_key[j]; });
  const double middle = least / 2 + most / 2;
  lanes.each(cost.span, [&](int64_t j) {
    side[j] = j >= cost.m || column_key[j] == middle ? 0 : column_key[j] > middle ? -1 : 1;
  });
  const double begin = lanes.sum(cost.m, [&](int64_t j) { return side[j] < 0 ? 1.0 : 0.0; });
  const double end = lanes.sum(cost.m, [&](int64_t j) { return side[j] > 0 ? 1.0 : 0.0; });
  for (int64_t i = 0; i < cost.n; ++i) {
    const SideSums sums = sum_by_side(lanes, cost.row(i), side, cost.width);
    if (lanes.first) row_key[i] = begin * sums.end - end * sums.begin;
  }
  lanes.sync();
  const auto is_none = [](const double* key) { return [key](int64_t k) { return !(fabs(key[k]) < infinity); }; };
  if (lanes.find(cost.n, is_none(row_key)) < cost.n) return false;
  sort_down(lanes, row_key, cost.n, rows);
  compare_rows(rows[0], rows[cost.n - 1]);
  if (lanes.find(cost.m, is_none(column_key)) < cost.m) return false;
  sort_down(lanes, column_key, cost.m, columns);
  return true;
}

// Fills `count` entries from the first row and column on, and potentials along the path; one lane does. Where a row and
// a column run out at once the path goes by the next column: its edge is tight, though nothing is shipped.
template <class S>
SFR_LANES void fill(const Transportation<S>& work, const int32_t* rows, const int32_t* columns, int64_t& count) {
  const Costs<S>& cost = work.cost;
  double* v = work.v();
  double u = 0;
  work.put_potential(rows[0], {0, 0});
  v[columns[0]] = cost.at(rows[0], columns[0]);
  for (int64_t i = 0, j = 0;;) {
    work.ship(rows[i], columns[j], count);
    if (j + 1 < cost.m && work.column_left[columns[j]] == 0) {
      ++j;
      v[columns[j]] = cost.at(rows[i], columns[j]) - u;
    } else if (i + 1 < cost.n) {
      ++i;
      u = cost.at(rows[i], columns[j]) - v[columns[j]];
      work.put_potential(rows[i], {-u, 0});
    } else {
      return;
    }
  }
}

// `nearly`: rounding of the costs, and no more, stands between them and an order.
enum class Ordered { no, nearly, proven };

// Where there is an order: `entries` of a plan, potentials, and their certificate. It is `proven` where that holds and
// nothing is left but what adding up along the path rounds: costs may have much in common that no plan can save, and
// the certificate allows for a share of all. `unit` as in `certify`.
template <class S>
SFR_LANES Ordered plan_in_order(const Lanes& lanes, const Transportation<S>& work, double unit, int64_t& entries,
                                Certificate& certificate) {
  constexpr double rounding = 0x1p-16;
  const Apart apart = look_for_order(work.cost);
  int32_t *rows = work.tree.indices, *columns = rows + work.cost.n;
  if (!apart.found || !put_in_order(lanes, work, apart, rows, columns)) return Ordered::no;
  lanes.each(work.cost.n, [&](int64_t i) { work.row_left[i] = work.a[i]; });
  lanes.each(work.cost.m, [&](int64_t j) { work.column_left[j] = work.b[j], work.v_low()[j] = 0; });
  int64_t count = 0;
  if (lanes.first) fill(work, rows, columns, count);
  lanes.sync();
  entries = lanes.of_first(count);
  certificate = certify(lanes, work, false, entries, unit);
  const double of_path = double(work.cost.n + work.cost.m) * certificate.blur;
  if (certificate.holds() && certificate.slack <= of_path) return Ordered::proven;
  return certificate.slack <= rounding * certificate.magnitude ? Ordered::nearly : Ordered::no;
}

}  // namespace SFR_EXACT_NAMESPACE

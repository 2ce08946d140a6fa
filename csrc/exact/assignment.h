// A matching of n rows with m >= n columns of least cost, by shortest augmenting paths (Jonker and Volgenant, 1987).
//
// u_i + v_j <= C_ij throughout, with equality along the matching; v_j <= 0 with equality at free columns where there
// are more columns than rows. A start from column minima (where there are not) and from rows that outbid each other
// leaves few rows without a column. For each of those, Dijkstra's search for the nearest free column under the costs
// C_ij - u_i - v_j: one row is scanned for each column that is reached.
#pragma once

#include "costs.h"

namespace SFR_EXACT_NAMESPACE {

template <class S>
struct Assignment {
  Costs<S> cost;
  double* u = nullptr;           // [n] at the end
  double* v = nullptr;           // [span]
  int32_t* column = nullptr;     // [n] of each row; -1: none yet
  int32_t* row = nullptr;        // [m] of each column; -1: free
  double* open = nullptr;        // [span] v where the search may go, else -inf: nothing is relaxed there
  double* distance = nullptr;    // [span] from the search's root; +inf where it has been
  int64_t* from = nullptr;       // [span] row that a column is reached from
  int32_t* reached = nullptr;    // [m] columns in the order of the search
  double* reached_at = nullptr;  // [m]
  int32_t* waiting = nullptr;    // [n] rows without a column
  int32_t* vacant = nullptr;     // [m] free columns
  double* closed = nullptr;      // [span] -inf: a column that only rows compete for that cannot all be matched
  int32_t* spare = nullptr;      // memory that nobody else needs meanwhile

  template <class Memory>
  SFR_ANYWHERE void reserve(Memory& memory, int64_t rows, int64_t columns, int64_t row_length) {
    u = memory.template take<double>(rows);
    v = memory.template take<double>(row_length);
    column = memory.template take<int32_t>(rows);
    row = memory.template take<int32_t>(columns);
    open = memory.template take<double>(row_length);
    distance = memory.template take<double>(row_length);
    from = memory.template take<int64_t>(row_length);
    reached = memory.template take<int32_t>(columns);
    reached_at = memory.template take<double>(columns);
    waiting = memory.template take<int32_t>(rows);
    vacant = memory.template take<int32_t>(columns);
  }

  SFR_LANES void match(int64_t i, int64_t j) const {
    column[i] = int32_t(j);
    row[j] = int32_t(i);
  }
};

// All rows and columns are free, and all rows wait.
template <class S>
SFR_LANES void clear(const Lanes& lanes, const Assignment<S>& work) {
  lanes.each(work.cost.n, [&](int64_t i) { work.column[i] = -1, work.waiting[i] = int32_t(i); });
  lanes.each(work.cost.m, [&](int64_t j) { work.row[j] = -1; });
  lanes.each(work.cost.span, [&](int64_t j) { work.v[j] = 0; });
}

// Every column goes to the row it is cheapest for, if that is still to be had. Returns how many rows wait.
template <class S>
SFR_LANES int64_t start_from_minima(const Lanes& lanes, const Assignment<S>& work) {
  const int64_t n = work.cost.n, m = work.cost.m;
  column_minima(lanes, work.cost, work.v, work.from);
  lanes.each(work.cost.span - m, [&](int64_t j) { work.v[m + j] = 0; });
  int64_t count = 0;
  if (lanes.first) {
    for (int64_t j = 0; j < m; ++j)
      if (work.column[work.from[j]] < 0) work.match(work.from[j], j);
    for (int64_t i = 0; i < n; ++i)
      if (work.column[i] < 0) work.waiting[count++] = int32_t(i);
  }
  lanes.sync();
  return lanes.of_first(count);
}

// A row that only one column wanted can lower that column's v by what its second choice costs more: nobody comes off
// worse. Returns whether one did.
template <class S>
SFR_LANES bool transfer(const Lanes& lanes, const Assignment<S>& work) {
  const int64_t n = work.cost.n;
  int32_t* wanted = work.reached;  // by how many columns; the array is not needed yet
  lanes.each(n, [&](int64_t i) { wanted[i] = 0; });
  if (lanes.first)
    for (int64_t j = 0; j < n; ++j) ++wanted[work.from[j]];
  lanes.sync();
  bool lowered = false;
  for (int64_t i = 0; i < n && n > 1; ++i) {
    if (wanted[i] != 1) continue;
    const int64_t j = work.column[i];
    const TwoNearest choice = two_nearest(lanes, work.cost.row(i), work.v, work.cost.width);
    const double other = choice.column == j ? choice.second : choice.value;
    if (lanes.first && other < infinity) work.v[j] -= other - (work.cost.at(i, j) - work.v[j]);
    lanes.sync();
    lowered = true;
  }
  return lowered;
}

struct Bids {
  int64_t waiting, made, ties;
  bool lowered;  // some v
};

// A waiting row takes its first choice and lowers that column's v to where the second is as good; the row it turned
// out bids next. On some costs two rows outbid each other for ever so little, hence a limit. Returns how many wait,
// how many bids there were, and how many of rows that other columns suited as well.
template <class S>
SFR_LANES Bids outbid(const Lanes& lanes, const Assignment<S>& work, int64_t count) {
  const int64_t m = work.cost.m;
  int64_t bids = 2 * work.cost.n, next = 0, left = 0, made = 0, ties = 0;
  bool lowered = false;
  while (next < count) {
    const int64_t i = work.waiting[next++];
    const TwoNearest choice = two_nearest(lanes, work.cost.row(i), work.v, work.cost.width);
    if (!(choice.value < infinity)) {  // no pair of this row is allowed
      lanes.sync();
      if (lanes.first) work.waiting[left] = int32_t(i);
      lanes.sync();
      ++left;
      continue;
    }
    ++made;
    if (choice.second == choice.value) ++ties;
    int64_t j = choice.column;
    const double lower = choice.second < infinity ? work.v[j] - (choice.second - choice.value) : work.v[j];
    const bool strictly = lower < work.v[j];
    lowered |= strictly;
    if (!strictly && work.row[j] >= 0 && choice.second == choice.value)
      for (int64_t k = j + 1; k < m; ++k)
        if (work.row[k] < 0 && work.cost.at(i, k) - work.v[k] == choice.value) {
          j = k;
          break;
        }
    const int32_t out = work.row[j];
    const bool again = out >= 0 && strictly && --bids > 0;
    if (again) --next;
    lanes.sync();
    if (lanes.first) {
      if (strictly) work.v[j] = lower;
      work.match(i, j);
      if (out >= 0) {
        work.column[out] = -1;
        work.waiting[again ? next : left] = out;
      }
    }
    lanes.sync();
    if (out >= 0 && !again) ++left;
  }
  return {left, made, ties, lowered};
}

// Lists the free columns; returns their number.
template <class S>
SFR_LANES int64_t list_vacant(const Lanes& lanes, const Assignment<S>& work) {
  int64_t count = 0;
  if (lanes.first)
    for (int64_t j = 0; j < work.cost.m; ++j)
      if (work.row[j] < 0) work.vacant[count++] = int32_t(j);
  lanes.sync();
  return lanes.of_first(count);
}

// What a search came to.
struct Search {
  bool found;       // a free column; else no allowed path leads to one
  int64_t reached;  // columns besides
};

template <class S>
SFR_LANES void begin_search(const Lanes& lanes, const Assignment<S>& work) {
  lanes.each(work.cost.span, [&](int64_t j) {
    work.open[j] = work.closed && work.closed[j] < 0 ? -infinity : work.v[j];
    work.distance[j] = infinity;
  });
}

// Goes on from row i, at the distance `shift` less the row's own u, to the nearest free column. `count` columns are
// reached before. `vacancies` is the number of free columns listed, of all or none.
template <class S>
SFR_LANES Nearest search(const Lanes& lanes, const Assignment<S>& work, int64_t i, double shift, int64_t vacancies,
                         int64_t& count) {
  const Costs<S>& cost = work.cost;
  for (;;) {
    Nearest next = relax(lanes, cost.row(i), work.open, shift, work.distance, work.from, i, cost.width);
    if (!(next.value < infinity)) {
      lanes.sync();
      return next;
    }
    if (work.row[next.column] >= 0) {  // of several at the same distance a free one ends the search
      const auto as_near = [&](int64_t k) { return work.distance[work.vacant[k]] == next.value; };
      const int64_t vacancy = lanes.find(vacancies, as_near);
      if (vacancy < vacancies) next.column = work.vacant[vacancy];
    }
    const int64_t j = next.column;
    if (work.row[j] < 0) return next;
    if (lanes.first) {
      work.reached[count] = int32_t(j);
      work.reached_at[count] = next.value;
      put(work.open, j, -infinity);
      put(work.distance, j, infinity);
    }
    ++count;
    i = work.row[j];
    shift = next.value - (cost.at(i, j) - work.v[j]);
    lanes.sync();
  }
}

// Lowers v so that all edges of a search over `distance` are tight.
template <class S>
SFR_LANES void tighten(const Lanes& lanes, const Assignment<S>& work, int64_t count, double distance) {
  lanes.each(count, [&](int64_t k) { work.v[work.reached[k]] += work.reached_at[k] - distance; });
}

// The shortest path from a waiting row to a free column; the matching changes along it, and v so that the path's
// edges stay tight.
template <class S>
SFR_LANES Search augment(const Lanes& lanes, const Assignment<S>& work, int64_t root, int64_t& vacancies) {
  begin_search(lanes, work);
  int64_t count = 0;
  const Nearest end = search(lanes, work, root, 0, vacancies, count);
  if (!(end.value < infinity)) return {false, count};
  tighten(lanes, work, count, end.value);
  const int64_t vacancy = lanes.find(vacancies, [&](int64_t k) { return work.vacant[k] == end.column; });
  if (lanes.first) {
    if (vacancies > 0) work.vacant[vacancy] = work.vacant[vacancies - 1];
    for (int64_t j = end.column;;) {
      const int64_t i = work.from[j], before = work.column[i];
      work.match(i, j);
      if (i == root) break;
      j = before;
    }
  }
  if (vacancies > 0) --vacancies;
  lanes.sync();
  return {true, count};
}

}  // namespace SFR_EXACT_NAMESPACE

// Equal weights on equally many patches: a permutation of least cost (Jonker and Volgenant, 1987).
//
// u_i + v_j <= C_ij throughout, with equality along the matching; u is only known at the end. A start from column
// minima and from rows that outbid each other leaves few rows without a column. For each of those, Dijkstra's search
// for the nearest free column under the costs C_ij - u_i - v_j: one row is scanned for each column that is reached.
#pragma once

#include <cmath>

#include "scan.h"
#include "team.h"

namespace sfr::cpu::SFR_ISA {

struct Assignment {
  int64_t n = 0, ld = 0;
  const double* cost = nullptr;  // [n][ld], padding +inf
  double* u = nullptr;           // [n]
  double* v = nullptr;           // [ld]
  int32_t* column = nullptr;     // [n] of each row; -1: none yet
  int32_t* row = nullptr;        // [ld] of each column; -1: free
  double* open = nullptr;        // [ld] v where the search has not been, else -inf: nothing is relaxed there
  double* distance = nullptr;    // [ld] from the search's root; +inf where it has been
  int64_t* from = nullptr;       // [ld] row that a column is reached from
  int32_t* reached = nullptr;    // [n] columns in the order of the search
  double* reached_at = nullptr;  // [n]
  int32_t* waiting = nullptr;    // [n] rows without a column

  void reserve(Arena& arena, int64_t size, int64_t row_length) {
    u = arena.take<double>(size);
    v = arena.take<double>(row_length);
    column = arena.take<int32_t>(size);
    row = arena.take<int32_t>(row_length);
    open = arena.take<double>(row_length);
    distance = arena.take<double>(row_length);
    from = arena.take<int64_t>(row_length);
    reached = arena.take<int32_t>(size);
    reached_at = arena.take<double>(size);
    waiting = arena.take<int32_t>(size);
  }

  const double* costs(int64_t i) const { return cost + i * ld; }
};

inline void match(Assignment& work, int64_t i, int64_t j) {
  work.column[i] = int32_t(j);
  work.row[j] = int32_t(i);
}

// Every column goes to the row it is cheapest for, if that is still to be had. Returns how many rows wait.
inline int64_t start_from_minima(Assignment& work) {
  const int64_t n = work.n;
  column_minima(work.cost, n, work.ld, work.v, work.from);
  for (int64_t j = n; j < work.ld; ++j) work.v[j] = 0;
  for (int64_t i = 0; i < n; ++i) work.column[i] = -1;
  for (int64_t j = 0; j < n; ++j) {
    work.row[j] = -1;
    if (work.column[work.from[j]] < 0) match(work, work.from[j], j);
  }
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i)
    if (work.column[i] < 0) work.waiting[count++] = int32_t(i);
  return count;
}

// A row that only one column wanted can lower that column's v by what its second choice costs more: nobody comes off
// worse.
inline void transfer(Assignment& work) {
  const int64_t n = work.n;
  int32_t* wanted = work.reached;  // by how many columns; the array is not needed yet
  for (int64_t i = 0; i < n; ++i) wanted[i] = 0;
  for (int64_t j = 0; j < n; ++j) ++wanted[work.from[j]];
  for (int64_t i = 0; i < n && n > 1; ++i) {
    if (wanted[i] != 1) continue;
    const int64_t j = work.column[i];
    const TwoNearest choice = two_nearest(work.costs(i), work.v, work.ld);
    work.v[j] -= (choice.column == j ? choice.second : choice.value) - (work.costs(i)[j] - work.v[j]);
  }
}

// A waiting row takes its first choice and lowers that column's v to where the second is as good; the row it turned
// out bids next. On some costs two rows outbid each other for ever so little, hence a limit. Returns how many wait.
inline int64_t outbid(Assignment& work, int64_t count) {
  const int64_t n = work.n;
  int64_t bids = n, next = 0, left = 0;
  while (next < count) {
    const int64_t i = work.waiting[next++];
    const TwoNearest choice = two_nearest(work.costs(i), work.v, work.ld);
    int64_t j = choice.column;
    const double lower = work.v[j] - (choice.second - choice.value);
    const bool strictly = lower < work.v[j];
    if (strictly) {
      work.v[j] = lower;
    } else if (work.row[j] >= 0) {
      for (int64_t k = j + 1; k < n; ++k)
        if (work.row[k] < 0 && work.costs(i)[k] - work.v[k] == choice.value) {
          j = k;
          break;
        }
    }
    const int32_t out = work.row[j];
    match(work, i, j);
    if (out < 0) continue;
    work.column[out] = -1;
    if (strictly && --bids > 0)
      work.waiting[--next] = out;
    else
      work.waiting[left++] = out;
  }
  return left;
}

// The shortest path from a waiting row to a free column; the matching changes along it, and v so that the path's
// edges, and all of the search's, stay tight.
inline void augment(Assignment& work, int64_t root) {
  const int64_t ld = work.ld;
  for (int64_t j = 0; j < ld; j += lanes<double>) {
    store(work.open + j, load(work.v + j));
    store(work.distance + j, splat<double>(infinity));
  }
  int64_t i = root, count = 0;
  double shift = 0;
  Nearest next;
  for (;;) {
    next = relax(work.costs(i), work.open, shift, work.distance, work.from, i, ld);
    const int64_t j = next.column;
    if (work.row[j] < 0) break;
    work.reached[count] = int32_t(j);
    work.reached_at[count++] = next.value;
    set_lane(work.open, j, -infinity);
    set_lane(work.distance, j, infinity);
    i = work.row[j];
    shift = next.value - (work.costs(i)[j] - work.v[j]);
  }
  for (int64_t k = 0; k < count; ++k) work.v[work.reached[k]] += work.reached_at[k] - next.value;
  for (int64_t j = next.column;;) {
    i = work.from[j];
    const int64_t before = work.column[i];
    match(work, i, j);
    if (i == root) break;
    j = before;
  }
}

// The value from u and v is that of the matching, to rounding. Bids may bring a cost into v that the matching then
// avoids; where that is far above all others (a forbidden pair), u and v are mostly rounding.
inline bool certified(const Assignment& work) {
  double primal = 0, magnitude = 0, rows = 0, columns = 0;
  for (int64_t i = 0; i < work.n; ++i) {
    const double cost = work.costs(i)[work.column[i]];
    primal += cost;
    magnitude += std::fabs(cost);
    rows += work.u[i];
    columns += work.v[i];
  }
  return std::fabs(primal - (rows + columns)) <= 0x1p-40 * magnitude;
}

// Fills column, u and v; returns the number of searches.
inline int64_t assign(Assignment& work) {
  const auto finish = [&](int64_t waiting) {
    for (int64_t k = 0; k < waiting; ++k) augment(work, work.waiting[k]);
    row_minima(work.cost, work.v, work.n, work.ld, work.u);
    return waiting;
  };
  const int64_t waiting = start_from_minima(work);
  transfer(work);
  const int64_t searches = finish(outbid(work, waiting));
  return certified(work) ? searches : searches + finish(start_from_minima(work));
}

}  // namespace sfr::cpu::SFR_ISA

// A matching by itself: as many pairs as possible, and among those the least sum.
#pragma once

#include "../contracts/assignment.h"
#include "problem.h"

namespace SFR_EXACT_NAMESPACE {

template <class S>
struct Matching {
  double* closed = nullptr;                 // [span] -1: a column that fewer than all rows that compete for it can have
  int32_t* competes = nullptr;              // [n] whether a row is one of these
  int32_t *few = nullptr, *many = nullptr;  // [n] these columns and rows, listed
  int32_t* column = nullptr;                // [n] out: of each row; -1: none
  S* costs = nullptr;                       // [n n] between them

  template <class Memory>
  SFR_ANYWHERE void reserve(Memory& memory, int64_t rows, int64_t span) {
    closed = memory.template take<double>(span);
    competes = memory.template take<int32_t>(rows);
    few = memory.template take<int32_t>(rows);
    many = memory.template take<int32_t>(rows);
    column = memory.template take<int32_t>(rows);
  }
};

// Not all rows can be matched. A search that finds no free column has seen rows that compete for fewer columns: these
// columns are theirs, and the other rows never need them.
template <class S>
SFR_LANES void match_most(const Lanes& lanes, ExactWork<S>& work, const Matching<S>& most) {
  Assignment<S>& assignment = work.assignment;
  const Costs<S> cost = work.cost;
  clear(lanes, assignment);
  lanes.each(cost.span, [&](int64_t j) { most.closed[j] = 0; });
  lanes.each(cost.n, [&](int64_t i) { most.competes[i] = 0; });
  assignment.closed = most.closed;
  int64_t none = 0;
  for (int64_t waiting = outbid(lanes, assignment, cost.n).waiting; waiting > 0; --waiting) {
    const int64_t root = assignment.waiting[waiting - 1];
    const Search search = augment(lanes, assignment, root, none);
    if (search.found) continue;
    lanes.each(search.reached, [&](int64_t k) {
      const int64_t j = assignment.reached[k];
      most.closed[j] = -1;
      most.competes[assignment.row[j]] = 1;
    });
    if (lanes.first) most.competes[root] = 1;
    lanes.sync();
  }

  int64_t columns = 0, rows = 0;
  if (lanes.first) {
    for (int64_t i = 0; i < cost.n; ++i) {
      most.column[i] = most.competes[i] ? -1 : assignment.column[i];
      if (most.competes[i]) most.many[rows++] = int32_t(i);
    }
    for (int64_t j = 0; j < cost.m; ++j)
      if (most.closed[j] < 0) most.few[columns++] = int32_t(j);
  }
  lanes.sync();
  rows = lanes.of_first(rows);
  columns = lanes.of_first(columns);
  if (columns == 0) return;
  const int64_t width = whole_row(rows);
  lanes.each(columns * width, [&](int64_t k) {
    const int64_t i = k % width;
    most.costs[k] = i < rows ? cost.row(most.many[i])[most.few[k / width]] : S(infinity);
  });
  assignment.cost = {most.costs, width, nullptr, columns, rows, width, width, true};
  int64_t waiting, searches = 0;
  assign(lanes, assignment, INT64_MAX, waiting, searches);
  lanes.each(columns, [&](int64_t k) { most.column[most.many[assignment.column[k]]] = most.few[k]; });
}

// From costs that are laid out. Fills `most.column`.
template <class S>
SFR_LANES void match(const Lanes& lanes, ExactWork<S>& work, const Matching<S>& most) {
  bool all;
  if (work.cost.n == work.cost.m) {
    const Solved solved = solve_units(lanes, work, true, 0);
    all = solved.feasible;
    const Entry* entry = work.transportation.entry;
    lanes.each(all ? work.cost.n : 0, [&](int64_t k) { most.column[entry[k].row] = entry[k].column; });
  } else {
    int64_t waiting, searches = 0;
    work.assignment.cost = work.cost;
    all = assign(lanes, work.assignment, INT64_MAX, waiting, searches) == Matched::all;
    lanes.each(all ? work.cost.n : 0, [&](int64_t i) { most.column[i] = work.assignment.column[i]; });
  }
  if (!all) match_most(lanes, work, most);
}

// `matched`: false where a cost is none.
template <class S>
SFR_LANES void write(const Lanes& lanes, const AssignmentForwardParams& p, int64_t item, const ExactWork<S>& work,
                     const Matching<S>& most, bool matched) {
  int64_t* out = p.columns + item * p.N;
  if (!matched || work.turned) lanes.each(p.N, [&](int64_t i) { out[i] = -1; });
  if (!matched) return;
  lanes.each(work.cost.n, [&](int64_t i) {
    if (!work.turned)
      out[i] = most.column[i];
    else if (most.column[i] >= 0)
      out[most.column[i]] = i;
  });
}

// The same problem as transport: without weights.
SFR_ANYWHERE ExactForwardParams as_transport(const AssignmentForwardParams& p) {
  ExactForwardParams out;
  out.B = p.B, out.G = p.G, out.N = p.N, out.M = p.M;
  out.compute = p.compute;
  out.cost = p.cost;
  return out;
}

// What a cost counts as.
struct Gate {
  bool maximize;
  double limit;

  SFR_ANYWHERE bool open() const { return !maximize && limit == infinity; }  // nothing counts as anything else
  template <class S>
  SFR_LANES S operator()(S x) const {
    if (maximize ? double(x) < limit : double(x) > limit) return S(infinity);
    return maximize ? -x : x;
  }
};

}  // namespace SFR_EXACT_NAMESPACE

// Any weights, any numbers of patches: the transportation problem by the network simplex method.
//
// A spanning tree of rows and columns carries the flow; potentials make its edges tight. A pivot takes in an edge
// whose cost is below the sum of its potentials, sends flow round the cycle that it closes until an edge is empty,
// and hangs the subtree below that edge elsewhere. Trees are strongly feasible: an edge without flow leads from a row
// up to a column. So no sequence of pivots that move nothing can come round (Cunningham, 1976).
#pragma once

#include "tree.h"

namespace SFR_EXACT_NAMESPACE {

template <class S>
struct Transportation {
  int64_t n = 0, m = 0, ld = 0;
  const S* cost = nullptr;                   // [n][ld], padding +inf
  const int64_t *a = nullptr, *b = nullptr;  // [n], [m] units, with the same sum
  double* potential = nullptr;               // by node: minus the row's u, the column's v; a subtree shifts as one
  double* u = nullptr;                       // [n] at the end
  Tree tree;
  Entry* entry = nullptr;                               // [n + m - 1] the plan to start from, and the last one
  int64_t *row_left = nullptr, *column_left = nullptr;  // [n], [m] units not placed yet
  int64_t* from = nullptr;                              // [ld]
  double* room = nullptr;                               // [ld] v of columns with units left, else -inf

  template <class Memory>
  SFR_ANYWHERE void reserve(Memory& memory, int64_t rows, int64_t most_columns, int64_t row_length) {
    const int64_t first = first_column(rows);
    potential = memory.template take<double>(first + row_length);
    u = memory.template take<double>(rows);
    tree.reserve(memory, first + most_columns);
    row_left = memory.template take<int64_t>(rows);
    column_left = memory.template take<int64_t>(most_columns);
    from = memory.template take<int64_t>(row_length);
    room = memory.template take<double>(row_length);
  }

  // Whole vectors, so that the columns' potentials are aligned.
  static SFR_ANYWHERE int64_t first_column(int64_t rows) { return (rows + 7) / 8 * 8; }

  SFR_LANES void set(const S* costs, int64_t row_length, const int64_t* row_units, int64_t rows,
                     const int64_t* column_units, int64_t cols, Entry* entries) {
    cost = costs;
    ld = row_length;
    a = row_units;
    n = rows;
    b = column_units;
    m = cols;
    entry = entries;
    tree.columns = first_column(rows);
    tree.nodes = tree.columns + m;
  }

  SFR_LANES const S* costs(int64_t i) const { return cost + i * ld; }
  SFR_LANES double* v() const { return potential + tree.columns; }
  SFR_LANES double edge_cost(int64_t k, int64_t l) const {
    return double(tree.is_row(k) ? costs(k)[l - tree.columns] : costs(l)[k - tree.columns]);
  }
};

// A plan to start from: columns draw on the row they are cheapest for, then rows ship what they have left to the
// cheapest columns with room, by C - v. Every entry empties a row or fills a column, so the entries form a forest.
// Returns their number.
template <class S>
SFR_LANES int64_t first_plan(const Lanes& lanes, const Transportation<S>& work) {
  int64_t count = 0;  // known to the first lane
  const auto ship = [&](int64_t i, int64_t j) {
    const int64_t units = work.row_left[i] < work.column_left[j] ? work.row_left[i] : work.column_left[j];
    if (units == 0) return;
    work.entry[count++] = {int32_t(i), int32_t(j), units};
    work.row_left[i] -= units;
    work.column_left[j] -= units;
  };
  column_minima(lanes, work.cost, work.n, work.ld, work.v(), work.from);
  lanes.each(work.n, [&](int64_t i) { work.row_left[i] = work.a[i]; });
  lanes.each(work.m, [&](int64_t j) { work.column_left[j] = work.b[j]; });
  if (lanes.first)
    for (int64_t j = 0; j < work.m; ++j) ship(work.from[j], j);
  lanes.sync();
  lanes.each(work.ld,
             [&](int64_t j) { work.room[j] = j < work.m && work.column_left[j] > 0 ? work.v()[j] : -infinity; });
  for (int64_t i = 0; i < work.n; ++i)
    while (work.row_left[i] > 0) {
      const int64_t j = nearest(lanes, work.costs(i), work.room, work.ld).column;
      if (lanes.first) {
        ship(i, j);
        if (work.column_left[j] == 0) put(work.room, j, -infinity);
      }
      lanes.sync();
    }
  return lanes.of_first(count);
}

// Potentials from the tree, root first. Returns the largest magnitude.
template <class S>
SFR_LANES double set_potentials(const Lanes& lanes, const Transportation<S>& work, int64_t root) {
  const Tree& tree = work.tree;
  double largest = 0;
  if (lanes.first) {
    work.potential[root] = 0;
    for (int64_t k = tree.next[root]; k != root; k = tree.next[k]) {
      const int64_t p = tree.parent[k];
      const double cost = work.edge_cost(k, p);
      // u + v = C, with -u and v in the array.
      const double potential = tree.is_row(k) ? work.potential[p] - cost : work.potential[p] + cost;
      work.potential[k] = potential;
      if (fabs(potential) > largest) largest = fabs(potential);
    }
  }
  lanes.sync();
  return lanes.of_first(largest);
}

struct Entering {
  double reduced = 0;  // C - u - v
  int64_t row = 0, column = 0;
};

// The edge that comes in is the most negative one of the first few rows that have any, going round from `row`.
template <class S>
SFR_LANES Entering price(const Lanes& lanes, const Transportation<S>& work, double tolerance, int64_t& row) {
  constexpr int64_t few = 2;
  Entering best;
  for (int64_t left = work.n; left > 0; --left) {
    const double minus_u = work.potential[row];  // before the lanes meet: a pivot may follow
    const Nearest least = nearest(lanes, work.costs(row), work.v(), work.ld);
    const double reduced = least.value + minus_u;
    if (reduced < -tolerance) {
      if (best.reduced == 0 && left > few) left = few;
      if (reduced < best.reduced) best = {reduced, row, least.column};
    }
    if (++row == work.n) row = 0;
  }
  return best;
}

// Fills entry, u and v; returns the number of pivots. `entries` is set to the number of edges with flow.
//
// Sums of rounded costs along different paths differ by rounding, so edges count as negative only below a tolerance in
// units of the potentials; and what the pivots left in these is cleared before the last look. Should rounding ever
// lead the pivots round in circles, the tolerance grows until they end.
template <class S>
SFR_LANES int64_t transport(const Lanes& lanes, const Transportation<S>& work, int64_t& entries) {
  const Tree& tree = work.tree;
  entries = first_plan(lanes, work);
  int64_t root = 0;
  if (lanes.first) root = build_tree(tree, work.entry, entries, work.n);
  root = lanes.of_first(root);
  lanes.each(work.ld - work.m, [&](int64_t j) { work.v()[work.m + j] = 0; });
  const int64_t patience = 1000 * (work.n + work.m);
  double tolerance = 0x1p-48, unit = set_potentials(lanes, work, root);
  int64_t pivots = 0, row = 0;
  bool fresh = true;
  for (;;) {
    const Entering edge = price(lanes, work, tolerance * unit, row);
    if (edge.reduced < 0) {
      ++pivots;
      if (lanes.first) pivot(tree, edge.row, edge.column, edge.reduced, pivots, work.potential);
      lanes.sync();
      fresh = false;
      if (pivots % patience == 0) tolerance *= 2;
    } else if (!fresh) {
      unit = set_potentials(lanes, work, root);
      fresh = true;
    } else {
      break;
    }
  }
  row_minima(lanes, work.cost, work.v(), work.n, work.ld, work.u);
  entries = 0;
  if (lanes.first)
    for (int64_t k = 0; k < tree.nodes; ++k) {
      if (k == work.n) k = tree.columns;
      if (k == root || tree.flow[k] == 0) continue;
      const int64_t p = tree.parent[k], i = tree.is_row(k) ? k : p, j = tree.is_row(k) ? p : k;
      work.entry[entries++] = {int32_t(i), int32_t(j - tree.columns), tree.flow[k]};
    }
  lanes.sync();
  entries = lanes.of_first(entries);
  return pivots;
}

}  // namespace SFR_EXACT_NAMESPACE

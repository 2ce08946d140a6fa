// Any weights, any numbers of patches: the transportation problem by the network simplex method.
//
// A spanning tree of rows and columns carries the flow; potentials make its edges tight. A pivot takes in an edge
// whose cost is below the sum of its potentials, sends flow round the cycle that it closes until an edge is empty,
// and hangs the subtree below that edge elsewhere. Trees are strongly feasible: an edge without flow leads from a row
// up to a column. So no sequence of pivots that move nothing can come round (Cunningham, 1976).
//
// The tree is kept as its parents and its preorder (Barr, Glover and Klingman, 1979).
#pragma once

#include <cmath>
#include <utility>

#include "scan.h"
#include "team.h"

namespace sfr::cpu::SFR_ISA {

struct Entry {
  int32_t row, column;
  int64_t units;
};

// By node; only `flow` and `parent` matter to what the tree is, the rest is its preorder, a ring of all nodes in which
// a subtree is one piece.
struct Tree {
  int64_t* flow = nullptr;  // on the edge to the parent
  int32_t* parent = nullptr;
  int32_t *next = nullptr, *before = nullptr;  // in preorder
  int32_t* last = nullptr;                     // of the subtree, in preorder
  int32_t* seen = nullptr;                     // the last pivot that came by on its way up

  void reserve(Arena& arena, int64_t nodes) {
    flow = arena.take<int64_t>(nodes);
    for (int32_t** field : {&parent, &next, &before, &last, &seen}) *field = arena.take<int32_t>(nodes);
  }

  void link(int64_t k, int64_t l) const {
    next[k] = int32_t(l);
    before[l] = int32_t(k);
  }
};

struct Transportation {
  int64_t n = 0, m = 0, ld = 0;
  int64_t columns = 0;                       // nodes: rows from 0, columns from here
  const double* cost = nullptr;              // [n][ld], padding +inf
  const int64_t *a = nullptr, *b = nullptr;  // [n], [m] units, with the same sum
  double* potential = nullptr;  // [columns + ld]: minus the row's u, the column's v; a subtree shifts as one
  Tree tree;                    // of columns + m nodes
  Entry* entry = nullptr;       // [n + m - 1] the plan to start from, and the last one
  double* u = nullptr;          // [n] at the end
  int64_t *row_left = nullptr, *column_left = nullptr;         // [n], [m] units not placed yet
  int64_t* from = nullptr;                                     // [ld]
  double* room = nullptr;                                      // [ld] v of columns with units left, else -inf
  int32_t *head = nullptr, *link = nullptr, *stack = nullptr;  // entries as lists by node, while the tree is built

  void reserve(Arena& arena, int64_t rows, int64_t most_columns, int64_t row_length) {
    const int64_t first = first_column(rows);
    potential = arena.take<double>(first + row_length);
    tree.reserve(arena, first + most_columns);
    u = arena.take<double>(rows);
    row_left = arena.take<int64_t>(rows);
    column_left = arena.take<int64_t>(most_columns);
    from = arena.take<int64_t>(row_length);
    room = arena.take<double>(row_length);
    head = arena.take<int32_t>(first + most_columns);
    link = arena.take<int32_t>(2 * (rows + most_columns));
    stack = arena.take<int32_t>(first + most_columns);
  }

  // Whole vectors, so that the columns' potentials are aligned.
  static int64_t first_column(int64_t rows) { return (rows + lanes<double> - 1) / lanes<double> * lanes<double>; }

  void set(const double* costs, int64_t row_length, const int64_t* row_units, int64_t rows, const int64_t* column_units,
           int64_t cols) {
    cost = costs;
    ld = row_length;
    a = row_units;
    n = rows;
    b = column_units;
    m = cols;
    columns = first_column(rows);
  }

  const double* costs(int64_t i) const { return cost + i * ld; }
  double* v() const { return potential + columns; }
  bool is_row(int64_t k) const { return k < columns; }
  double edge_cost(int64_t k, int64_t l) const { return is_row(k) ? costs(k)[l - columns] : costs(l)[k - columns]; }
};

// A plan to start from: columns draw on the row they are cheapest for, then rows ship what they have left to the
// cheapest columns with room, by C - v. Every entry empties a row or fills a column, so the entries form a forest.
inline int64_t first_plan(Transportation& work) {
  int64_t count = 0;
  for (int64_t i = 0; i < work.n; ++i) work.row_left[i] = work.a[i];
  for (int64_t j = 0; j < work.m; ++j) work.column_left[j] = work.b[j];
  const auto ship = [&](int64_t i, int64_t j) {
    const int64_t units = work.row_left[i] < work.column_left[j] ? work.row_left[i] : work.column_left[j];
    if (units == 0) return;
    work.entry[count++] = {int32_t(i), int32_t(j), units};
    work.row_left[i] -= units;
    work.column_left[j] -= units;
  };
  column_minima(work.cost, work.n, work.ld, work.v(), work.from);
  for (int64_t j = 0; j < work.m; ++j) ship(work.from[j], j);
  for (int64_t j = 0; j < work.ld; ++j) work.room[j] = j < work.m && work.column_left[j] > 0 ? work.v()[j] : -infinity;
  for (int64_t i = 0; i < work.n; ++i)
    while (work.row_left[i] > 0) {
      const int64_t j = nearest(work.costs(i), work.room, work.ld).column;
      ship(i, j);
      if (work.column_left[j] == 0) set_lane(work.room, j, -infinity);
    }
  return count;
}

// Potentials from the tree, root first. Returns the largest magnitude.
inline double set_potentials(Transportation& work, int64_t root) {
  const Tree& tree = work.tree;
  double largest = 0;
  work.potential[root] = 0;
  for (int64_t k = tree.next[root]; k != root; k = tree.next[k]) {
    const int64_t p = tree.parent[k];
    const double cost = work.edge_cost(k, p);
    // u + v = C, with -u and v in the array.
    const double potential = work.is_row(k) ? work.potential[p] - cost : work.potential[p] + cost;
    work.potential[k] = potential;
    if (std::fabs(potential) > largest) largest = std::fabs(potential);
  }
  return largest;
}

// A spanning tree over the entries, rooted at the first column. What is not connected to it hangs by a row from the
// root, with no flow on that edge. Returns the root.
inline int64_t build_tree(Transportation& work, int64_t entries) {
  const Tree& tree = work.tree;
  const int64_t columns = work.columns, nodes = columns + work.m, root = columns;
  constexpr int32_t unseen = -2, none = -1;
  for (int64_t k = 0; k < nodes; ++k) work.head[k] = none, tree.parent[k] = unseen, tree.seen[k] = 0;
  const auto put = [&](int64_t k, int64_t place) {
    work.link[place] = work.head[k];
    work.head[k] = int32_t(place);
  };
  for (int64_t e = 0; e < entries; ++e) {
    put(work.entry[e].row, 2 * e);
    put(columns + work.entry[e].column, 2 * e + 1);
  }

  int64_t end = root;  // of the preorder so far
  const auto grow = [&](int64_t top, int64_t parent) {
    int64_t waiting = 0;
    const auto hang = [&](int64_t k, int64_t from, int64_t flow) {
      tree.parent[k] = int32_t(from);
      tree.flow[k] = flow;
      work.stack[waiting++] = int32_t(k);
    };
    hang(top, parent, 0);
    while (waiting > 0) {
      const int64_t k = work.stack[--waiting];
      tree.link(end, k);
      end = k;
      for (int32_t place = work.head[k]; place != none; place = work.link[place]) {
        const Entry& e = work.entry[place / 2];
        const int64_t other = work.is_row(k) ? columns + e.column : e.row;
        if (tree.parent[other] == unseen) hang(other, k, e.units);
      }
    }
  };
  grow(root, none);
  for (int64_t i = 0; i < work.n; ++i)
    if (tree.parent[i] == unseen) grow(i, root);
  tree.link(end, root);

  for (int64_t k = 0; k < nodes; ++k) tree.last[k] = none;
  for (int64_t k = end;; k = tree.before[k]) {
    if (tree.last[k] == none) tree.last[k] = int32_t(k);
    if (k == root) return root;
    if (tree.last[tree.parent[k]] == none) tree.last[tree.parent[k]] = tree.last[k];
  }
}

// Takes the subtree of `top` off the tree and hangs it, by its node `k`, below `parent`, with `flow` on the new edge:
// the edges from k up to top turn round.
inline void rehang(const Tree& tree, int64_t k, int64_t top, int64_t parent, int64_t flow) {
  const int64_t old_parent = tree.parent[top], old_last = tree.last[top], old_before = tree.before[top];
  const int64_t old_next = tree.next[old_last];

  // The subtree in its new preorder: what k has below it, then what each node on the way up has besides, in front of
  // its child on that way and behind it.
  int64_t last = tree.last[k], after = tree.next[last], before = tree.before[k], end = last;
  for (int64_t child = k, p = tree.parent[k]; child != top;) {
    const int64_t p_last = tree.last[p], p_after = p_last == last ? after : tree.next[p_last];
    const int64_t p_before = tree.before[p], p_parent = tree.parent[p];
    tree.link(end, p);
    end = before;
    if (p_last != last) {
      tree.link(end, after);
      end = p_last;
    }
    last = p_last, after = p_after, before = p_before;
    child = p, p = p_parent;
  }
  for (int64_t p = k, above = parent;;) {
    const int64_t below = p;
    const int64_t next = tree.parent[p];
    std::swap(flow, tree.flow[p]);
    tree.parent[p] = int32_t(above);
    tree.last[p] = int32_t(end);
    if (p == top) break;
    above = below, p = next;
  }

  tree.link(old_before, old_next);
  for (int64_t p = old_parent; p >= 0 && tree.last[p] == old_last; p = tree.parent[p])
    tree.last[p] = int32_t(old_before);
  tree.link(end, tree.next[parent]);
  tree.link(parent, k);
  for (int64_t p = parent; p >= 0 && tree.last[p] == parent; p = tree.parent[p]) tree.last[p] = int32_t(end);
}

struct Entering {
  double reduced = 0;  // C - u - v
  int64_t row = 0, column = 0;
};

// The edge that comes in is the most negative one of the first few rows that have any, going round from `row`.
inline Entering price(const Transportation& work, double tolerance, int64_t& row) {
  constexpr int64_t few = 2;
  Entering best;
  int64_t left = work.n;
  while (left > 0) {
    const Nearest least = nearest(work.costs(row), work.v(), work.ld);
    const double reduced = least.value + work.potential[row];
    if (reduced < -tolerance) {
      if (best.reduced == 0 && left > few) left = few;
      if (reduced < best.reduced) best = {reduced, row, least.column};
    }
    --left;
    if (++row == work.n) row = 0;
  }
  return best;
}

// Adds to the potentials of a subtree, from both ends of its piece of the ring: the way along it is a chain of loads.
inline void shift_potentials(const Tree& tree, int64_t top, double shift, double* potential) {
  for (int64_t k = top, l = tree.last[top];; k = tree.next[k], l = tree.before[l]) {
    potential[k] += shift;
    if (k == l) break;
    potential[l] += shift;
    if (tree.next[k] == l) break;
  }
}

// Flow goes from the row to the column, and back through the tree: up from the column to the apex and down to the row.
// Edges that lead from a row up to a column lose on the row's side of the cycle, the others on the column's side. Of
// several that run empty at once the last one in the direction of the flow leaves: that keeps the tree strongly
// feasible. `number` counts the pivots.
inline void pivot(Transportation& work, const Entering& edge, int64_t number) {
  const Tree& tree = work.tree;
  const int64_t i = edge.row, j = work.columns + edge.column;
  constexpr int64_t all = std::numeric_limits<int64_t>::max();
  for (int64_t k = i; k >= 0; k = tree.parent[k]) tree.seen[k] = int32_t(number);
  int64_t least_i = all, least_j = all, top_i = i, top_j = j, apex = j;
  for (; tree.seen[apex] != int32_t(number); apex = tree.parent[apex])
    if (!work.is_row(apex) && tree.flow[apex] <= least_j) least_j = tree.flow[apex], top_j = apex;
  for (int64_t k = i; k != apex; k = tree.parent[k])
    if (work.is_row(k) && tree.flow[k] < least_i) least_i = tree.flow[k], top_i = k;
  const bool by_column = least_j <= least_i;
  const int64_t units = by_column ? least_j : least_i;
  if (units > 0) {
    for (int64_t k = i; k != apex; k = tree.parent[k]) tree.flow[k] += work.is_row(k) ? -units : units;
    for (int64_t k = j; k != apex; k = tree.parent[k]) tree.flow[k] += work.is_row(k) ? units : -units;
  }
  const int64_t moved = by_column ? j : i;
  rehang(tree, moved, by_column ? top_j : top_i, by_column ? i : j, units);
  shift_potentials(tree, moved, by_column ? edge.reduced : -edge.reduced, work.potential);
}

// Fills entry, u and v; returns the number of pivots. `entries` is set to the number of edges with flow.
//
// Sums of rounded costs along different paths differ by rounding, so edges count as negative only below a tolerance in
// units of the potentials; and what the pivots left in these is cleared before the last look. Should rounding ever
// lead the pivots round in circles, the tolerance grows until they end.
inline int64_t ship(Transportation& work, Entry* entry, int64_t& entries) {
  work.entry = entry;
  const int64_t root = build_tree(work, first_plan(work)), patience = 1000 * (work.n + work.m);
  for (int64_t j = work.m; j < work.ld; ++j) work.v()[j] = 0;
  double tolerance = 0x1p-48, unit = set_potentials(work, root);
  int64_t pivots = 0, row = 0;
  bool fresh = true;
  for (;;) {
    const Entering edge = price(work, tolerance * unit, row);
    if (edge.reduced < 0) {
      pivot(work, edge, ++pivots);
      fresh = false;
      if (pivots % patience == 0) tolerance *= 2;
    } else if (!fresh) {
      unit = set_potentials(work, root);
      fresh = true;
    } else {
      break;
    }
  }
  row_minima(work.cost, work.v(), work.n, work.ld, work.u);
  entries = 0;
  for (int64_t k = 0; k < work.columns + work.m; ++k) {
    if (k == work.n) k = work.columns;
    if (k == root || work.tree.flow[k] == 0) continue;
    const int64_t p = work.tree.parent[k], i = work.is_row(k) ? k : p, j = work.is_row(k) ? p : k;
    work.entry[entries++] = {int32_t(i), int32_t(j - work.columns), work.tree.flow[k]};
  }
  return pivots;
}

}  // namespace sfr::cpu::SFR_ISA

// Any weights, any numbers of patches: the transportation problem by the network simplex method.
//
// A spanning tree of rows and columns carries the flow; potentials make its edges tight. A pivot takes in an edge
// whose cost is below the sum of its potentials, sends flow round the cycle that it closes until an edge is empty,
// and hangs the subtree below that edge elsewhere. Trees are strongly feasible: an edge without flow leads from a row
// up to a column. So no sequence of pivots that move nothing can come round (Cunningham, 1976).
//
// Potentials are doubles at first. A certificate tells whether these were enough: the gap between both values, and what
// rounding may hide. Where they were not (large costs that an optimal plan avoids, or uses for next to nothing), what
// is left starts from the parts that flow connects, each with potentials of its own, and at last with twice the digits.
#pragma once

#include "costs.h"
#include "tree.h"

namespace SFR_EXACT_NAMESPACE {

// What is left of a plan's value to be gained, at most: by the entries that are not tight, and by edges that rounding
// may have made look tight.
struct Certificate {
  double slack = 0, blur = 0, magnitude = 0;  // magnitude: sum of mass |cost|

  SFR_LANES double gap() const { return slack + blur; }
  SFR_LANES bool holds() const { return gap() <= 0x1p-34 * magnitude; }
};

template <class S>
struct Transportation {
  Costs<S> cost;
  const Units *a = nullptr, *b = nullptr;  // [n], [m], with the same sum
  double* potential = nullptr;             // by node: minus the row's u, the column's v; a subtree shifts as one
  double* low = nullptr;                   // their second parts
  double *u = nullptr, *u_low = nullptr;   // [n] at the end
  Tree tree;
  Entry* entry = nullptr;                             // [n + m - 1] the plan to start from, and the last one
  Units *row_left = nullptr, *column_left = nullptr;  // [n], [m] not placed yet
  int64_t* from = nullptr;                            // [span]
  double* room = nullptr;                             // [span] v of columns with units left, else -inf

  template <class Memory>
  SFR_ANYWHERE void reserve(Memory& memory, int64_t rows, int64_t columns, int64_t row_length, int64_t most_indices) {
    const int64_t first = first_column(rows), nodes = first + columns + 1;
    potential = memory.template take<double>(first + row_length + 1);
    low = memory.template take<double>(first + row_length + 1);
    u = memory.template take<double>(rows);
    u_low = memory.template take<double>(rows);
    tree.reserve(memory, nodes, most_indices);
    entry = memory.template take<Entry>(rows + columns);
    row_left = memory.template take<Units>(rows);
    column_left = memory.template take<Units>(columns);
    from = memory.template take<int64_t>(row_length);
    room = memory.template take<double>(row_length);
  }

  // Whole vectors, so that the columns' potentials are aligned.
  static SFR_ANYWHERE int64_t first_column(int64_t rows) { return (rows + 7) / 8 * 8; }

  SFR_LANES void set(const Costs<S>& costs, const Units* row_units, const Units* column_units) {
    cost = costs;
    a = row_units;
    b = column_units;
    tree.columns = first_column(cost.n);
    tree.root = tree.columns + cost.m;
  }

  SFR_LANES double* v() const { return potential + tree.columns; }
  SFR_LANES double* v_low() const { return low + tree.columns; }
  SFR_LANES Twofold twofold(int64_t k) const { return {potential[k], low[k]}; }
  SFR_LANES void put_potential(int64_t k, Twofold x) const { potential[k] = x.high, low[k] = x.low; }
  SFR_LANES double edge_cost(int64_t k, int64_t l) const {
    return tree.is_row(k) ? cost.at(k, l - tree.columns) : cost.at(l, k - tree.columns);
  }
  // As much as can be; one lane does.
  SFR_LANES void ship(int64_t i, int64_t j, int64_t& count) const {
    const Units units = row_left[i] < column_left[j] ? row_left[i] : column_left[j];
    if (units == 0) return;
    entry[count++] = {int32_t(i), int32_t(j), units};
    row_left[i] -= units;
    column_left[j] -= units;
  }
  // C_ij - u_i - v_j of an entry, by the u that was found at the end.
  SFR_LANES double short_of_tight(const Entry& e) const {
    const int64_t j = tree.columns + e.column;
    return reduced(cost.at(e.row, e.column), potential[j], low[j], -u[e.row], -u_low[e.row]);
  }
};

// Rows ship what they have left to the cheapest columns with room, by C - v, and where no such pair is allowed to any
// with room. Every entry empties a row or fills a column, so that the entries form a forest. Adds to `count`, their
// number; returns how many are forbidden.
template <class S>
SFR_LANES int64_t ship_the_rest(const Lanes& lanes, const Transportation<S>& work, int64_t& count) {
  const Costs<S>& cost = work.cost;
  int64_t detours = 0;
  lanes.each(cost.span,
             [&](int64_t j) { work.room[j] = j < cost.m && work.column_left[j] > 0 ? work.v()[j] : -infinity; });
  for (int64_t i = 0; i < cost.n; ++i)
    while (work.row_left[i] > 0) {
      const Nearest next = nearest(lanes, cost.row(i), AsTheyAre(), work.room, 0, cost.width);
      int64_t j = next.column;
      if (!(next.value < infinity)) {
        ++detours;
        j = lanes.find(cost.m, [&](int64_t k) { return work.column_left[k] > 0; });
      }
      if (lanes.first) {
        work.ship(i, j, count);
        if (work.column_left[j] == 0) put(work.room, j, -infinity);
      }
      lanes.sync();
    }
  count = lanes.of_first(count);
  return detours;
}

// A plan to start from: columns draw on the row they are cheapest for; then rows ship. Returns how many of its entries
// are forbidden.
template <class S>
SFR_LANES int64_t first_plan(const Lanes& lanes, const Transportation<S>& work, int64_t& count) {
  const Costs<S>& cost = work.cost;
  count = 0;  // known to the first lane
  column_minima(lanes, cost, work.v(), work.from);
  lanes.each(cost.n, [&](int64_t i) { work.row_left[i] = work.a[i]; });
  lanes.each(cost.m, [&](int64_t j) { work.column_left[j] = work.b[j]; });
  if (lanes.first)
    for (int64_t j = 0; j < cost.m; ++j) {
      if (work.v()[j] < infinity)
        work.ship(work.from[j], j, count);
      else
        work.v()[j] = 0;
    }
  lanes.sync();
  return ship_the_rest(lanes, work, count);
}

// Potentials from the tree, root first. Those of the rows that hang from the root stay. Returns the largest magnitude.
template <class S, class Reading>
SFR_LANES double set_potentials(const Lanes& lanes, const Transportation<S>& work, Reading read) {
  const Tree& tree = work.tree;
  double largest = 0;
  if (lanes.first) {
    for (int64_t k = tree.next[tree.root]; k != tree.root; k = tree.next[k]) {
      const int64_t p = tree.parent[k];
      if (p != tree.root) {
        const double cost = read(work.edge_cost(k, p));
        // u + v = C, with -u and v in the array.
        work.put_potential(k, work.twofold(p) + Twofold{tree.is_row(k) ? -cost : cost, 0});
      }
      if (fabs(work.potential[k]) > largest) largest = fabs(work.potential[k]);
    }
  }
  lanes.sync();
  return lanes.of_first(largest);
}

struct Entering {
  double reduced = 0;  // C - u - v
  int64_t row = 0, column = 0;
};

// Rows are priced in pieces; where the next one begins.
struct Turn {
  int64_t row = 0, column = 0;
};
constexpr int64_t piece = 1024;

// The edge that comes in is the most negative one of the first few pieces that have any, going round from `place`.
template <class S, class Reading>
SFR_LANES Entering price(const Lanes& lanes, const Transportation<S>& work, Reading read, bool fine, double tolerance,
                         Turn& place) {
  constexpr int64_t few = 2;
  const Costs<S>& cost = work.cost;
  Entering best;
  for (int64_t left = cost.n * ((cost.width + piece - 1) / piece); left > 0; --left) {
    const int64_t begin = place.column, end = cost.width - begin < piece ? cost.width : begin + piece;
    const Twofold minus_u = work.twofold(place.row);  // before the lanes' barrier: a pivot may follow
    const S* row = cost.row(place.row);
    Nearest least;
    if (fine) {
      least = nearest_of_twofold(lanes, row, read, work.v(), work.v_low(), minus_u, begin, end);
    } else {
      least = nearest(lanes, row, read, work.v(), begin, end);
      least.value += minus_u.high;
    }
    if (least.value < -tolerance) {
      if (best.reduced == 0 && left > few) left = few;
      if (least.value < best.reduced) best = {least.value, place.row, least.column};
    }
    place.column = end;
    if (end == cost.width) {
      place.column = 0;
      if (++place.row == cost.n) place.row = 0;
    }
  }
  return best;
}

// Pivots until no edge is to be gained from. Returns their number.
//
// Sums of rounded costs along different paths differ by rounding, so edges count as negative only below a tolerance in
// units of the potentials; and what the pivots left in these is cleared before the last look. Should rounding ever
// lead the pivots round in circles, the tolerance grows until they end.
template <class S, class Reading>
SFR_LANES int64_t pivot_to_the_end(const Lanes& lanes, const Transportation<S>& work, Reading read, bool fine,
                                   int64_t entries) {
  const Tree& tree = work.tree;
  if (lanes.first) build_tree(tree, work.entry, entries, work.cost.n);
  lanes.sync();
  // No scan chooses the root, or what is behind it.
  lanes.each(work.cost.span + 1 - work.cost.m, [&](int64_t j) { work.v()[work.cost.m + j] = -infinity; });
  const auto forget = [&](int64_t k) { work.low[k] = 0; };
  const int64_t patience = 1000 * (work.cost.n + work.cost.m);
  double tolerance = fine ? 0x1p-98 : 0x1p-48, unit = set_potentials(lanes, work, read);
  int64_t pivots = 0;
  Turn place;
  if (!fine) lanes.each(tree.columns + work.cost.span, forget);
  for (bool fresh = true;;) {
    const Entering edge = price(lanes, work, read, fine, tolerance * unit, place);
    if (edge.reduced < 0) {
      ++pivots;
      if (lanes.first) {
        const Moved moved = pivot(tree, edge.row, edge.column, pivots);
        const double shift = moved.by_column ? edge.reduced : -edge.reduced;
        if (fine)
          over_subtree(tree, moved.top, [&](int64_t k) { work.put_potential(k, work.twofold(k) + Twofold{shift, 0}); });
        else
          over_subtree(tree, moved.top, [&](int64_t k) { work.potential[k] += shift; });
      }
      lanes.sync();
      fresh = false;
      if (pivots % patience == 0) tolerance *= 2;
    } else if (!fresh) {
      unit = set_potentials(lanes, work, read);
      if (!fine) lanes.each(tree.columns + work.cost.span, forget);
      fresh = true;
    } else {
      return pivots;
    }
  }
}

// The edges with flow; returns their number.
template <class S>
SFR_LANES int64_t list_entries(const Lanes& lanes, const Transportation<S>& work) {
  const Tree& tree = work.tree;
  int64_t entries = 0;
  if (lanes.first)
    for (int64_t k = tree.next[tree.root]; k != tree.root; k = tree.next[k]) {
      if (tree.flow[k] == 0) continue;
      const int64_t p = tree.parent[k], i = tree.is_row(k) ? k : p, j = tree.is_row(k) ? p : k;
      work.entry[entries++] = {int32_t(i), int32_t(j - tree.columns), tree.flow[k]};
    }
  lanes.sync();
  return lanes.of_first(entries);
}

// u from v, and how far `entries` with these potentials are from a proof. `unit` is the mass of one.
template <class S>
SFR_LANES Certificate certify(const Lanes& lanes, const Transportation<S>& work, bool fine, int64_t entries,
                              double unit) {
  const Costs<S>& cost = work.cost;
  if (fine) {
    for (int64_t i = 0; i < cost.n; ++i) {
      const int64_t j =
          nearest_of_twofold(lanes, cost.row(i), AsTheyAre(), work.v(), work.v_low(), {}, 0, cost.width).column;
      if (lanes.first) {
        const Twofold u = Twofold{cost.at(i, j), 0} + -Twofold{work.v()[j], work.v_low()[j]};
        work.u[i] = u.high, work.u_low[i] = u.low;
      }
    }
    lanes.sync();
  } else {
    row_minima(lanes, cost, work.v(), work.u);
    lanes.each(cost.n, [&](int64_t i) { work.u_low[i] = 0; });
  }
  const auto mass = [&](int64_t k) { return double(work.entry[k].units) * unit; };
  Certificate out;
  out.slack = lanes.sum(entries, [&](int64_t k) {
    const double slack = work.short_of_tight(work.entry[k]);
    return slack > 0 ? mass(k) * slack : 0;
  });
  out.magnitude =
      lanes.sum(entries, [&](int64_t k) { return mass(k) * fabs(cost.at(work.entry[k].row, work.entry[k].column)); });
  const double largest = -lanes.least(cost.n, [&](int64_t i) { return -fabs(work.u[i]); });
  out.blur = lanes.sum(entries, mass) * largest * (fine ? 0x1p-103 : 0x1p-53);
  return out;
}

// From `entries` of a plan, and the potentials of rows, which stay as they are where they can: an optimal plan, u and
// v. `parts`: potentials of rows are nothing to start from. Counts the pivots.
template <class S>
SFR_LANES Certificate improve(const Lanes& lanes, const Transportation<S>& work, bool parts, double unit,
                              int64_t& entries, int64_t& pivots) {
  constexpr int rounds = 6;
  for (int round = parts ? 1 : 0;; ++round) {
    const bool fine = round > 1;
    if (round > 0) lanes.each(work.cost.n, [&](int64_t i) { work.put_potential(i, {}); });
    pivots += pivot_to_the_end(lanes, work, AsTheyAre(), fine, entries);
    entries = list_entries(lanes, work);
    const Certificate found = certify(lanes, work, fine, entries, unit);
    if (found.holds() || round == rounds) return found;
  }
}

// Which rows and columns allowed pairs connect, directly or through others, and what masses they have together. One
// lane does; in the tree's memory.
template <class S>
struct Blocks {
  int32_t* above;  // by node; of one in each block: itself
  Units* mass;     // of that one, of both sides
  int64_t columns;

  explicit SFR_LANES Blocks(const Transportation<S>& work)
      : above(work.tree.head), mass(work.tree.flow), columns(work.tree.columns) {
    const Costs<S>& cost = work.cost;
    const auto each_node = [&](auto f) {
      for (int64_t i = 0; i < cost.n; ++i) f(i, work.a[i]);
      for (int64_t j = 0; j < cost.m; ++j) f(columns + j, work.b[j]);
    };
    each_node([&](int64_t k, Units) { above[k] = int32_t(k), mass[k] = 0; });
    for (int64_t i = 0; i < cost.n; ++i) {
      const S* row = cost.row(i);
      for (int64_t j = 0; j < cost.m; ++j)
        if (double(row[j]) < infinity) above[top(columns + j)] = int32_t(top(i));
    }
    each_node([&](int64_t k, Units units) { mass[top(k)] += units; });
  }

  SFR_LANES int64_t top(int64_t k) const {
    while (above[k] != k) k = above[k] = above[above[k]];
    return k;
  }
};

// Weights that should add up to the same in two parts that must trade with each other may not, by their rounding. Takes
// forbidden entries out if all that these move in or out of a block is within `tolerance` of what it has. One lane
// does; returns whether none is left.
template <class S>
SFR_LANES bool forgive_rounding(const Transportation<S>& work, double tolerance, int64_t& entries) {
  const Costs<S>& cost = work.cost;
  const auto allowed = [&](int64_t i, int64_t j) { return cost.at(i, j) < infinity; };
  const Blocks<S> blocks(work);
  double* moved = work.low;  // by a block's top
  for (int64_t k = 0; k < blocks.columns + cost.m; ++k) moved[k] = 0;
  int64_t left = 0;
  for (int64_t k = 0; k < entries; ++k) {
    const Entry e = work.entry[k];
    if (allowed(e.row, e.column)) {
      work.entry[left++] = e;
      continue;
    }
    for (const int64_t node : {int64_t(e.row), blocks.columns + e.column}) {
      const int64_t top = blocks.top(node);
      moved[top] += double(e.units);
      if (moved[top] > tolerance * double(blocks.mass[top]) / 2) return false;
    }
  }
  entries = left;
  // A column that gets nothing has no place in the tree: it gets one unit.
  int32_t* served = work.tree.stack;
  for (int64_t j = 0; j < cost.m; ++j) served[j] = 0;
  for (int64_t k = 0; k < entries; ++k) served[work.entry[k].column] = 1;
  for (int64_t j = 0; j < cost.m; ++j) {
    if (served[j]) continue;
    int64_t i = 0;
    while (!allowed(i, j)) ++i;
    work.entry[entries++] = {int32_t(i), int32_t(j), 1};
  }
  return true;
}

// Makes of a plan with `detours` over forbidden pairs one without, by the same method at a price of 1 for each of
// these. False: there is none, even where sums of weights are off by `tolerance` of them. The potentials of rows are 0
// afterwards.
template <class S>
SFR_LANES bool avoid(const Lanes& lanes, const Transportation<S>& work, double tolerance, int64_t& entries,
                     int64_t& pivots) {
  const auto level = [&](int64_t i) { work.put_potential(i, {}); };
  lanes.each(work.cost.n, level);
  pivots += pivot_to_the_end(lanes, work, Forbidden(), false, entries);
  entries = list_entries(lanes, work);
  lanes.each(work.cost.n, level);
  const auto forbidden = [&](int64_t k) { return !(work.cost.at(work.entry[k].row, work.entry[k].column) < infinity); };
  if (lanes.find(entries, forbidden) == entries) return true;
  bool forgiven = false;
  if (lanes.first) forgiven = forgive_rounding(work, tolerance, entries);
  lanes.sync();
  entries = lanes.of_first(entries);
  return lanes.of_first(int32_t(forgiven)) != 0;
}

}  // namespace SFR_EXACT_NAMESPACE

// The spanning tree of the network simplex method: what one lane does by itself.
//
// Nodes are the rows, from 0, and the columns, from `columns`. The tree is its parents; its preorder, a ring of all
// nodes in which a subtree is one piece, is kept beside them (Barr, Glover and Klingman, 1979).
//
// The root is one more column, which nobody ships to. What flow does not connect hangs from it by rows, on edges of
// whatever cost suits: in a strongly feasible tree these can only leave. So the potentials of one such part owe nothing
// to another's, however far their costs are apart.
#pragma once

#include "masses.h"
#include "twofold.h"

namespace SFR_EXACT_NAMESPACE {

struct Entry {
  int32_t row, column;
  Units units;
};

struct Tree {
  int64_t columns = 0, root = 0;               // number of the first column's node; of the root, the last one
  Units* flow = nullptr;                       // on the edge to the parent
  int32_t* parent = nullptr;                   // of the root: none
  int32_t *next = nullptr, *before = nullptr;  // in preorder
  int32_t* last = nullptr;                     // of the subtree, in preorder
  int32_t* seen = nullptr;                     // the last pivot that came by on its way up
  // While the tree is built: entries as lists by node, and nodes that wait.
  int32_t *head = nullptr, *link = nullptr, *stack = nullptr;
  int32_t* indices = nullptr;  // where all of these lie
  int64_t indices_size = 0;

  template <class Memory>
  SFR_ANYWHERE void reserve(Memory& memory, int64_t count, int64_t more) {
    flow = memory.template take<Units>(count);
    indices_size = 9 * count > more ? 9 * count : more;
    indices = memory.template take<int32_t>(indices_size);
    int32_t* left = indices;
    for (int32_t** array : {&parent, &next, &before, &last, &seen, &head, &stack, &link}) *array = left, left += count;
  }

  SFR_LANES bool is_row(int64_t k) const { return k < columns; }
  SFR_LANES void follow(int64_t k, int64_t l) const {
    next[k] = int32_t(l);
    before[l] = int32_t(k);
  }

  static constexpr int32_t none = -1, unseen = -2;
};

// Hangs `top` below `parent`, and below it what the entries connect to it, behind `end` of the preorder. Returns the
// new end.
SFR_LANES int64_t grow(const Tree& tree, const Entry* entry, int64_t top, int64_t parent, int64_t end) {
  int64_t waiting = 0;
  const auto hang = [&](int64_t k, int64_t from, Units flow) {
    tree.parent[k] = int32_t(from);
    tree.flow[k] = flow;
    tree.stack[waiting++] = int32_t(k);
  };
  hang(top, parent, 0);
  while (waiting > 0) {
    const int64_t k = tree.stack[--waiting];
    tree.follow(end, k);
    end = k;
    for (int32_t place = tree.head[k]; place != Tree::none; place = tree.link[place]) {
      const Entry& e = entry[place / 2];
      const int64_t other = tree.is_row(k) ? tree.columns + e.column : e.row;
      if (tree.parent[other] == Tree::unseen) hang(other, k, e.units);
    }
  }
  return end;
}

// A spanning tree over the entries, a forest that leaves no row and no column out.
SFR_LANES void build_tree(const Tree& tree, const Entry* entry, int64_t entries, int64_t rows) {
  const int64_t root = tree.root;
  for (int64_t k = 0; k <= root; ++k) {
    tree.head[k] = tree.last[k] = Tree::none;
    tree.parent[k] = Tree::unseen;
    tree.seen[k] = 0;
  }
  for (int64_t place = 0; place < 2 * entries; ++place) {
    const Entry& e = entry[place / 2];
    const int64_t k = place % 2 == 0 ? e.row : tree.columns + e.column;
    tree.link[place] = tree.head[k];
    tree.head[k] = int32_t(place);
  }
  tree.parent[root] = Tree::none;
  tree.flow[root] = 0;
  int64_t end = root;
  for (int64_t i = 0; i < rows; ++i)
    if (tree.parent[i] == Tree::unseen) end = grow(tree, entry, i, root, end);
  tree.follow(end, root);
  for (int64_t k = end;; k = tree.before[k]) {
    if (tree.last[k] == Tree::none) tree.last[k] = int32_t(k);
    if (k == root) return;
    if (tree.last[tree.parent[k]] == Tree::none) tree.last[tree.parent[k]] = tree.last[k];
  }
}

// Takes the subtree of `top` off the tree and hangs it, by its node `k`, below `parent`, with `flow` on the new edge:
// the edges from k up to top turn round.
SFR_LANES void rehang(const Tree& tree, int64_t k, int64_t top, int64_t parent, Units flow) {
  const int64_t old_parent = tree.parent[top], old_last = tree.last[top], old_before = tree.before[top];
  const int64_t old_next = tree.next[old_last];

  // The subtree in its new preorder: what k has below it, then what each node on the way up has besides, in front of
  // its child on that way and behind it.
  int64_t last = tree.last[k], after = tree.next[last], before = tree.before[k], end = last;
  for (int64_t child = k, p = tree.parent[k]; child != top;) {
    const int64_t p_last = tree.last[p], p_after = p_last == last ? after : tree.next[p_last];
    const int64_t p_before = tree.before[p], p_parent = tree.parent[p];
    tree.follow(end, p);
    end = before;
    if (p_last != last) {
      tree.follow(end, after);
      end = p_last;
    }
    last = p_last, after = p_after, before = p_before;
    child = p, p = p_parent;
  }
  for (int64_t p = k, above = parent;;) {
    const int64_t old_above = tree.parent[p];
    const Units old_flow = tree.flow[p];
    tree.parent[p] = int32_t(above);
    tree.flow[p] = flow;
    tree.last[p] = int32_t(end);
    if (p == top) break;
    above = p, p = old_above, flow = old_flow;
  }

  tree.follow(old_before, old_next);
  for (int64_t p = old_parent; p >= 0 && tree.last[p] == old_last; p = tree.parent[p])
    tree.last[p] = int32_t(old_before);
  tree.follow(end, tree.next[parent]);
  tree.follow(parent, k);
  for (int64_t p = parent; p >= 0 && tree.last[p] == parent; p = tree.parent[p]) tree.last[p] = int32_t(end);
}

// f(node) for a subtree, from both ends of its piece of the ring: the way along it is a chain of loads.
template <class F>
SFR_LANES void over_subtree(const Tree& tree, int64_t top, F&& f) {
  for (int64_t k = top, l = tree.last[top];; k = tree.next[k], l = tree.before[l]) {
    f(k);
    if (k == l) break;
    f(l);
    if (tree.next[k] == l) break;
  }
}

// A subtree that a pivot hung elsewhere, and whether by its column.
struct Moved {
  int64_t top;
  bool by_column;
};

// The edge from row i to column j comes in.
//
// Flow goes from the row to the column, and back through the tree: up from the column to the apex and down to the row.
// Edges that lead from a row up to a column lose on the row's side of the cycle, the others on the column's side. Of
// several that run empty at once the last one in the direction of the flow leaves: that keeps the tree strongly
// feasible. `number` counts the pivots.
SFR_LANES Moved pivot(const Tree& tree, int64_t row, int64_t column, int64_t number) {
  const int64_t i = row, j = tree.columns + column;
  for (int64_t k = i; k >= 0; k = tree.parent[k]) tree.seen[k] = int32_t(number);
  constexpr Units unbounded = Units(1) << 126;
  Units least_i = unbounded, least_j = unbounded;
  int64_t top_i = i, top_j = j, apex = j;
  for (; tree.seen[apex] != int32_t(number); apex = tree.parent[apex])
    if (!tree.is_row(apex) && tree.flow[apex] <= least_j) least_j = tree.flow[apex], top_j = apex;
  for (int64_t k = i; k != apex; k = tree.parent[k])
    if (tree.is_row(k) && tree.flow[k] < least_i) least_i = tree.flow[k], top_i = k;
  const bool by_column = least_j <= least_i;
  const Units units = by_column ? least_j : least_i;
  if (units > 0) {
    for (int64_t k = i; k != apex; k = tree.parent[k]) tree.flow[k] += tree.is_row(k) ? -units : units;
    for (int64_t k = j; k != apex; k = tree.parent[k]) tree.flow[k] += tree.is_row(k) ? units : -units;
  }
  const int64_t moved = by_column ? j : i;
  rehang(tree, moved, by_column ? top_j : top_i, by_column ? i : j, units);
  return {moved, by_column};
}

}  // namespace SFR_EXACT_NAMESPACE

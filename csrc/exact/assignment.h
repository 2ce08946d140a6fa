// Equal weights on equally many patches: a permutation of least cost (Jonker and Volgenant, 1987).
//
// u_i + v_j <= C_ij throughout, with equality along the matching; u is only known at the end. A start from column
// minima and from rows that outbid each other leaves few rows without a column. For each of those, Dijkstra's search
// for the nearest free column under the costs C_ij - u_i - v_j: one row is scanned for each column that is reached.
#pragma once

namespace SFR_EXACT_NAMESPACE {

template <class S>
struct Assignment {
  int64_t n = 0, ld = 0;
  const S* cost = nullptr;       // [n][ld], padding +inf
  double* u = nullptr;           // [n]
  double* v = nullptr;           // [ld]
  int32_t* column = nullptr;     // [n] of each row; -1: none yet
  int32_t* row = nullptr;        // [n] of each column; -1: free
  double* open = nullptr;        // [ld] v where the search has not been, else -inf: nothing is relaxed there
  double* distance = nullptr;    // [ld] from the search's root; +inf where it has been
  int64_t* from = nullptr;       // [ld] row that a column is reached from
  int32_t* reached = nullptr;    // [n] columns in the order of the search
  double* reached_at = nullptr;  // [n]
  int32_t* waiting = nullptr;    // [n] rows without a column

  template <class Memory>
  SFR_ANYWHERE void reserve(Memory& memory, int64_t size, int64_t row_length) {
    u = memory.template take<double>(size);
    v = memory.template take<double>(row_length);
    column = memory.template take<int32_t>(size);
    row = memory.template take<int32_t>(size);
    open = memory.template take<double>(row_length);
    distance = memory.template take<double>(row_length);
    from = memory.template take<int64_t>(row_length);
    reached = memory.template take<int32_t>(size);
    reached_at = memory.template take<double>(size);
    waiting = memory.template take<int32_t>(size);
  }

  SFR_LANES const S* costs(int64_t i) const { return cost + i * ld; }
  SFR_LANES double cost_at(int64_t i, int64_t j) const { return double(cost[i * ld + j]); }

  SFR_LANES void match(int64_t i, int64_t j) const {
    column[i] = int32_t(j);
    row[j] = int32_t(i);
  }
};

// Every column goes to the row it is cheapest for, if that is still to be had. Returns how many rows wait.
template <class S>
SFR_LANES int64_t start_from_minima(const Lanes& lanes, const Assignment<S>& work) {
  const int64_t n = work.n;
  column_minima(lanes, work.cost, n, work.ld, work.v, work.from);
  lanes.each(work.ld - n, [&](int64_t j) { work.v[n + j] = 0; });
  lanes.each(n, [&](int64_t i) { work.column[i] = work.row[i] = -1; });
  int64_t count = 0;
  if (lanes.first) {
    for (int64_t j = 0; j < n; ++j)
      if (work.column[work.from[j]] < 0) work.match(work.from[j], j);
    for (int64_t i = 0; i < n; ++i)
      if (work.column[i] < 0) work.waiting[count++] = int32_t(i);
  }
  lanes.sync();
  return lanes.of_first(count);
}

// A row that only one column wanted can lower that column's v by what its second choice costs more: nobody comes off
// worse.
template <class S>
SFR_LANES void transfer(const Lanes& lanes, const Assignment<S>& work) {
  const int64_t n = work.n;
  int32_t* wanted = work.reached;  // by how many columns; the array is not needed yet
  lanes.each(n, [&](int64_t i) { wanted[i] = 0; });
  if (lanes.first)
    for (int64_t j = 0; j < n; ++j) ++wanted[work.from[j]];
  lanes.sync();
  for (int64_t i = 0; i < n && n > 1; ++i) {
    if (wanted[i] != 1) continue;
    const int64_t j = work.column[i];
    const TwoNearest choice = two_nearest(lanes, work.costs(i), work.v, work.ld);
    if (lanes.first)
      work.v[j] -= (choice.column == j ? choice.second : choice.value) - (work.cost_at(i, j) - work.v[j]);
    lanes.sync();
  }
}

// A waiting row takes its first choice and lowers that column's v to where the second is as good; the row it turned
// out bids next. On some costs two rows outbid each other for ever so little, hence a limit. Returns how many wait.
template <class S>
SFR_LANES int64_t outbid(const Lanes& lanes, const Assignment<S>& work, int64_t count) {
  const int64_t n = work.n;
  int64_t bids = n, next = 0, left = 0;
  while (next < count) {
    const int64_t i = work.waiting[next++];
    const TwoNearest choice = two_nearest(lanes, work.costs(i), work.v, work.ld);
    int64_t j = choice.column;
    const double lower = work.v[j] - (choice.second - choice.value);
    const bool strictly = lower < work.v[j];
    if (!strictly && work.row[j] >= 0)
      for (int64_t k = j + 1; k < n; ++k)
        if (work.row[k] < 0 && work.cost_at(i, k) - work.v[k] == choice.value) {
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
  return left;
}

// The shortest path from a waiting row to a free column; the matching changes along it, and v so that the path's
// edges, and all of the search's, stay tight.
template <class S>
SFR_LANES void augment(const Lanes& lanes, const Assignment<S>& work, int64_t root) {
  lanes.each(work.ld, [&](int64_t j) {
    work.open[j] = work.v[j];
    work.distance[j] = infinity;
  });
  int64_t i = root, count = 0;
  double shift = 0;
  Nearest next;
  for (;;) {
    next = relax(lanes, work.costs(i), work.open, shift, work.distance, work.from, i, work.ld);
    const int64_t j = next.column;
    if (work.row[j] < 0) break;
    if (lanes.first) {
      work.reached[count] = int32_t(j);
      work.reached_at[count] = next.value;
      put(work.open, j, -infinity);
      put(work.distance, j, infinity);
    }
    ++count;
    i = work.row[j];
    shift = next.value - (work.cost_at(i, j) - work.v[j]);
    lanes.sync();
  }
  lanes.each(count, [&](int64_t k) { work.v[work.reached[k]] += work.reached_at[k] - next.value; });
  if (lanes.first)
    for (int64_t j = next.column;;) {
      i = work.from[j];
      const int64_t before = work.column[i];
      work.match(i, j);
      if (i == root) break;
      j = before;
    }
  lanes.sync();
}

// The value from u and v is that of the matching, to rounding. Bids may bring a cost into v that the matching then
// avoids; where that is far above all others (a forbidden pair), u and v are mostly rounding.
template <class S>
SFR_LANES bool certified(const Lanes& lanes, const Assignment<S>& work) {
  const auto cost = [&](int64_t i) { return work.cost_at(i, work.column[i]); };
  const double primal = lanes.sum(work.n, cost);
  const double magnitude = lanes.sum(work.n, [&](int64_t i) { return fabs(cost(i)); });
  const double rows = lanes.sum(work.n, [&](int64_t i) { return work.u[i]; });
  const double columns = lanes.sum(work.n, [&](int64_t j) { return work.v[j]; });
  return fabs(primal - (rows + columns)) <= 0x1p-40 * magnitude;
}

// Fills column, u and v; returns the number of searches.
template <class S>
SFR_LANES int64_t assign(const Lanes& lanes, const Assignment<S>& work) {
  int64_t waiting = start_from_minima(lanes, work), searches = 0;
  transfer(lanes, work);
  waiting = outbid(lanes, work, waiting);
  for (bool again = false;; again = true) {
    for (int64_t k = 0; k < waiting; ++k) augment(lanes, work, work.waiting[k]);
    searches += waiting;
    row_minima(lanes, work.cost, work.v, work.n, work.ld, work.u);
    if (again || certified(lanes, work)) return searches;
    waiting = start_from_minima(lanes, work);
  }
}

}  // namespace SFR_EXACT_NAMESPACE

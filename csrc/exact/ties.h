// Many pairs of the same cost (0 or 1, small integers): many rows find a column along tight pairs, without a search of
// its own for each.
//
// A bit for each pair says whether it is tight. Paths along these are found depth first, with no column seen twice in a
// pass (Pothen and Fan, 1990). When no more are to be had, one search from all rows that wait lowers v until another
// free column is in reach.
#pragma once

#include "assignment.h"

namespace SFR_EXACT_NAMESPACE {

struct TightPairs {
  int64_t length;    // words of a row: a bit for each column
  uint32_t* tight;   // [n length]
  uint32_t* vacant;  // [length] columns that are free
  uint32_t* unseen;  // [length] columns that this pass has not come to
  int32_t* next;     // [n] the word of its row where the pass goes on
  int32_t* path;     // [n] rows, from the one that waits

  static SFR_ANYWHERE int64_t words(int64_t columns) { return (columns + 31) / 32; }
  // Of what it needs, in indices.
  static SFR_ANYWHERE int64_t size(int64_t rows, int64_t columns) { return (rows + 2) * words(columns) + 2 * rows; }

  SFR_LANES TightPairs(int32_t* memory, int64_t rows, int64_t columns)
      : length(words(columns)),
        tight(reinterpret_cast<uint32_t*>(memory)),
        vacant(tight + rows * length),
        unseen(vacant + length),
        next(reinterpret_cast<int32_t*>(unseen + length)),
        path(next + rows) {}

  // The first column of both sets, from a word on; -1: none. `word`: where it is.
  SFR_LANES int64_t first_of(int64_t i, const uint32_t* set, int64_t& word) const {
    const uint32_t* row = tight + i * length;
    for (; word < length; ++word)
      if (const uint32_t both = row[word] & set[word]) return 32 * word + lowest_bit(both);
    return -1;
  }
  static SFR_LANES void remove(uint32_t* set, int64_t j) { set[j / 32] &= ~(uint32_t(1) << (j % 32)); }
};

// Of the rows that are marked by next < 0. In the others' rows the columns in `unseen` are tight no more.
template <class S>
SFR_LANES void find_tight(const Lanes& lanes, const Assignment<S>& work, const TightPairs& pairs) {
  const Costs<S>& cost = work.cost;
  for (int64_t i = 0; i < cost.n; ++i) {
    uint32_t* words = pairs.tight + i * pairs.length;
    if (pairs.next[i] >= 0) {
      lanes.each(pairs.length, [&](int64_t k) { words[k] &= ~pairs.unseen[k]; });
      continue;
    }
    const int64_t j = work.column[i];
    const double u =
        j < 0 ? nearest(lanes, cost.row(i), AsTheyAre(), work.v, 0, cost.width).value : cost.at(i, j) - work.v[j];
    mark_tight(lanes, cost.row(i), work.v, u < infinity ? u : -infinity, cost.width, words);
  }
}

// A path from a row that waits to a free column; the matching changes along it. One lane does.
template <class S>
SFR_LANES bool follow(const Assignment<S>& work, const TightPairs& pairs, int64_t root) {
  pairs.path[0] = int32_t(root);
  for (int64_t depth = 0; depth >= 0;) {
    int64_t i = pairs.path[depth], word = 0;
    int64_t j = pairs.next[i] == 0 ? pairs.first_of(i, pairs.vacant, word) : -1;
    if (j >= 0) {
      pairs.remove(pairs.vacant, j);
      for (;;) {
        const int64_t before = work.column[i];
        work.match(i, j);
        if (depth == 0) return true;
        j = before;
        i = pairs.path[--depth];
      }
    }
    word = pairs.next[i];
    j = pairs.first_of(i, pairs.unseen, word);
    pairs.next[i] = int32_t(word);
    if (j < 0) {
      --depth;
    } else {
      pairs.remove(pairs.unseen, j);
      pairs.path[++depth] = work.row[j];
    }
  }
  return false;
}

// As many rows as can be get a column along tight pairs. Returns how many wait still.
template <class S>
SFR_LANES int64_t match_tight(const Lanes& lanes, const Assignment<S>& work, const TightPairs& pairs, int64_t waiting) {
  lanes.each(pairs.length, [&](int64_t k) { pairs.vacant[k] = 0; });
  if (lanes.first) {
    for (int64_t j = 0; j < work.cost.m; ++j)
      if (work.row[j] < 0) pairs.vacant[j / 32] |= uint32_t(1) << (j % 32);
    for (bool more = true; more;) {
      for (int64_t i = 0; i < work.cost.n; ++i) pairs.next[i] = 0;
      for (int64_t k = 0; k < pairs.length; ++k) pairs.unseen[k] = ~uint32_t(0);
      int64_t left = 0;
      for (int64_t k = 0; k < waiting; ++k)
        if (!follow(work, pairs, work.waiting[k])) work.waiting[left++] = work.waiting[k];
      more = left > 0 && left < waiting;
      waiting = left;
    }
  }
  lanes.sync();
  return lanes.of_first(waiting);
}

// One search from all waiting rows: lowers v until one of them can reach a free column along tight pairs. Marks what
// `find_tight` is to look at again. False: there is no matching.
template <class S>
SFR_LANES bool approach(const Lanes& lanes, const Assignment<S>& work, const TightPairs& pairs, int64_t waiting,
                        int64_t& count) {
  const Costs<S>& cost = work.cost;
  const int64_t vacancies = cost.n == cost.m ? list_vacant(lanes, work) : 0;
  begin_search(lanes, work);
  count = 0;
  Nearest end;
  for (int64_t k = 0; k < waiting; ++k) {
    const int64_t i = work.waiting[k];
    const double u = nearest(lanes, cost.row(i), AsTheyAre(), work.v, 0, cost.width).value;
    if (!(u < infinity)) return false;
    if (k + 1 < waiting)
      relax(lanes, cost.row(i), work.open, -u, work.distance, work.from, i, cost.width);
    else
      end = search(lanes, work, i, -u, vacancies, count);
  }
  if (!(end.value < infinity)) return false;
  tighten(lanes, work, count, end.value);
  lanes.each(cost.n, [&](int64_t i) { pairs.next[i] = work.column[i] < 0 ? -1 : 0; });
  lanes.each(pairs.length, [&](int64_t k) { pairs.unseen[k] = 0; });
  if (lanes.first)
    for (int64_t k = 0; k < count; ++k) {
      const int64_t j = work.reached[k];
      pairs.next[work.row[j]] = -1;
      pairs.unseen[j / 32] |= uint32_t(1) << (j % 32);
    }
  lanes.sync();
  return true;
}

// Returns how many rows wait still; -1: there is no matching. `scans` and `searches` as in `assign`.
template <class S>
SFR_LANES int64_t match_ties(const Lanes& lanes, const Assignment<S>& work, int64_t waiting, int64_t& scans,
                             int64_t& searches) {
  const int64_t n = work.cost.n;
  const TightPairs pairs(work.spare, n, work.cost.width);  // span may have a word more, which nothing marks
  const int64_t few = n / 64;                              // for these a search each is quicker
  if (waiting <= few) return waiting;
  lanes.each(n, [&](int64_t i) { pairs.next[i] = -1; });
  for (int64_t reached = n;;) {
    scans -= 2 * (waiting + reached);
    find_tight(lanes, work, pairs);
    const int64_t before = waiting;
    waiting = match_tight(lanes, work, pairs, waiting);
    if (waiting <= few || (searches > 0 && 8 * (before - waiting) < before)) return waiting;
    if (!approach(lanes, work, pairs, waiting, reached)) return -1;
    ++searches;
  }
}

enum class Matched { all, some, impossible };

// Fills column, u and v. `some`: what is left would be slow this way, and `waiting` rows of the list wait. `scans` is
// how many rows may be scanned in searches; counts the searches.
template <class S>
SFR_LANES Matched assign(const Lanes& lanes, Assignment<S>& work, int64_t scans, int64_t& waiting, int64_t& searches) {
  const int64_t n = work.cost.n, m = work.cost.m;
  clear(lanes, work);
  waiting = n;
  work.closed = nullptr;
  bool lowered = false;
  if (n == m) {
    waiting = start_from_minima(lanes, work);
    if (lanes.find(m, [&](int64_t j) { return !(work.v[j] < infinity); }) < m) return Matched::impossible;
    if (waiting == 0) {
      lanes.each(n, [&](int64_t i) { work.u[i] = 0; });
      return Matched::all;
    }
    lowered = transfer(lanes, work);
  }
  const Bids bids = outbid(lanes, work, waiting);
  waiting = bids.waiting;
  if (2 * bids.ties > bids.made) waiting = match_ties(lanes, work, waiting, scans, searches);
  if (waiting < 0) return Matched::impossible;
  int64_t vacancies = n == m ? list_vacant(lanes, work) : 0;
  while (waiting > 0) {
    const Search search = augment(lanes, work, work.waiting[waiting - 1], vacancies);
    if (!search.found) return Matched::impossible;
    ++searches;
    --waiting;
    scans -= search.reached + 1;
    if (scans < 0) break;
  }
  // Where no v was lowered every row is at its least already.
  if (waiting == 0 && !lowered && !bids.lowered && searches == 0)
    lanes.each(n, [&](int64_t i) { work.u[i] = work.cost.at(i, work.column[i]) - work.v[work.column[i]]; });
  else
    row_minima(lanes, work.cost, work.v, work.u);
  return waiting == 0 ? Matched::all : Matched::some;
}

}  // namespace SFR_EXACT_NAMESPACE

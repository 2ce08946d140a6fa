// What csrc/exact is made of on a GPU: the 32 lanes of one warp, and scans over a row of costs. Ties go to the first
// column: the same bits as on a CPU.
#pragma once

#include <cmath>
#include <limits>

#include "features.cuh"

#define SFR_EXACT_NAMESPACE sfr::cuda
#define SFR_LANES __device__ inline
#define SFR_ANYWHERE __host__ __device__ inline

namespace sfr::cuda {

constexpr double infinity = std::numeric_limits<double>::infinity();

// What the first lane does alone is between two barriers; each of these functions ends with one.
struct Lanes {
  int lane;
  bool first;

  SFR_DEVICE explicit Lanes(int number) : lane(number), first(number == 0) {}

  SFR_DEVICE void sync() const { sync_warp(); }

  template <class T>
  SFR_DEVICE T of_first(T x) const {
    return shuffle(x, 0);
  }
  SFR_DEVICE __int128 of_first(__int128 x) const {
    const int64_t high = shuffle(int64_t(x >> 64), 0), low = shuffle(int64_t(x), 0);
    return (__int128(high) << 64) | uint64_t(low);
  }

  template <class F>
  SFR_DEVICE void each(int64_t count, F&& f) const {
#pragma unroll 1
    for (int64_t k = lane; k < count; k += warp_threads) f(k);
    sync();
  }

  template <class F>
  SFR_DEVICE double sum(int64_t count, F&& f) const {
    double total = 0;
#pragma unroll 1
    for (int64_t k = lane; k < count; k += warp_threads) total += f(k);
    total = over_lanes<Sum>(total, warp_threads);
    sync();  // mutant: the shuffles above are barriers too, but order no memory
    return total;
  }

  // The least f(k), infinity if there is none.
  template <class F>
  SFR_DEVICE double least(int64_t count, F&& f) const {
    double least = infinity;
#pragma unroll 1
    for (int64_t k = lane; k < count; k += warp_threads) {
      const double x = f(k);
      if (x < least) least = x;
    }
    least = -over_lanes<Max>(-least, warp_threads);
    sync();  // mutant: the shuffles above are barriers too, but order no memory
    return least;
  }

  // The first k for which f(k) is true, else count.
  template <class F>
  SFR_DEVICE int64_t find(int64_t count, F&& f) const {
    int first = int(count);
#pragma unroll 1
    for (int k = lane; k < first; k += warp_threads)
      if (f(k)) first = k;
    sync();
#pragma unroll 1
    for (int mask = warp_threads / 2; mask > 0; mask /= 2) {
      const int other = shuffle_xor(first, mask);
      if (other < first) first = other;
    }
    return first;
  }
};

template <class E>
SFR_DEVICE double to_double(E x) {
  return double(to_float(x));
}

}  // namespace sfr::cuda

#include "../exact/costs.h"
#include "../exact/twofold.h"

namespace sfr::cuda {

SFR_DEVICE void put(double* p, int64_t j, double value) {
  p[j] = value;
}

// The length of a row of costs that is copied.
SFR_BOTH int64_t whole_row(int64_t columns) {
  return columns;
}

struct Nearest {
  double value;
  int64_t column;
};

// The least value of all lanes, and its column. What any lane read before, another may write after.
SFR_DEVICE Nearest least_of_lanes(double value, int column) {
  sync_warp();
#pragma unroll 1
  for (int mask = warp_threads / 2; mask > 0; mask /= 2) {
    const double other = shuffle_xor(value, mask);
    const int where = shuffle_xor(column, mask);
    if (other < value || (other == value && where < column)) value = other, column = where;
  }
  return {value, column};
}

// Costs as they are, for scans that may also see them otherwise.
struct AsTheyAre {
  SFR_DEVICE double operator()(double x) const { return x; }
};
// 1 for a pair that is forbidden, else 0.
struct Forbidden {
  SFR_DEVICE double operator()(double x) const { return x < infinity ? 0 : 1; }
};

// The least of row - v over columns [begin, end).
template <class S, class Reading>
SFR_DEVICE Nearest nearest(const Lanes& lanes, const S* row, Reading read, const double* v, int64_t begin,
                           int64_t end) {
  double least = infinity;
  int where = int(begin) + lanes.lane;
#pragma unroll 4
  for (int j = int(begin) + lanes.lane; j < end; j += warp_threads) {
    const double x = read(double(row[j])) - v[j];  // hot: nearest
    if (x < least) least = x, where = j;
  }
  return least_of_lanes(least, where);
}

// The least of row - v - u in twice the digits, rounded once.
template <class S, class Reading>
SFR_DEVICE Nearest nearest_of_twofold(const Lanes& lanes, const S* row, Reading read, const double* v,
                                      const double* v_low, Twofold minus_u, int64_t begin, int64_t end) {
  double least = infinity;
  int where = int(begin) + lanes.lane;
#pragma unroll 1
  for (int j = int(begin) + lanes.lane; j < end; j += warp_threads) {
    const double x = reduced(read(double(row[j])), v[j], v_low[j], minus_u.high, minus_u.low);
    if (x < least) least = x, where = j;
  }
  return least_of_lanes(least, where);
}

// u = the least of each row of cost - v.
template <class S>
SFR_DEVICE void row_minima(const Lanes& lanes, const Costs<S>& cost, const double* v, double* u) {
#pragma unroll 1
  for (int64_t i = 0; i < cost.n; ++i) {
    const double least = nearest(lanes, cost.row(i), AsTheyAre(), v, 0, cost.width).value;
    if (lanes.first) u[i] = least;
  }
  sync_warp();  // mutant: callers have another barrier before they look
}

struct TwoNearest {
  double value, second;
  int64_t column;
};

// The two least of row - v.
template <class S>
SFR_DEVICE TwoNearest two_nearest(const Lanes& lanes, const S* row, const double* v, int64_t ld) {
  double least = infinity, second = infinity;
  int where = lanes.lane;
#pragma unroll 4
  for (int j = lanes.lane; j < ld; j += warp_threads) {
    const double x = double(row[j]) - v[j], loser = x < least ? least : x;
    if (loser < second) second = loser;
    if (x < least) least = x, where = j;
  }
  const Nearest first = least_of_lanes(least, where);
  const double rest = where == first.column || second < least ? second : least;
  return {first.value, -over_lanes<Max>(-rest, warp_threads), first.column};
}

// A bit for each column, whether row - v is no more than `least`; 32 columns a word, to the end of the last one.
template <class S>
SFR_DEVICE void mark_tight(const Lanes& lanes, const S* row, const double* v, double least, int64_t width,
                           uint32_t* words) {
#pragma unroll 1
  for (int first = 0; first < width; first += 32) {
    const int j = first + lanes.lane;
    int bits = j < width && double(row[j]) - v[j] <= least ? int(1u << lanes.lane) : 0;
#pragma unroll 1
    for (int mask = warp_threads / 2; mask > 0; mask /= 2) bits |= shuffle_xor(bits, mask);
    if (lanes.first) words[first / 32] = uint32_t(bits);
  }
  lanes.sync();  // mutant: the lane that wrote the words is the one that reads them; this is for those to come
}

// distance = min(distance, row - v + shift), with `from` = i where it fell; the least of the new distances.
template <class S>
SFR_DEVICE Nearest relax(const Lanes& lanes, const S* row, const double* v, double shift, double* distance,
                         int64_t* from, int64_t i, int64_t ld) {
  double least = infinity;
  int where = lanes.lane;
#pragma unroll 4
  for (int j = lanes.lane; j < ld; j += warp_threads) {
    const double x = double(row[j]) - v[j] + shift;  // hot: relax
    double after = distance[j];
    if (x < after) {
      after = x;
      distance[j] = x;
      from[j] = i;
    }
    if (after < least) least = after, where = j;
  }
  return least_of_lanes(least, where);
}

struct SideSums {
  double begin, end;
};

// Of a row's costs where side is -1, and where it is 1.
template <class S>
SFR_DEVICE SideSums sum_by_side(const Lanes& lanes, const S* row, const double* side, int64_t width) {
  double begin = 0, end = 0;
#pragma unroll 1
  for (int64_t j = lanes.lane; j < width; j += warp_threads) {
    const double cost = double(row[j]), which = side[j];
    begin += which < 0 ? cost : 0;
    end += which > 0 ? cost : 0;
  }
  return {over_lanes<Sum>(begin, warp_threads), over_lanes<Sum>(end, warp_threads)};
}

// The numbers below `count` by their keys, the greatest first, equal ones as they come: each finds its place.
SFR_DEVICE void sort_down(const Lanes& lanes, const double* key, int64_t count, int32_t* sorted) {
  lanes.each(count, [&](int64_t k) {
    int64_t place = 0;
#pragma unroll 4
    for (int64_t l = 0; l < count; ++l) place += key[l] > key[k] || (key[l] == key[k] && l < k);
    sorted[place] = int32_t(k);
  });
}

// least = the least cost of each column, and the row it is in.
template <class S>
SFR_DEVICE void column_minima(const Lanes& lanes, const Costs<S>& cost, double* least, int64_t* from) {
#pragma unroll 1
  for (int j = lanes.lane; j < cost.width; j += warp_threads) {
    S value = cost.row(0)[j];
    int where = 0;
#pragma unroll 4
    for (int i = 1; i < cost.n; ++i) {
      const S x = cost.row(i)[j];
      if (x < value) value = x, where = i;
    }
    least[j] = double(value);
    from[j] = where;
  }
  sync_warp();  // mutant: callers have another barrier before they look
}

}  // namespace sfr::cuda

// What csrc/exact is made of on a CPU: one lane, which is a thread, and scans over a row of costs. Ties go to the first
// column, so that the width of a vector changes nothing.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "features.h"

#define SFR_EXACT_NAMESPACE sfr::cpu::SFR_ISA
#define SFR_LANES inline
#define SFR_ANYWHERE inline

namespace sfr::cpu::SFR_ISA {

constexpr double infinity = std::numeric_limits<double>::infinity();

struct Lanes {
  static constexpr bool first = true;

  static void sync() {}

  template <class T>
  static T of_first(T x) {
    return x;
  }

  template <class F>
  static void each(int64_t count, F&& f) {
    for (int64_t k = 0; k < count; ++k) f(k);
  }

  template <class F>
  static double sum(int64_t count, F&& f) {
    double total = 0;
    for (int64_t k = 0; k < count; ++k) total += f(k);
    return total;
  }

  // The least f(k), infinity if there is none.
  template <class F>
  static double least(int64_t count, F&& f) {
    double least = infinity;
    for (int64_t k = 0; k < count; ++k) {
      const double x = f(k);
      least = x < least ? x : least;
    }
    return least;
  }

  // The first k for which f(k) is true, else count.
  template <class F>
  static int64_t find(int64_t count, F&& f) {
    for (int64_t k = 0; k < count; ++k)
      if (f(k)) return k;
    return count;
  }
};

template <class E>
SFR_INLINE double to_double(E x) {
  return convert_in<double>(x);
}

}  // namespace sfr::cpu::SFR_ISA

#include "../exact/costs.h"
#include "../exact/twofold.h"

namespace sfr::cpu::SFR_ISA {

using Indices = Int<double>;
static_assert(8 % lanes<double> == 0);  // the columns' potentials begin at a multiple of 8 (exact/transportation.h)

SFR_INLINE Indices every(int64_t x) {
  return x - Indices{};
}

SFR_INLINE Indices lane_numbers() {
  Indices out{};
  for (int i = 0; i < lanes<double>; ++i) out[i] = i;
  return out;
}

// Lane i gets lane i + shift, round and round.
template <int shift, class V>
SFR_INLINE V rotate(V v) {
  constexpr int L = lanes<double>;
#if defined(__clang__)
  V out{};
  for (int i = 0; i < L; ++i) out[i] = v[(i + shift) % L];
  return out;
#else
  Indices index{};
  for (int i = 0; i < L; ++i) index[i] = (i + shift) % L;
  return __builtin_shuffle(v, index);
#endif
}

// The least lane, in every lane.
template <int shift = lanes<double> / 2, class V>
SFR_INLINE V least_lane(V v) {
  if constexpr (shift > 0) {
    const V other = rotate<shift>(v);
    return least_lane<shift / 2>(other < v ? other : v);
  } else {
    return v;
  }
}

// A bit for each lane in which both are equal.
SFR_INLINE unsigned equal_lanes(Vec<double> x, Vec<double> y) {
#if defined(__AVX512F__)
  return _mm512_cmpeq_pd_mask((__m512d)x, (__m512d)y);
#elif defined(__AVX2__)
  return unsigned(_mm256_movemask_pd((__m256d)(x == y)));
#elif defined(__SSE2__)
  return unsigned(_mm_movemask_pd((__m128d)(x == y)));
#else
  const Indices equal = x == y;
  unsigned bits = 0;
  for (int k = 0; k < lanes<double>; ++k) bits |= unsigned(equal[k] & 1) << k;
  return bits;
#endif
}

SFR_INLINE bool any_lane(Indices x) {
  return least_lane(x)[0] != 0;  // comparisons give -1 where they hold
}

SFR_INLINE Indices load_indices(const int64_t* p) {
  Indices out;
  std::memcpy(&out, p, sizeof out);
  return out;
}

SFR_INLINE void store_indices(int64_t* p, Indices x) {
  std::memcpy(p, &x, sizeof x);
}

// p[j] = value, by way of the whole vector: the next scan loads that vector, and must not wait for a narrower
// store.
SFR_INLINE void put(double* p, int64_t j, double value) {
  constexpr int L = lanes<double>;
  double* whole = p + j / L * L;
  store(whole, lane_numbers() == every(j % L) ? splat<double>(value) : load(whole));
}

// Costs as they are, for scans that may also see them otherwise.
struct AsTheyAre {
  template <class V>
  SFR_INLINE V operator()(V x) const {
    return x;
  }
};
// 1 for a pair that is forbidden, else 0.
struct Forbidden {
  SFR_INLINE double operator()(double x) const { return x < infinity ? 0 : 1; }
  SFR_INLINE Vec<double> operator()(Vec<double> x) const { return x < infinity ? Vec<double>{} : splat<double>(1); }
};

SFR_INLINE Vec<double> widened(const double* p) {
  return load(p);
}
SFR_INLINE Vec<double> widened(const float* p) {
#if defined(__AVX512F__)
  return (Vec<double>)_mm512_maskz_cvtps_pd(0xff, _mm256_loadu_ps(p));  // GCC makes two halves and joins them
#else
  typedef float Half __attribute__((vector_size(SFR_VECTOR_BYTES / 2), aligned(4)));
  return __builtin_convertvector(*reinterpret_cast<const Half*>(p), Vec<double>);
#endif
}

// f(costs, column) for each vector of row[begin, end); past the end costs are infinite.
template <class S, class F>
SFR_INLINE void over_row(const S* row, int64_t begin, int64_t end, F&& f) {
  constexpr int L = lanes<double>;
  int64_t j = begin;
  for (; j + L <= end; j += L) f(widened(row + j), j);
  if (j == end) return;
  S rest[L];
  for (int i = 0; i < L; ++i) rest[i] = j + i < end ? row[j + i] : std::numeric_limits<S>::infinity();
  f(widened(rest), j);
}

// The length of a row of costs that is copied.
inline int64_t whole_row(int64_t columns) {
  return padded<double>(columns);
}

struct Nearest {
  double value;
  int64_t column;
};

// The least of a row's values as they come, and where it is.
struct Running {
  Vec<double> least = splat<double>(infinity);
  Indices at, where;

  SFR_INLINE explicit Running(int64_t begin) : at(lane_numbers() + begin), where(at) {}

  SFR_INLINE void observe(Vec<double> x) {
    const auto less = x < least;
    least = less ? x : least;
    where = less ? at : where;
    at += lanes<double>;
  }

  SFR_INLINE Nearest nearest() const { return nearest(least_lane(least)); }

  // `value`: the least lane, in every lane. As a rule one lane holds it.
  SFR_INLINE Nearest nearest(Vec<double> value) const {
    int64_t columns[lanes<double>];
    store_indices(columns, where);
    unsigned holds = equal_lanes(least, value);
    int64_t first = columns[__builtin_ctz(holds)];
    while (holds &= holds - 1) {
      const int64_t other = columns[__builtin_ctz(holds)];
      first = other < first ? other : first;
    }
    return {value[0], first};
  }
};

// The least of row - v over columns [begin, end).
template <class S, class Reading>
inline Nearest nearest(Lanes, const S* row, Reading read, const double* v, int64_t begin, int64_t end) {
  Running running(begin);
  over_row(row, begin, end, [&](Vec<double> cost, int64_t j) { running.observe(read(cost) - load(v + j)); });
  return running.nearest();
}

// The least of row - v - u in twice the digits, rounded once.
template <class S, class Reading>
inline Nearest nearest_of_twofold(Lanes, const S* row, Reading read, const double* v, const double* v_low,
                                  Twofold minus_u, int64_t begin, int64_t end) {
  Running running(begin);
  over_row(row, begin, end, [&](Vec<double> cost, int64_t j) {
    running.observe(reduced(read(cost), load(v + j), load(v_low + j), splat<double>(minus_u.high), minus_u.low));
  });
  return running.nearest();
}

// u = the least of each row of cost - v.
template <class S>
inline void row_minima(Lanes lanes, const Costs<S>& cost, const double* v, double* u) {
  for (int64_t i = 0; i < cost.n; ++i) u[i] = nearest(lanes, cost.row(i), AsTheyAre(), v, 0, cost.width).value;
}

// The two least of all lanes of two vectors, in every lane; `second` is above `least` in each.
struct TwoLeast {
  Vec<double> least, second;
};
template <int shift = lanes<double> / 2>
SFR_INLINE TwoLeast two_least(TwoLeast v) {
  if constexpr (shift > 0) {
    const Vec<double> least = rotate<shift>(v.least), second = rotate<shift>(v.second);
    const Vec<double> more = least < v.least ? v.least : least, both = second < v.second ? second : v.second;
    return two_least<shift / 2>({least < v.least ? least : v.least, more < both ? more : both});
  } else {
    return v;
  }
}

struct TwoNearest {
  double value, second;
  int64_t column;
};

// The two least of row - v.
template <class S>
inline TwoNearest two_nearest(Lanes, const S* row, const double* v, int64_t width) {
  Running running(0);
  Vec<double> second = splat<double>(infinity);
  over_row(row, 0, width, [&](Vec<double> cost, int64_t j) {
    const Vec<double> x = cost - load(v + j), loser = x < running.least ? running.least : x;
    second = loser < second ? loser : second;
    running.observe(x);
  });
  const TwoLeast least = two_least({running.least, second});
  const Nearest first = running.nearest(least.least);
  return {first.value, least.second[0], first.column};
}

// The number of the lowest bit that is set.
inline int lowest_bit(uint32_t x) {
  return __builtin_ctz(x);
}

// All lanes' bits, in every lane.
template <int shift = lanes<double> / 2>
SFR_INLINE Indices or_lanes(Indices x) {
  if constexpr (shift > 0)
    return or_lanes<shift / 2>(x | rotate<shift>(x));
  else
    return x;
}

// A bit for each column, whether row - v is no more than `least`; 32 columns a word, to the end of the last one.
template <class S>
inline void mark_tight(Lanes, const S* row, const double* v, double least, int64_t width, uint32_t* words) {
  for (int64_t first = 0; first < width; first += 32) {
    Indices bits{}, bit = every(1) << lane_numbers();
    over_row(row, first, width - first < 32 ? width : first + 32, [&](Vec<double> cost, int64_t j) {
      bits |= (cost - load(v + j) <= splat<double>(least)) & bit;
      bit <<= lanes<double>;
    });
    words[first / 32] = uint32_t(or_lanes(bits)[0]);
  }
}

// distance = min(distance, row - v + shift), with `from` = i where it fell; the least of the new distances.
template <class S>
inline Nearest relax(Lanes, const S* row, const double* v, double shift, double* distance, int64_t* from, int64_t i,
                     int64_t width) {
  Running running(0);
  over_row(row, 0, width, [&](Vec<double> cost, int64_t j) {
    const Vec<double> x = cost - load(v + j) + shift, before = load(distance + j);
    const auto less = x < before;
    const Vec<double> after = less ? x : before;
    store(distance + j, after);
    store_indices(from + j, less ? every(i) : load_indices(from + j));
    running.observe(after);
  });
  return running.nearest();
}

struct SideSums {
  double begin, end;
};

// Of a row's costs where side is -1, and where it is 1. In the order of 32 lanes, whatever the width of a vector.
template <class S>
inline SideSums sum_by_side(Lanes, const S* row, const double* side, int64_t width) {
  constexpr int order = 32, vectors = order / lanes<double>;
  Vec<double> begin[vectors] = {}, end[vectors] = {};
  over_row(row, 0, width, [&](Vec<double> cost, int64_t j) {
    const Vec<double> which = load(side + j);
    const int64_t k = j / lanes<double> % vectors;
    begin[k] += which < 0 ? cost : Vec<double>{};
    end[k] += which > 0 ? cost : Vec<double>{};
  });
  const auto total = [](const Vec<double>* parts) {
    double sum[order];
    for (int k = 0; k < vectors; ++k) store(sum + k * lanes<double>, parts[k]);
    for (int half = order / 2; half > 0; half /= 2)
      for (int k = 0; k < half; ++k) sum[k] += sum[k + half];
    return sum[0];
  };
  return {total(begin), total(end)};
}

// The numbers below `count` by their keys, the greatest first, equal ones as they come.
inline void sort_down(Lanes, const double* key, int64_t count, int32_t* sorted) {
  for (int64_t k = 0; k < count; ++k) sorted[k] = int32_t(k);
  std::sort(sorted, sorted + count,
            [&](int32_t k, int32_t l) { return key[k] > key[l] || (key[k] == key[l] && k < l); });
}

// least = the least cost of each column, and the row it is in.
template <class S>
inline void column_minima(Lanes, const Costs<S>& cost, double* least, int64_t* from) {
  constexpr int64_t together = 8;  // rows whose costs are read at the same time
  for (int64_t i = 0; i < cost.n; i += together) {
    const int64_t rows = cost.n - i < together ? cost.n - i : together;
    const S* first[together];
    for (int64_t k = 0; k < together; ++k) first[k] = cost.row(i + (k < rows ? k : 0));
    over_row(first[0], 0, cost.width, [&](Vec<double> x, int64_t j) {
      Vec<double> value = i == 0 ? x : load(least + j);
      Indices where = i == 0 ? Indices{} : load_indices(from + j);
      const auto observe = [&](Vec<double> x, int64_t row) {
        const auto less = x < value;
        value = less ? x : value;
        where = less ? every(row) : where;
      };
      observe(x, i);
      const bool whole = j + lanes<double> <= cost.width;
      for (int64_t k = 1; k < rows; ++k)
        if (whole)
          observe(widened(first[k] + j), i + k);
        else
          over_row(first[k], j, cost.width, [&](Vec<double> y, int64_t) { observe(y, i + k); });
      store(least + j, value);
      store_indices(from + j, where);
    });
  }
}

}  // namespace sfr::cpu::SFR_ISA

// What csrc/exact is made of on a CPU: one lane, which is a thread, and scans over a row of costs. Ties go to the first
// column, so that the width of a vector changes nothing.
#pragma once

#include <cmath>
#include <limits>

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
};

template <class E>
SFR_INLINE double to_double(E x) {
  return convert_in<double>(x);
}

using Places = Int<double>;

SFR_INLINE Places every(int64_t x) {
  return x - Places{};
}

SFR_INLINE Places lane_numbers() {
  Places out{};
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
  Places index{};
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

SFR_INLINE Places load_places(const int64_t* p) {
  Places out;
  std::memcpy(&out, p, sizeof out);
  return out;
}

// p[j] = value, by way of the whole vector: the next scan loads that vector, and must not wait for a narrower
// store.
SFR_INLINE void put(double* p, int64_t j, double value) {
  constexpr int L = lanes<double>;
  double* whole = p + j / L * L;
  store(whole, lane_numbers() == every(j % L) ? splat<double>(value) : load(whole));
}

struct Nearest {
  double value;
  int64_t column;
};

// The least of a row's values as they come, and where it is.
struct Running {
  Vec<double> least = splat<double>(infinity);
  Places where = lane_numbers(), at = where;

  SFR_INLINE void observe(Vec<double> x) {
    const auto less = x < least;
    least = less ? x : least;
    where = less ? at : where;
    at += lanes<double>;
  }

  SFR_INLINE Nearest nearest() const {
    const Vec<double> value = least_lane(least);
    const Places first = least_lane(least == value ? where : every(std::numeric_limits<int64_t>::max()));
    return {value[0], first[0]};
  }
};

// The least of row - v.
inline Nearest nearest(Lanes, const double* row, const double* v, int64_t ld) {
  Running running;
  for (int64_t j = 0; j < ld; j += lanes<double>) running.observe(load(row + j) - load(v + j));
  return running.nearest();
}

// u = the least of each row of cost - v.
inline void row_minima(Lanes lanes, const double* cost, const double* v, int64_t n, int64_t ld, double* u) {
  for (int64_t i = 0; i < n; ++i) u[i] = nearest(lanes, cost + i * ld, v, ld).value;
}

struct TwoNearest {
  double value, second;
  int64_t column;
};

// The two least of row - v.
inline TwoNearest two_nearest(Lanes, const double* row, const double* v, int64_t ld) {
  Running running;
  Vec<double> second = splat<double>(infinity);
  for (int64_t j = 0; j < ld; j += lanes<double>) {
    const Vec<double> x = load(row + j) - load(v + j), loser = x < running.least ? running.least : x;
    second = loser < second ? loser : second;
    running.observe(x);
  }
  const Nearest first = running.nearest();
  const Vec<double> rest = running.where == every(first.column) ? second : running.least;
  return {first.value, least_lane(rest < second ? rest : second)[0], first.column};
}

// distance = min(distance, row - v + shift), with `from` = i where it fell; the least of the new distances.
inline Nearest relax(Lanes, const double* row, const double* v, double shift, double* distance, int64_t* from,
                     int64_t i, int64_t ld) {
  Running running;
  for (int64_t j = 0; j < ld; j += lanes<double>) {
    const Vec<double> x = load(row + j) - load(v + j) + shift, before = load(distance + j);
    const auto less = x < before;
    const Vec<double> after = less ? x : before;
    const Places whence = less ? every(i) : load_places(from + j);
    store(distance + j, after);
    std::memcpy(from + j, &whence, sizeof whence);
    running.observe(after);
  }
  return running.nearest();
}

// v = the least cost of each column, and the row it is in.
inline void column_minima(Lanes, const double* cost, int64_t n, int64_t ld, double* v, int64_t* from) {
  for (int64_t j = 0; j < ld; j += lanes<double>) {
    Vec<double> least = load(cost + j);
    Places where{};
    for (int64_t i = 1; i < n; ++i) {
      const Vec<double> x = load(cost + i * ld + j);
      const auto less = x < least;
      least = less ? x : least;
      where = less ? every(i) : where;
    }
    store(v + j, least);
    std::memcpy(from + j, &where, sizeof where);
  }
}

}  // namespace sfr::cpu::SFR_ISA

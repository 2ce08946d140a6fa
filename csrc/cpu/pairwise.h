// Sums over channels for every pair of pixels, and their adjoint: the two loops in which the arithmetic is.
//
// Panels are channel-major, so the lanes of a vector are neighbouring pixels of one side and the other side
// is broadcast: no sum runs across lanes. A tile of results stays in registers over a panel of channels.
//
// A few pixels behind the last whole vector would take as long as a vector of them: 49 in vectors of 16 as long as 64.
// They are broadcast, or summed across lanes, and the lanes are the other side's pixels.
#pragma once

#include "features.h"

// After what it is made of.
#include "../ground/metric.h"

namespace sfr::cpu::SFR_ISA {

// Pixels of one side: those in vectors, and how many are left behind them.
struct Lanewise {
  int64_t vectors, rest;
};
template <class T>
constexpr int64_t most_rest = lanes<T> / 2;
// `others`: pixels of the other side; `more`: what one that is left takes beside vectors of these.
template <class T>
Lanewise by_lanes(int64_t pixels, int64_t others, int64_t more) {
  constexpr int L = lanes<T>;
  const int64_t rest = pixels % L;
  if (rest > most_rest<T> || rest * ((others + L - 1) / L + more) >= others) return {(pixels + L - 1) / L, 0};
  return {pixels / L, rest};
}

// D[r][v] += sum_c pair(x_r, y_v), for R pixels of x and V vectors of y.
template <Pair P, int R, int V, class T>
SFR_INLINE void pair_tile(const T* x, int64_t ldx, const T* y, int64_t ldy, int64_t channels, T* D, int64_t ldd,
                          bool first) {
  constexpr int L = lanes<T>;
  Vec<T> sum[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) sum[r][v] = Vec<T>{};
#pragma GCC unroll 2
  for (int64_t c = 0; c < channels; ++c) {
    Vec<T> yv[V];
    for (int v = 0; v < V; ++v) yv[v] = load(y + c * ldy + v * L);
    for (int r = 0; r < R; ++r) {
      const Vec<T> xr = splat(x[c * ldx + r]);
      for (int v = 0; v < V; ++v) add_pair<P>(sum[r][v], xr, yv[v]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) {
      T* out = D + r * ldd + v * L;
      store(out, first ? sum[r][v] : load(out) + sum[r][v]);
    }
}

// Pixels of x in a tile that is V vectors of y wide.
template <int V>
constexpr int tile_rows = (V == 1   ? 6
                           : V == 2 ? 4
                                    : 3) *
                          (many_registers ? 2 : 1);

template <Pair P, int V, class T>
void pair_columns(const T* x, int64_t ldx, int64_t rows, const T* y, int64_t ldy, int64_t channels, T* D, int64_t ldd,
                  bool first) {
  constexpr int R = tile_rows<V>;
  int64_t i = 0;
  for (; i + R <= rows; i += R) pair_tile<P, R, V>(x + i, ldx, y, ldy, channels, D + i * ldd, ldd, first);
  for (; i < rows; ++i) pair_tile<P, 1, V>(x + i, ldx, y, ldy, channels, D + i * ldd, ldd, first);
}

// The same for `rows` pixels of x and whole rows of D, `vectors` vectors long.
template <Pair P, class T>
void pair_sums(const T* x, int64_t ldx, int64_t rows, const T* y, int64_t ldy, int64_t vectors, int64_t channels, T* D,
               int64_t ldd, bool first) {
  constexpr int L = lanes<T>;
  int64_t v = 0;
  for (; v + 3 <= vectors && vectors - v != 4; v += 3)
    pair_columns<P, 3>(x, ldx, rows, y + v * L, ldy, channels, D + v * L, ldd, first);
  for (; v + 2 <= vectors; v += 2) pair_columns<P, 2>(x, ldx, rows, y + v * L, ldy, channels, D + v * L, ldd, first);
  if (v < vectors) pair_columns<P, 1>(x, ldx, rows, y + v * L, ldy, channels, D + v * L, ldd, first);
}

// out[c][i] (+)= sum_j pull(W[j][i], x[c][i], y[c][j]), such as W (x - y): lanes over i, R channels at once.
template <Pair P, int R, int V, class T>
SFR_INLINE void pull_tile(const T* x, int64_t ldx, const T* y, int64_t ldy, const T* W, int64_t ldw, int64_t count,
                          T* out, int64_t ldo, bool first) {
  constexpr int L = lanes<T>;
  Vec<T> sum[R][V], xr[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) {
      sum[r][v] = first ? Vec<T>{} : load(out + r * ldo + v * L);
      xr[r][v] = load(x + r * ldx + v * L);
    }
  for (int64_t j = 0; j < count; ++j) {
    Vec<T> w[V];
    for (int v = 0; v < V; ++v) w[v] = load(W + j * ldw + v * L);
    for (int r = 0; r < R; ++r) {
      const Vec<T> yj = splat(y[r * ldy + j]);
      for (int v = 0; v < V; ++v) add_pull<P>(sum[r][v], w[v], xr[r][v], yj);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) store(out + r * ldo + v * L, sum[r][v]);
}

template <Pair P, int V, class T>
void pull_columns(const T* x, int64_t ldx, const T* y, int64_t ldy, const T* W, int64_t ldw, int64_t count,
                  int64_t channels, T* out, int64_t ldo, bool first) {
  // Sums wait for those before them; products do without x, so that twice as many fit.
  constexpr int R = (V == 1 ? 6 : 3) * (P == Pair::product || many_registers ? 2 : 1);
  int64_t c = 0;
  for (; c + R <= channels; c += R)
    pull_tile<P, R, V>(x + c * ldx, ldx, y + c * ldy, ldy, W, ldw, count, out + c * ldo, ldo, first);
  for (; c < channels; ++c)
    pull_tile<P, 1, V>(x + c * ldx, ldx, y + c * ldy, ldy, W, ldw, count, out + c * ldo, ldo, first);
}

// The same for whole panels: x and out have `vectors` vectors a row, W is [count][ldw].
template <Pair P, class T>
void pull(const T* x, int64_t ldx, int64_t vectors, const T* y, int64_t ldy, int64_t count, const T* W, int64_t ldw,
          int64_t channels, T* out, int64_t ldo, bool first) {
  constexpr int L = lanes<T>;
  constexpr int64_t rows = 64;  // of W at a time, so that they stay in L1 while every channel uses them
  for (int64_t v = 0; v < vectors; v += 2)
    for (int64_t j = 0; j == 0 || j < count; j += rows) {  // with nothing to add, what is fresh is 0
      const int64_t some = count - j < rows ? count - j : rows;
      const bool fresh = first && j == 0;
      if (v + 2 <= vectors)
        pull_columns<P, 2>(x + v * L, ldx, y + j, ldy, W + j * ldw + v * L, ldw, some, channels, out + v * L, ldo,
                           fresh);
      else
        pull_columns<P, 1>(x + v * L, ldx, y + j, ldy, W + j * ldw + v * L, ldw, some, channels, out + v * L, ldo,
                           fresh);
    }
}

// The same for one pixel of x, with the lanes over the `count` pixels of y; W is a row of as many weights, and 0 up to
// a whole vector.
template <Pair P, class T>
void pull_pixel(const T* x, int64_t ldx, const T* y, int64_t ldy, int64_t count, const T* W, int64_t channels, T* out,
                int64_t ldo, bool first) {
  constexpr int L = lanes<T>;
  Int<T> lane{};
  for (int l = 0; l < L; ++l) lane[l] = l;
  const auto inside = lane < typename Simd<T>::Scalar(count % L);
  for (int64_t c = 0; c < channels; c += L) {
    const int64_t last = channels - c - 1;
    const auto row = [&](int64_t r) { return c + (r < last ? r : last); };
    Vec<T> sums[L] = {};
    int64_t j = 0;
    for (; j + L <= count; j += L) {
      const Vec<T> w = load(W + j);
      for (int r = 0; r < L; ++r) add_pull<P>(sums[r], w, splat(x[row(r) * ldx]), load(y + row(r) * ldy + j));
    }
    if (j < count) {
      const Vec<T> w = load(W + j);
      for (int r = 0; r < L; ++r) {
        const Vec<T> yr = load(y + row(r) * ldy + j);
        add_pull<P>(sums[r], w, splat(x[row(r) * ldx]), inside ? yr : Vec<T>{});
      }
    }
    const Vec<T> sum = sum_rows<T>(sums);
    for (int64_t r = 0; r <= last && r < L; ++r) {
      T& of = out[(c + r) * ldo];
      of = first ? sum[r] : of + sum[r];
    }
  }
}

}  // namespace sfr::cpu::SFR_ISA

// What distances and gradients by products take besides products, on a GPU: features less their centre, and pairs
// summed again (../ground/products.h).
#pragma once

#include "problem.cuh"

namespace sfr::cuda {

// The first pixel of a map that takes part; its count, if none does.
SFR_DEVICE int first_used(const uint8_t* used, int pixels) {
  int first = 0;
#pragma unroll 1
  while (used && first < pixels && !used[first]) ++first;
  return first;
}

// Channels [c0, c0 + channels) of a pixel, by the team's threads.
template <class T>
SFR_DEVICE void read_centre(const Team& team, const Region& region, int pixel, int c0, int channels, T* out) {
  with_element(region.view->dtype, [&](auto element) {
    using E = decltype(element);
    if constexpr (sizeof(T) >= sizeof(E)) {
      const E* data = static_cast<const E*>(region.view->data) + region.offset(pixel);
#pragma unroll 2
      for (int c = team.rank; c < channels; c += team.size)
        out[c] = T(to_float(data[(c0 + c) * region.view->stride_c]));
    }
  });
}

// Adds what a panel has of its pixels' squares, less the `centre`: each half of the channels by one thread. Squares are
// the sums of both, [2][pixels of x and y].
template <class T>
SFR_DEVICE void add_squares(const Team& team, const T* x, int x_row, int nx, const T* y, int y_row, int ny,
                            const T* centre, int channels, bool first, T* squares) {
  const int pixels = nx + ny, half = (channels + 1) / 2;
#pragma unroll 1
  for (int unit = team.rank; unit < 2 * pixels; unit += team.size) {
    const bool upper = unit >= pixels;
    const int p = upper ? unit - pixels : unit, end = upper ? channels : half;
    const T* pixel = p < nx ? x + p : y + p - nx;
    const int row = p < nx ? x_row : y_row;
    // Several sums wait less for each other, and round less.
    constexpr int several = 4;
    T sums[several] = {};
    const auto add = [&](T& sum, int c) {
      const T value = pixel[c * row] - centre[c];
      sum += value * value;  // hot: square
    };
    int c = upper ? half : 0;
#pragma unroll 1
    for (; c + several <= end; c += several)
#pragma unroll
      for (int k = 0; k < several; ++k) add(sums[k], c + k);
#pragma unroll 1
    for (; c < end; ++c) add(sums[0], c);
    const T sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    squares[unit] = first ? sum : squares[unit] + sum;
  }
}

// Whether something is so for any thread of the team's block. A barrier, and another one must follow before the next.
template <class T>
SFR_DEVICE bool any_of(const Team& team, T* warps, bool so) {
  const T of_warp = over_lanes<Max>(so ? T(1) : T(0), warp_threads);
  if (team.lane() == 0) warps[team.warp()] = of_warp;
  team.sync();
  T most = 0;
#pragma unroll 1
  for (int w = 0; w < team.warps(); ++w) most = Max()(most, warps[w]);
  return most > 0;
}

SFR_DEVICE bool is_negative(float x) {
  return float_bits(x) >> 31 != 0;
}
SFR_DEVICE bool is_negative(double x) {
  return double_bits(x) >> 63 != 0;
}

// All bits of a number, or none: masks are fewer instructions than conditions.
SFR_DEVICE uint32_t every_bit(bool so) {
  return so ? ~0u : 0u;
}
SFR_DEVICE float masked(float x, uint32_t mask) {
  return bits_float(float_bits(x) & mask);
}
SFR_DEVICE double masked(double x, uint32_t mask) {
  return mask != 0 ? x : 0;
}

// In the place of a cost: the pair is to be summed again.
constexpr int untold = -1;

// From products to costs, [rows][ld], which are squared distances or, `root`, their roots; returns whether some pair is
// to be summed again. Pairs of pixels that do not take part are 0 apart.
template <class T>
SFR_DEVICE bool finish_products(const Team& team, bool root, int rows, int columns, T* squares, const uint8_t* x_used,
                                const uint8_t* y_used, T* warps, T* out, int64_t ld) {
  const int pixels = rows + columns;
#pragma unroll 1
  for (int p = team.rank; p < pixels; p += team.size) squares[p] += squares[pixels + p];
  team.sync();
  struct Row {
    const T* products;
    T square;
    uint32_t used;
  };
  struct Column {
    T square[4];
    uint32_t used[4];
  };
  const bool whole = in_fours(out, ld);
  T least = 0;
  each_four(
      team, rows, columns, whole, [&](int i) { return Row{out + i * ld, squares[i], every_bit(!x_used || x_used[i])}; },
      [&](int j) {
        Column column;
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const int at = j + k < columns ? j + k : j;  // mutant: what lies beyond is masked
          column.square[k] = squares[rows + at];
          column.used[k] = every_bit(j + k < columns && (!y_used || y_used[at]));
        }
        return column;
      },
      [&](const Row& row, int j, auto known) {
        return read_four(row.products + j, decltype(known)::value, columns - j);
      },
      [&](int i, int j, const Row& row, const Column& column, const Four<T>& products, bool counts) {
        Four<T> costs;
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const T squared = from_products(row.square, column.square[k], products.at[k]);
          const T found = root ? normal_sqrt(squared) : squared;
          const T known = is_told(row.square, column.square[k], squared) ? found : T(untold);
          costs.at[k] = masked(known, row.used & column.used[k]);
          least = costs.at[k] < least ? costs.at[k] : least;
        }
        write_four(out + i * ld + j, costs, whole, counts ? columns - j : 0);  // hot: pair finished
      });
  return any_of(team, warps, least < 0);
}

// The sums of pairs that were summed again, which are left negative, to costs.
template <class T>
SFR_DEVICE void finish_differences(const Team& team, bool root, int rows, int columns, T* out, int64_t ld) {
  map_entries(team, rows, columns, out, ld, out, ld, [&](int, int, T sum) {
    return !is_negative(sum) ? sum : root ? sqrt_of(-sum) : -sum;
  });
}

// A weight with a last bit that says something of its pair; numbers that are none, and 0, say nothing.
SFR_DEVICE float marked(float weight, bool so) {
  const uint32_t bits = float_bits(weight) & ~1u;
  return weight - weight == 0 && weight != 0 ? bits_float(bits | (so ? 1u : 0u)) : weight;
}
SFR_DEVICE float told_weight(float weight) {
  return (float_bits(weight) & 1u) != 0 ? float(NAN) : weight;
}
// Those of float64 never are.
SFR_DEVICE double marked(double weight, bool) {
  return weight;
}
SFR_DEVICE double told_weight(double weight) {
  return weight;
}

}  // namespace sfr::cuda

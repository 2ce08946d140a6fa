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
    bool used;
  };
  struct Entry {
    T product, y_square;
    bool used;
  };
  bool again = false;
  each_entry(
      team, rows, columns, [&](int i) { return Row{out + i * ld, !x_used || x_used[i]}; },
      [&](const Row& row, int j) {
        return Entry{row.products[j], squares[rows + j], row.used && (!y_used || y_used[j])};
      },
      [&](int i, int j, const Entry& pair) {
        const T x_square = squares[i], squared = from_products(x_square, pair.y_square, pair.product);
        const bool told = is_told(x_square, pair.y_square, squared);
        again |= pair.used && !told;
        const T found = !told ? T(untold) : root ? sqrt_of(squared) : squared;
        out[i * ld + j] = pair.used ? found : T(0);  // hot: pair finished
      });
  return any_of(team, warps, again);
}

// The sums of pairs that were summed again, which are left negative, to costs.
template <class T>
SFR_DEVICE void finish_differences(const Team& team, bool root, int rows, int columns, T* out, int64_t ld) {
  each_entry(
      team, rows, columns, [&](int i) { return out + i * ld; }, [](const T* row, int j) { return row[j]; },
      [&](int i, int j, T sum) {
        if (is_negative(sum)) out[i * ld + j] = root ? sqrt_of(-sum) : -sum;
      });
}

// A weight with a last bit that says something of its pair; numbers that are none, and 0, say nothing.
SFR_DEVICE float marked(float weight, bool so) {
  const uint32_t bits = float_bits(weight) & ~1u;
  return weight - weight == 0 && weight != 0 ? bits_float(bits | (so ? 1u : 0u)) : weight;
}
SFR_DEVICE bool is_marked(float weight) {
  return (float_bits(weight) & 1u) != 0 && weight - weight == 0;
}
// Those of float64 never are.
SFR_DEVICE double marked(double weight, bool) {
  return weight;
}
SFR_DEVICE bool is_marked(double) {
  return false;
}

}  // namespace sfr::cuda

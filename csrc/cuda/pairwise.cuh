// Sums over channels for every pair of pixels, and over pixels for every channel: the two loops in which almost all
// arithmetic on features happens. Each thread holds a small tile of results in registers.
#pragma once

#include "panels.cuh"

// After what it is made of.
#include "../ground/metric.h"
// After that.
#include "../ground/products.h"

namespace sfr::cuda {

// Units of work of a team: tiles of results, times slices of the channels where there are more threads than tiles.
struct Tiling {
  int rows, columns;  // tiles
  int slices;         // of a panel's channels
  int edge;           // of a tile

  SFR_BOTH Tiling(int n, int m, int tile, int of_channels)
      : rows((n + tile - 1) / tile), columns((m + tile - 1) / tile), slices(of_channels), edge(tile) {}
  SFR_BOTH int tiles() const { return rows * columns; }
  // Slices that keep the threads busy; they come together in memory that holds so many entries.
  SFR_BOTH int most_slices(int threads, int room) const {
    const int units = threads < room ? threads : room;
    return tiles() < units ? units / tiles() : 1;
  }
  // Passes over the features.
  SFR_BOTH int passes(int threads) const { return slices > 1 ? 1 : (tiles() + threads - 1) / threads; }
};

// An edge of 7 wastes nothing on the maps of vision networks, 7, 14, 28 and 56 pixels wide; 4 suits small and odd
// sizes.
template <class T>
SFR_BOTH int tile_edge(int n, int m) {
  return sizeof(T) == 4 && n % 7 == 0 && m % 7 == 0 ? 7 : 4;
}

// One channel of a tile's pairs; `centred`: less the channel's `centre`.
template <Pair pair, int edge, bool centred, class T>
SFR_DEVICE void add_pairs(const T* x, const T* y, const T* centre, T* sum) {
  T a[edge], b[edge];
  if constexpr (edge == 4) {
    const Four<T> xs = load4(x), ys = load4(y);
#pragma unroll
    for (int k = 0; k < 4; ++k) a[k] = xs.at[k], b[k] = ys.at[k];
  } else {
#pragma unroll
    for (int k = 0; k < edge; ++k) a[k] = x[k], b[k] = y[k];
  }
  if constexpr (centred) {
    const T middle = *centre;
#pragma unroll
    for (int k = 0; k < edge; ++k) a[k] -= middle, b[k] -= middle;  // hot: centre
  }
#pragma unroll
  for (int r = 0; r < edge; ++r)
#pragma unroll
    for (int c = 0; c < edge; ++c) add_pair<pair>(sum[r * edge + c], a[r], b[c]);  // hot: pair
}

// put(i, j, sum) for every result, from what each unit has of its tile: through the panels' memory, as many results of
// each tile at a time as fit there, so that neighbouring threads add what lies side by side. Slices are added in order.
template <class T, int most, class Put>
SFR_DEVICE void add_slices(const Team& team, const Tiling& tiling, int n, int m, int unit, bool busy,
                           const T (&sums)[most], const Panels<T>& panels, Put&& put) {
  const int tiles = tiling.tiles(), units = tiles * tiling.slices, results = tiling.edge * tiling.edge;
  const int room = panels.entries() / units, each = room < results ? room : results;
  T* parts = panels.first_x;
  const Divider by_tiles(tiles), by_columns(tiling.columns), by_edge(tiling.edge);
#pragma unroll 1
  for (int first = 0; first < results; first += each) {
    const int end = first + each < results ? first + each : results;
    if (busy)
#pragma unroll
      for (int k = 0; k < most; ++k)
        if (k >= first && k < end) parts[(k - first) * units + unit] = sums[k];
    team.sync();
#pragma unroll 1
    for (int e = team.rank; e < (end - first) * tiles; e += team.size) {
      const int result = by_tiles(e), tile = e - result * tiles, in_row = by_edge(first + result);
      const T* part = parts + result * units + tile;
      T sum = part[0];
#pragma unroll 4
      for (int s = 1; s < tiling.slices; ++s) sum += part[s * tiles];  // hot: slice of pairs
      const int at = by_columns(tile), i = at * tiling.edge + in_row;
      const int j = (tile - at * tiling.columns) * tiling.edge + first + result - in_row * tiling.edge;
      if (i < n && j < m) put(i, j, sum);
    }
    team.sync();
  }
}

// put(i, j, sum over channels of pair(x_i, y_j)), by tiles of `edge`, 4 or (in float32) 7, and by slices of the
// channels, whose number decides the bits; of those tiles alone for which wanted(first row, first column).
// `centred`: of products, and every channel less its `centre`. The first pass over the features calls seen(buffer,
// first channel, channels) with every panel. They are streamed by the same loop for every kind of tile: it is the
// larger part of the code. Ends with a barrier.
template <class T, class Wanted, class Seen, class Put>
SFR_DEVICE void pair_sums(Team& team, Pair pair, int edge, int slices, const Reader& x, const Reader& y, int C,
                          bool centred, const T* centre, Panels<T>& panels, Wanted&& wanted, Seen&& seen, Put&& put) {
  constexpr int most = sizeof(T) == 4 ? 7 : 4;
  const int n = x.region.count, m = y.region.count;
  const Tiling tiling(n, m, edge, slices);
#pragma unroll 1
  for (int pass = 0; pass < tiling.passes(team.size); ++pass) {
    const int unit = pass * team.size + team.rank;
    const int slice = unit / tiling.tiles(), tile = unit - slice * tiling.tiles();
    const int row = tile / tiling.columns * edge, column = (tile - row / edge * tiling.columns) * edge;
    const bool busy = slice < tiling.slices && wanted(row, column);
    T sums[most * most] = {};
    for_each_panel(team, x, y, C, panels, [&](int k, int c, int channels) {
      if (pass == 0) seen(k, c, channels);
      if (!busy) return;
      const T *a = panels.x(k) + row, *b = panels.y(k) + column;
      const auto add = [&](auto kind, auto size, auto of_centred) {
        constexpr bool less = decltype(of_centred)::value;
#pragma unroll 1
        for (int s = slice; s < channels; s += tiling.slices)
          add_pairs<decltype(kind)::value, decltype(size)::value, less>(a + s * panels.x_row, b + s * panels.y_row,
                                                                        less ? centre + c + s : nullptr, sums);
      };
      const auto sized = [&](auto kind, auto of_centred) {
        if (most == 7 && edge == 7)
          add(kind, Constant<int, most>{}, of_centred);
        else
          add(kind, Constant<int, 4>{}, of_centred);
      };
      if (centred)
        sized(Constant<Pair, Pair::product>{}, Constant<bool, true>{});
      else
        with_pair(pair, [&](auto kind) { sized(kind, Constant<bool, false>{}); });
    });
    team.sync();
    if (tiling.slices > 1) {
      // Of tiles that nobody wants, too: all are read.
      add_slices(team, tiling, n, m, unit, slice < tiling.slices, sums, panels, put);
      continue;
    }
    const auto write = [&](auto size) {
      constexpr int E = decltype(size)::value;
#pragma unroll
      for (int r = 0; r < E; ++r)
#pragma unroll
        for (int c = 0; c < E; ++c)
          if (row + r < n && column + c < m) put(row + r, column + c, sums[r * E + c]);
    };
    if (busy) {
      if (most == 7 && edge == 7)
        write(Constant<int, most>{});
      else
        write(Constant<int, 4>{});
    }
  }
  team.sync();
}

// One tile of 4 pixels x 4 channels of a gradient: adds the sums over the `others` pixels of the other side, `centred`:
// less their channel's centre. W has rows of the student's pixels, and zeros beyond the last pixel of either side, up
// to a multiple of 4. The teacher's pixels of a tile are neighbours, as in a row of W; the student's are `apart`, so
// that neighbouring threads read neighbouring rows.
template <Pair pair, Pull pull, bool centred, class T>
SFR_DEVICE void pull_tile(const T* mine, int my_row, const T* theirs, int their_row, int others, const T* W,
                          int64_t ldw, int pixel, int apart, int channel, int channels, const T* centre,
                          int centre_apart, T (&sum)[4][4]) {
  // Tiles may reach beyond the last channel of the panel: those repeat it and are not stored.
  int rows[4];
  T middle[4];
  Four<T> own[4];
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    rows[c] = channel + c < channels ? channel + c : channels - 1;
    if constexpr (centred) middle[c] = centre[rows[c] * centre_apart];
    if constexpr (pull == Pull::to_y)
      own[c] = load4(mine + rows[c] * my_row + pixel);
    else
#pragma unroll
      for (int p = 0; p < 4; ++p) own[c].at[p] = mine[rows[c] * my_row + pixel + p * apart];
  }
#pragma unroll 1
  for (int o = 0; o < others; o += 4) {
    Four<T> w[4];  // to_x: [pixel][other], to_y: [other][pixel]
#pragma unroll
    for (int k = 0; k < 4; ++k)
      w[k] = load4(pull == Pull::to_x ? W + (pixel + k * apart) * ldw + o : W + (o + k) * ldw + pixel);
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      Four<T> other = load4(theirs + rows[c] * their_row + o);
#pragma unroll
      for (int q = 0; centred && q < 4; ++q) other.at[q] -= middle[c];
#pragma unroll
      for (int q = 0; q < 4; ++q)
#pragma unroll
        for (int p = 0; p < 4; ++p) {
          const T weight = pull == Pull::to_x ? w[p].at[q] : w[q].at[p];
          add_pull<pair>(sum[c][p], weight, own[c].at[p], other.at[q]);  // hot: pull
        }
    }
  }
}

}  // namespace sfr::cuda

// Sums over channels for every pair of pixels, and over pixels for every channel: the two loops in which almost all
// arithmetic on features happens. Each thread holds a small tile of results in registers.
#pragma once

#include "features.cuh"

// After what it is made of.
#include "../ground/metric.h"

namespace sfr::cuda {

// Units of work of a team: tiles of results, times slices of the channels where there are more threads than tiles.
struct Tiling {
  int rows, columns;  // tiles
  int slices;         // of a panel's channels
  int edge;           // of a tile

  SFR_BOTH Tiling(int n, int m, int tile, int threads)
      : rows((n + tile - 1) / tile), columns((m + tile - 1) / tile), slices(1), edge(tile) {
    if (rows * columns < threads) slices = threads / (rows * columns);
  }
  SFR_BOTH int tiles() const { return rows * columns; }
  // Passes over the features.
  SFR_BOTH int passes(int threads) const { return slices > 1 ? 1 : (tiles() + threads - 1) / threads; }
};

// Pixels of the tile that begins at `first`.
SFR_BOTH int part_of(int pixels, int first, int tile) {
  return pixels - first < tile ? pixels - first : tile;
}

// Row length of a panel: whole tiles, whole 16 bytes.
SFR_BOTH int panel_row(int pixels, int edge) {
  const int padded = (pixels + edge - 1) / edge * edge;
  return (padded + 3) / 4 * 4;
}

// Four neighbours, the first at a multiple of 16 bytes.
template <class T>
struct alignas(16) Four {
  T at[4];
};
template <class T>
SFR_DEVICE Four<T> load4(const T* from) {
  return load_vector<Four<T>>(from);
}

// An edge of 7 wastes nothing on the maps of vision networks, 7, 14, 28 and 56 pixels wide; 4 suits small and odd
// sizes.
template <class T>
SFR_BOTH int tile_edge(int n, int m) {
  return sizeof(T) == 4 && n % 7 == 0 && m % 7 == 0 ? 7 : 4;
}

template <Pair pair, int edge, class T>
SFR_DEVICE void add_pairs(const T* x, const T* y, T* sum) {
  T a[edge], b[edge];
  if constexpr (edge == 4) {
    const Four<T> xs = load4(x), ys = load4(y);
#pragma unroll
    for (int k = 0; k < 4; ++k) a[k] = xs.at[k], b[k] = ys.at[k];
  } else {
#pragma unroll
    for (int k = 0; k < edge; ++k) a[k] = x[k], b[k] = y[k];
  }
#pragma unroll
  for (int r = 0; r < edge; ++r)
#pragma unroll
    for (int c = 0; c < edge; ++c) add_pair<pair>(sum[r * edge + c], a[r], b[c]);  // hot: pair
}

// Two buffers each for x and y.
template <class T>
struct Panels {
  T* x[2];
  T* y[2];
  int x_row, y_row;  // row lengths
  int channels;      // of a panel

  static SFR_BOTH int64_t bytes(int channels, int x_row, int y_row) {
    return 2 * int64_t(channels) * (x_row + y_row) * int64_t(sizeof(T));
  }

  SFR_DEVICE Panels(Arena arena, int of_channels, int x_length, int y_length)
      : x_row(x_length), y_row(y_length), channels(of_channels) {
    for (int k = 0; k < 2; ++k) {
      x[k] = arena.take<T>(int64_t(channels) * x_row);
      y[k] = arena.take<T>(int64_t(channels) * y_row);
    }
  }

  // Tiles reach beyond the last pixel; what they find there is thrown away, or weighed with 0, so it must be a number.
  SFR_DEVICE void clear_ends(const Team& team, int x_pixels, int y_pixels) {
    const auto clear = [&](T* panel, int row, int pixels) {
      const int ends = row - pixels;
      for (int e = team.rank; e < ends * channels; e += team.size) panel[e / ends * row + pixels + e % ends] = 0;
    };
    for (int k = 0; k < 2; ++k) {
      clear(x[k], x_row, x_pixels);
      clear(y[k], y_row, y_pixels);
    }
  }
};

// Streams all channels of both regions through the panels and calls use(buffer, channels) for each, with the
// next one already on its way. `use` must leave the panels alone. A barrier must follow before they are filled again.
template <class T, class Use>
SFR_DEVICE void for_each_panel(Team& team, const Reader& x, const Reader& y, int C, Panels<T>& panels, Use&& use) {
  Fetched<T> next_x, next_y;
  const auto width = [&](int c) { return C - c < panels.channels ? C - c : panels.channels; };
  fetch(team, x, 0, width(0), 0, next_x);
  fetch(team, y, 0, width(0), 0, next_y);
  int k = 0;
#pragma unroll 1
  for (int c = 0; c < C; c += panels.channels, k ^= 1) {
    commit(team, x, c, width(c), next_x, panels.x[k], panels.x_row);
    commit(team, y, c, width(c), next_y, panels.y[k], panels.y_row);
    team.sync();  // the other buffer was last read before the barrier of the panel before
    const int after = c + panels.channels;
    if (after < C) {  // mutant: past the last channel there is nothing to fetch
      fetch(team, x, after, width(after), 0, next_x);
      fetch(team, y, after, width(after), 0, next_y);
    }
    use(k, width(c));
  }
}

// out[i][j] = sum over channels of pair(x_i, y_j), by tiles of `edge`, 4 or (in float32) 7. The features are streamed
// by the same loop for every kind of tile: it is the larger part of the code.
template <class T>
SFR_DEVICE void pair_sums(Team& team, Pair pair, int edge, const Reader& x, const Reader& y, int C, Panels<T>& panels,
                          T* out, int64_t ld) {
  constexpr int most = sizeof(T) == 4 ? 7 : 4;
  const int n = x.region.count, m = y.region.count;
  const Tiling tiling(n, m, edge, team.size);
#pragma unroll 1
  for (int pass = 0; pass < tiling.passes(team.size); ++pass) {
    const int unit = pass * team.size + team.rank;
    const int slice = unit / tiling.tiles(), tile = unit - slice * tiling.tiles();
    const bool busy = slice < tiling.slices;
    const int row = tile / tiling.columns * edge, column = (tile - row / edge * tiling.columns) * edge;
    T sums[most * most] = {};
    for_each_panel(team, x, y, C, panels, [&](int k, int channels) {
      if (!busy) return;
      const T *a = panels.x[k] + row, *b = panels.y[k] + column;
      const auto add = [&](auto kind, auto size) {
#pragma unroll 1
        for (int s = slice; s < channels; s += tiling.slices)
          add_pairs<decltype(kind)::value, decltype(size)::value>(a + s * panels.x_row, b + s * panels.y_row, sums);
      };
      const auto sized = [&](auto kind) {
        if (most == 7 && edge == 7)
          add(kind, Constant<int, most>{});
        else
          add(kind, Constant<int, 4>{});
      };
      with_pair(pair, sized);
    });
    const auto write = [&](auto size, bool first) {
      constexpr int E = decltype(size)::value;
#pragma unroll
      for (int r = 0; r < E; ++r)
#pragma unroll
        for (int c = 0; c < E; ++c)
          if (row + r < n && column + c < m) {
            T* to = out + (row + r) * ld + column + c;
            *to = first ? sums[r * E + c] : *to + sums[r * E + c];  // hot: slice of pairs
          }
    };
#pragma unroll 1
    for (int turn = 0; turn < tiling.slices; ++turn) {
      if (busy && slice == turn) {
        if (most == 7 && edge == 7)
          write(Constant<int, most>{}, turn == 0);
        else
          write(Constant<int, 4>{}, turn == 0);
      }
      team.sync();
    }
  }
}

// Which side of a pair is gathered over.
enum class Pull {
  to_x,  // out_i = sum_j pull(W_ij, x_i, y_j), such as W (x - y)
  to_y,  // out_j = sum_i pull(W_ij, y_j, x_i)
};

// One tile of 4 pixels x 4 channels of a gradient: adds the sums over the `others` pixels of the other side. W has rows
// of the student's pixels, and zeros beyond the last pixel of either side, up to a multiple of 4.
template <Pair pair, Pull pull, class T>
SFR_DEVICE void pull_tile(const T* mine, int my_row, const T* theirs, int their_row, int others, const T* W,
                          int64_t ldw, int pixel, int channel, int channels, T (&sum)[4][4]) {
  // Tiles may reach beyond the last channel of the panel: those repeat it and are not stored.
  int rows[4];
  Four<T> own[4];
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    rows[c] = channel + c < channels ? channel + c : channels - 1;
    own[c] = load4(mine + rows[c] * my_row + pixel);
  }
#pragma unroll 1
  for (int o = 0; o < others; o += 4) {
    Four<T> w[4];  // to_x: [pixel][other], to_y: [other][pixel]
#pragma unroll
    for (int k = 0; k < 4; ++k)
      w[k] = load4(pull == Pull::to_x ? W + (pixel + k) * ldw + o : W + (o + k) * ldw + pixel);
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const Four<T> other = load4(theirs + rows[c] * their_row + o);
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

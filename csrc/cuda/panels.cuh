// Features of two regions in shared memory, a panel of channels at a time, with the next one already on its way.
#pragma once

#include "features.cuh"

namespace sfr::cuda {

// Pixels of the tile that begins at `first`.
SFR_BOTH int part_of(int pixels, int first, int tile) {
  return pixels - first < tile ? pixels - first : tile;
}

// Row length of a panel: whole tiles, which of 4 pixels are read 16 bytes at a time.
SFR_BOTH int panel_row(int pixels, int edge) {
  return (pixels + edge - 1) / edge * edge;
}

// What is read of panels beside the pixels and channels that there are: pixels after the last one of x and of y, and
// whole groups of so many channels.
struct Beyond {
  int x = 0, y = 0, channels = 1;
};

// Two buffers each for x and y.
template <class T>
struct Panels {
  T *first_x, *first_y;
  int step;          // from one buffer to the other: both of x and y follow each other
  int x_row, y_row;  // row lengths
  int channels;      // of a panel
  Beyond beyond;

  SFR_DEVICE T* x(int k) const { return first_x + k * step; }
  SFR_DEVICE T* y(int k) const { return first_y + k * step; }
  // Entries of all buffers, which are free for others between panels.
  SFR_DEVICE int entries() const { return 2 * step; }

  static SFR_BOTH int64_t bytes(int channels, int x_row, int y_row, const Beyond& beyond) {
    Arena one;
    one.take<T>(int64_t(channels) * x_row + beyond.x);
    one.take<T>(int64_t(channels) * y_row + beyond.y);
    return 2 * int64_t(one.used);
  }

  SFR_DEVICE Panels(Arena arena, int of_channels, int x_length, int y_length, const Beyond& read_beyond)
      : x_row(x_length), y_row(y_length), channels(of_channels), beyond(read_beyond) {
    first_x = arena.take<T>(int64_t(channels) * x_row + beyond.x);
    first_y = arena.take<T>(int64_t(channels) * y_row + beyond.y);
    step = int(arena.take<T>(0) - first_x);
  }

  // Tiles reach beyond the last pixel; what they find there is thrown away, or weighed with 0, so it must be a number.
  SFR_DEVICE void clear_ends(const Team& team, int x_pixels, int y_pixels) {
    const auto clear = [&](T* panel, int row, int pixels) {
      const int ends = row - pixels;
      for (int e = team.rank; e < ends * channels; e += team.size) panel[e / ends * row + pixels + e % ends] = 0;
    };
    for (int k = 0; k < 2; ++k) {
      clear(x(k), x_row, x_pixels);
      clear(y(k), y_row, y_pixels);
    }
  }
  // What is read behind the channels of panel k.
  SFR_DEVICE void clear_beyond(const Team& team, int k, int filled) const {
    const auto clear = [&](T* panel, int row, int pixels) {
      const int end = round_up(filled, beyond.channels) * row + pixels;
#pragma unroll 1
      for (int e = filled * row + team.rank; e < end; e += team.size) panel[e] = 0;
    };
    clear(x(k), x_row, beyond.x);
    clear(y(k), y_row, beyond.y);
  }
};

// One side of `for_each_panel`: `ask` for a panel, then `put` what has come to where it belongs. A barrier follows.
template <class T, bool async = filled_async<T>>
struct Incoming {
  const Reader& reader;
  int row;
  Fetched<T> next = {};  // else registers would be kept for what was there before

  SFR_DEVICE Incoming(const Reader& of, int length) : reader(of), row(length) {}
  SFR_DEVICE void ask(const Team& team, int c, int channels, T*) { fetch(team, reader, c, channels, 0, next); }
  SFR_DEVICE void put(const Team& team, int c, int channels, T* panel) const {
    commit(team, reader, c, channels, next, panel, row);
  }
};
template <class T>
struct Incoming<T, true> {
  const Reader& reader;
  int row;

  SFR_DEVICE Incoming(const Reader& of, int length) : reader(of), row(length) {}
  SFR_DEVICE void ask(const Team& team, int c, int channels, T* panel) {
    copy_panel(team, reader, c, channels, panel, row);
  }
  SFR_DEVICE void put(const Team& team, int, int channels, T* panel) const {
    wait_copies();
    if (is_expanded(team, reader, channels, row)) expand_halves(team, reader, channels, panel, row);
  }
};

// Streams all channels of both regions through the panels and calls use(buffer, first channel, channels) for each, with
// the next one already on its way. `use` must leave the panels alone. A barrier must follow before they are filled
// again.
template <class T, class Use>
SFR_DEVICE void for_each_panel(Team& team, const Reader& x, const Reader& y, int C, Panels<T>& panels, Use&& use) {
  Incoming<T> of_x(x, panels.x_row), of_y(y, panels.y_row);
  const auto width = [&](int c) { return C - c < panels.channels ? C - c : panels.channels; };
  int k = 1;
#pragma unroll 1
  for (int c = -panels.channels; c < C; c += panels.channels, k ^= 1) {
    const bool here = c >= 0;  // before, the first is asked for
    if (here) {
      of_x.put(team, c, width(c), panels.x(k));
      of_y.put(team, c, width(c), panels.y(k));
      if (panels.beyond.channels > 1) panels.clear_beyond(team, k, width(c));
    }
    team.sync();  // the other buffer was last read before, or its ends cleared
    const int after = c + panels.channels;
    if (after < C) {  // mutant: past the last channel there is nothing to fetch
      of_x.ask(team, after, width(after), panels.x(k ^ 1));
      of_y.ask(team, after, width(after), panels.y(k ^ 1));
    }
    if (here) use(k, c, width(c));
  }
}

// Which side of a pair is gathered over.
enum class Pull {
  to_x,  // out_i = sum_j pull(W_ij, x_i, y_j), such as W (x - y)
  to_y,  // out_j = sum_i pull(W_ij, y_j, x_i)
};

// What gradients have of the pixels themselves: cosine's coefficients; by products, the sums of the pixels' weights
// (NaN: of this pixel by differences), and a panel's channels of the centre, so far apart.
template <class T>
struct OwnShare {
  const T *own, *centre;  // no centre: not of centred features
  int apart;
};

}  // namespace sfr::cuda

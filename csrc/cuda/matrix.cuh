// Products of centred features by matrix instructions, on GPUs where those are fast.
//
// One instruction multiplies 16 pixels of the student by 8 of the teacher over 8 channels, in numbers of 11 bits
// (TF32). A feature is the sum of two of these, to 2^-23 of it, so that three products make one, to about 2^-22. Matrix
// units cut off what they add: the products of 8 channels are added up from 0, and go on to what came before by an
// addition that rounds.
#pragma once

#include "panels.cuh"

namespace sfr::cuda {

// What a warp has of all pairs at a time: tiles of one instruction's pairs, and channels.
struct MatrixUnit {
  static constexpr int tile_height = 16, tile_width = 8, depth = 8;
  static constexpr int rows = 2, columns = 7;  // of tiles
  static constexpr int height = rows * tile_height, width = columns * tile_width;
  static constexpr int of_tile = 4, sums = rows * columns * of_tile;  // of a lane
};

// What it reads of panels: whole tiles, of columns up to four together.
SFR_BOTH Beyond beyond_of(bool matrix) {
  return matrix ? Beyond{MatrixUnit::tile_height - 1, 4 * MatrixUnit::tile_width - 1, MatrixUnit::depth} : Beyond{};
}

// Units of a team, times slices of the channels where there are more warps than units.
struct MatrixTiling {
  int rows, columns;  // units
  int slices;

  SFR_BOTH MatrixTiling(int n, int m, int of_channels)
      : rows((n + MatrixUnit::height - 1) / MatrixUnit::height),
        columns((m + MatrixUnit::width - 1) / MatrixUnit::width),
        slices(of_channels) {}
  SFR_BOTH int units() const { return rows * columns; }
  // The sums of slices meet, a tile at a time at least, in memory that holds so many entries.
  SFR_BOTH int most_slices(int warps, int room) const {
    const int within = room / (MatrixUnit::of_tile * warp_threads), most = warps < within ? warps : within;
    return units() < most ? most / units() : 1;
  }
  // Passes over the features.
  SFR_BOTH int passes(int warps) const { return slices > 1 ? 1 : (units() + warps - 1) / warps; }
};

// A number as the sum of two that matrix instructions take.
struct Halves {
  uint32_t high, low;

  Halves() = default;
  SFR_DEVICE explicit Halves(float x) {
    // The nearest, of infinity itself. Cut off, it would be as far off to one side for all.
    high = (float_bits(x) + 0x1000u) & ~0x1fffu;
    low = float_bits(x - bits_float(high));
  }
};

// A lane's part of one of two matrices.
template <int count>
struct Fragments {
  uint32_t high[count], low[count];

  SFR_DEVICE void put(int k, const Halves& of) { high[k] = of.high, low[k] = of.low; }
};

// Adds the products of one matrix and several others. Each sum waits for its last product, so that of all of them come
// in turn.
template <int count>
SFR_DEVICE void multiply(float (&sums)[count][MatrixUnit::of_tile], const Fragments<4>& a,
                         const Fragments<2> (&b)[count]) {
#pragma unroll
  for (int c = 0; c < count; ++c) multiply_tf32(sums[c], a.low, b[c].high);
#pragma unroll
  for (int c = 0; c < count; ++c) multiply_tf32(sums[c], a.high, b[c].low);
#pragma unroll
  for (int c = 0; c < count; ++c) multiply_tf32(sums[c], a.high, b[c].high);
}

// Adds the products of 8 channels to a lane's sums of its warp's unit, of which so many tiles are needed. x and y are
// panels from the unit's first pixel on.
template <class T>
SFR_DEVICE void add_matrix_products(int lane, const T* x, int x_row, const T* y, int y_row, const T* centre, int rows,
                                    int columns, T* sums) {
  constexpr int half = MatrixUnit::depth / 2;
  const int pixel = lane / half, channel = lane % half;
  const T middle[2] = {centre[channel], centre[channel + half]};
  x += channel * x_row + pixel;
  y += channel * y_row + pixel;
  const auto add = [&](auto first, auto count) {
    constexpr int begin = decltype(first)::value, end = begin + decltype(count)::value;
    Fragments<2> b[end - begin];
#pragma unroll
    for (int c = begin; c < end; ++c)
#pragma unroll
      for (int k = 0; k < 2; ++k)
        b[c - begin].put(k, Halves(y[k * half * y_row + c * MatrixUnit::tile_width] - middle[k]));
#pragma unroll
    for (int r = 0; r < MatrixUnit::rows; ++r) {
      if (r >= rows) break;
      Fragments<4> of_x;
#pragma unroll
      for (int k = 0; k < 4; ++k)
        of_x.put(k, Halves(x[k / 2 * half * x_row + r * MatrixUnit::tile_height + k % 2 * 8] - middle[k / 2]));
      float products[end - begin][MatrixUnit::of_tile] = {};
      multiply(products, of_x, b);
#pragma unroll
      for (int c = begin; c < end; ++c) {
        T* sum = sums + (r * MatrixUnit::columns + c) * MatrixUnit::of_tile;
#pragma unroll
        for (int k = 0; k < MatrixUnit::of_tile; ++k) sum[k] += products[c - begin][k];
      }
    }
  };
  // Where few columns are left, half of the unit is none.
  add(Constant<int, 0>{}, Constant<int, 4>{});
  if (columns > 4) add(Constant<int, 4>{}, Constant<int, MatrixUnit::columns - 4>{});
}

// The pair of sum k of a lane in tile `tile` of a unit: pixels from its first on.
struct MatrixPair {
  int row, column;

  SFR_DEVICE MatrixPair(int lane, int tile, int k) {
    const int r = tile / MatrixUnit::columns, c = tile - r * MatrixUnit::columns;
    row = r * MatrixUnit::tile_height + lane / 4 + k / 2 * 8;
    column = c * MatrixUnit::tile_width + lane % 4 * 2 + k % 2;
  }
};

// put(i, j, sum) for the pairs of a warp's unit within n x m.
template <class T, class Put>
SFR_DEVICE void put_matrix_sums(int lane, int n, int m, const T* sums, Put&& put) {
  lane = afresh(lane);
#pragma unroll
  for (int k = 0; k < MatrixUnit::sums; ++k) {
    const MatrixPair pair(lane, k / MatrixUnit::of_tile, k % MatrixUnit::of_tile);
    if (pair.row < n && pair.column < m) put(pair.row, pair.column, sums[k]);
  }
}

// The same from all warps, of slices of the channels, which are added in order: through `parts`, which has room for
// `room` entries, as many tiles at a time as fit there.
template <class T, class Put>
SFR_DEVICE void add_matrix_slices(const Team& team, const MatrixTiling& tiling, int n, int m, bool busy, const T* sums,
                                  T* parts, int room, Put&& put) {
  constexpr int tiles = MatrixUnit::rows * MatrixUnit::columns, of_tile = MatrixUnit::of_tile;
  const int units = afresh(tiling.units()), warps = units * tiling.slices, lanes = units * warp_threads;
  const int fit = room / (warps * of_tile * warp_threads), each = fit < tiles ? fit : tiles;
  const Divider by_lanes(lanes), by_columns(tiling.columns);
#pragma unroll 1
  for (int first = 0; first < tiles; first += each) {
    const int end = first + each < tiles ? first + each : tiles;
    if (busy)
#pragma unroll
      for (int k = 0; k < MatrixUnit::sums; ++k)
        if (k >= first * of_tile && k < end * of_tile)
          parts[(k - first * of_tile) * warps * warp_threads + team.rank] = sums[k];
    team.sync();
#pragma unroll 1
    for (int e = team.rank; e < (end - first) * of_tile * lanes; e += team.size) {
      const int k = by_lanes(e), at = e - k * lanes, unit = at / warp_threads;
      const T* part = parts + k * warps * warp_threads + at;
      T sum = part[0];
#pragma unroll 4
      for (int s = 1; s < tiling.slices; ++s) sum += part[s * lanes];
      const MatrixPair pair(at % warp_threads, first + k / of_tile, k % of_tile);
      const int row = by_columns(unit), i = row * MatrixUnit::height + pair.row;
      const int j = (unit - row * tiling.columns) * MatrixUnit::width + pair.column;
      if (i < n && j < m) put(i, j, sum);
    }
    team.sync();
  }
}

// store(i, j, sum over channels of the products of both pixels less the `centre`) for every pair; by slices of the
// channels, whose number decides the bits. The first pass over the features calls seen(buffer, first channel, channels)
// with every panel. Ends with a barrier.
template <class T, class Seen, class Store>
SFR_DEVICE void matrix_sums(Team& team, int slices, const Reader& x, const Reader& y, int C, const T* centre,
                            Panels<T>& panels, Seen&& seen, Store&& store) {
  constexpr int depth = MatrixUnit::depth;
  const int n = x.region.count, m = y.region.count;
  const MatrixTiling tiling(n, m, slices);
#pragma unroll 1
  for (int pass = 0; pass < tiling.passes(team.warps()); ++pass) {
    const int work = pass * team.warps() + team.warp();
    const int slice = work / tiling.units(), unit = work - slice * tiling.units(), unit_row = unit / tiling.columns;
    const int row = unit_row * MatrixUnit::height, column = (unit - unit_row * tiling.columns) * MatrixUnit::width;
    const bool busy = slice < slices;
    const auto tiles = [](int pixels, int of_tile) { return (pixels + of_tile - 1) / of_tile; };
    const int rows = tiles(n - row, MatrixUnit::tile_height), columns = tiles(m - column, MatrixUnit::tile_width);
    T sums[MatrixUnit::sums] = {};
    for_each_panel(team, x, y, C, panels, [&](int k, int c, int channels) {
      if (pass == 0) seen(k, c, channels);
      if (!busy) return;
#pragma unroll 1
      for (int s = slice * depth; s < channels; s += slices * depth)
        add_matrix_products(team.lane(), panels.x(k) + s * panels.x_row + row, panels.x_row,
                            panels.y(k) + s * panels.y_row + column, panels.y_row, centre + c + s, rows, columns, sums);
    });
    team.sync();
    if (slices > 1)
      add_matrix_slices(team, tiling, n, m, busy, sums, panels.first_x, panels.entries(), store);
    else if (busy)
      put_matrix_sums(team.lane(), n - row, m - column, sums,
                      [&](int i, int j, T sum) { store(row + i, column + j, sum); });
  }
  team.sync();
}

// What a warp has of a gradient at a time.
struct MatrixPull {
  static constexpr int rows = 2, columns = 2;  // of tiles
  static constexpr int height = rows * MatrixUnit::tile_height, width = columns * MatrixUnit::tile_width;

  static SFR_DEVICE int columns_of(int channels) { return (channels + width - 1) / width; }
  static SFR_DEVICE int units(int pixels, int channels) {
    return (pixels + height - 1) / height * columns_of(channels);
  }
};

// Whether a pixel's gradient is made of products: its pairs are all told.
template <class T>
SFR_DEVICE bool is_pulled_by_products(T own) {
  return own - own == 0;
}

// Whether all channels of the centre are numbers; of a warp.
template <class T>
SFR_DEVICE bool centre_is_finite(int lane, const OwnShare<T>& share, int channels) {
  T broken = 0;
#pragma unroll 1
  for (int c = lane; c < channels; c += warp_threads) {
    const T middle = share.centre[c * share.apart];
    if (!(middle - middle == 0)) broken = 1;
  }
  return over_lanes<Max>(broken, warp_threads) == 0;
}

// A panel of one side's gradient (`pull_panel`), for pixels whose pairs are all told. W as there.
template <Pull pull, class T>
SFR_DEVICE void matrix_pull(const Team& team, int first_unit, const T* mine, int my_row, const T* theirs, int their_row,
                            int pixels, int others, const T* W, int64_t ldw, int channels, const OwnShare<T>& share,
                            bool first, bool last, T* out) {
  constexpr int half = MatrixUnit::depth / 2, of_tile = MatrixUnit::of_tile;
  constexpr int rows = MatrixPull::rows, columns = MatrixPull::columns;
  const int lane = team.lane(), group = lane / half, within = lane % half;
  const int unit_columns = MatrixPull::columns_of(channels), units = MatrixPull::units(pixels, channels);
  const int warps = team.warps();
  const int64_t along = pull == Pull::to_x ? 1 : ldw, across = pull == Pull::to_x ? ldw : 1;
#pragma unroll 1
  for (int unit = (team.warp() + warps - first_unit % warps) % warps; unit < units; unit += warps) {
    const int unit_row = unit / unit_columns, pixel0 = unit_row * MatrixPull::height;
    const int channel0 = (unit - unit_row * unit_columns) * MatrixPull::width;
    // Beyond the last pixel and channel those are repeated and not stored.
    const T* weights[2 * rows];
#pragma unroll
    for (int r = 0; r < 2 * rows; ++r) {
      const int pixel = pixel0 + 8 * r + group;
      weights[r] = W + (pixel < pixels ? pixel : pixels - 1) * across + within * along;
    }
    const T* features[columns];
    T middle[columns];
#pragma unroll
    for (int c = 0; c < columns; ++c) {
      const int channel = channel0 + 8 * c + group, known = channel < channels ? channel : channels - 1;
      features[c] = theirs + known * their_row + within;
      middle[c] = share.centre[known * share.apart];
    }
    const auto each = [&](auto f) {
#pragma unroll
      for (int k = 0; k < rows * columns * of_tile; ++k) {
        const int tile = k / of_tile, q = k % of_tile;
        const int pixel = pixel0 + tile / columns * MatrixUnit::tile_height + group + q / 2 * 8;
        const int channel = channel0 + tile % columns * MatrixUnit::tile_width + 2 * within + q % 2;
        if (pixel < pixels && channel < channels && is_pulled_by_products(share.own[pixel]))
          f(k, pixel, channel, channel * my_row + pixel);
      }
    };
    T sums[rows * columns * of_tile] = {};
    if (!first) each([&](int k, int, int, int at) { sums[k] = out[at]; });
#pragma unroll 2
    for (int o = 0; o < others; o += MatrixUnit::depth) {
      const bool whole = o + half < others;
      Fragments<2> b[columns];
#pragma unroll
      for (int c = 0; c < columns; ++c) {
        b[c].put(0, Halves(features[c][o] - middle[c]));
        b[c].put(1, Halves(whole ? features[c][o + half] - middle[c] : 0));
      }
#pragma unroll
      for (int r = 0; r < rows; ++r) {
        Fragments<4> a;
#pragma unroll
        for (int k = 0; k < 4; ++k)
          a.put(k, Halves(k < 2 || whole ? weights[2 * r + k % 2][(o + k / 2 * half) * along] : 0));
        float products[columns][of_tile] = {};
        multiply(products, a, b);
#pragma unroll
        for (int k = 0; k < columns * of_tile; ++k)
          sums[r * columns * of_tile + k] -= products[k / of_tile][k % of_tile];
      }
    }
    each([&](int k, int pixel, int channel, int at) {
      const T own = share.own[pixel] * (mine[at] - share.centre[channel * share.apart]);
      out[at] = last ? sums[k] + own : sums[k];
    });
  }
}

}  // namespace sfr::cuda

// The threads that work on one problem: some warps of one block, or all threads of several blocks that wait for each
// other. Sums run in an order fixed by the team's shape, which follows from the problem's own.
#pragma once

#include "device.cuh"

namespace sfr::cuda {

constexpr int most_warps = 8;       // of a team in one block
constexpr int most_scalars = 8;     // summed at once
constexpr int whole_barrier = 1;    // named barriers of a block: all threads of the team,
constexpr int solvers_barrier = 2;  // and those that solve
constexpr int counter_bytes = 16;   // that a counter of blocks takes

// Hands out pieces of memory that somebody else owns, each on a multiple of 16 bytes. Without memory it measures.
struct Arena {
  unsigned char* base = nullptr;
  size_t used = 0;

  template <class T>
  SFR_BOTH T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(base + used);
    used += (sizeof(T) * size_t(count) + 15) / 16 * 16;
    return piece;
  }
};

SFR_BOTH int round_up(int64_t n, int to) {
  return int((n + to - 1) / to) * to;
}

// i / n for i up to 2^22, without a division.
struct Divider {
  int n;
  float inverse;

  SFR_DEVICE explicit Divider(int by) : n(by), inverse(1.0f / float(by)) {}
  SFR_DEVICE int operator()(int i) const { return int((float(i) + 0.5f) * inverse); }
};

struct Team {
  int rank = 0, size = 32;      // this thread among those of the team in this block; whole warps
  int barrier = whole_barrier;  // a team of one warp needs none
  int block = 0, blocks = 1;    // this block among those of the team
  unsigned* counter = nullptr;  // of the blocks' barriers; 0 at launch
  unsigned epoch = 0;
  int turn = 0;  // which half of the warps' buffer is next

  SFR_DEVICE int lane() const { return rank % warp_threads; }
  SFR_DEVICE int warp() const { return rank / warp_threads; }
  SFR_DEVICE int warps() const { return size / warp_threads; }

  // Which half of the blocks' buffer is next: between two writes all who read it have come to a barrier.
  SFR_DEVICE int exchange() const { return int(epoch & 1); }

  // The team's threads of this block.
  SFR_DEVICE void sync() const {
    // The numbers of barriers as constants: a block then has these and no more.
    if (size == warp_threads)
      sync_warp();
    else if (barrier == whole_barrier)
      sync_threads(whole_barrier, size);
    else
      sync_threads(solvers_barrier, size);
  }

  // The whole team, all blocks.
  SFR_DEVICE void grid_barrier() {
    sync();
    if (blocks == 1) return;
    ++epoch;
    if (rank == 0) arrive_and_wait(counter, epoch * unsigned(blocks));
    sync();
  }
};

struct Sum {
  template <class T>
  SFR_DEVICE T operator()(T x, T y) const {
    return x + y;
  }
  template <class T>
  static SFR_DEVICE T nothing() {
    return T(0);
  }
};

struct Max {
  template <class T>
  SFR_DEVICE T operator()(T x, T y) const {
    return x < y ? y : x;
  }
  template <class T>
  static SFR_DEVICE T nothing() {
    return -T(INFINITY);
  }
};

// Over `lanes` neighbouring lanes, a power of two; all of them get the same bits.
template <class Op, class T>
SFR_DEVICE T over_lanes(T x, int lanes) {
#pragma unroll 1
  for (int mask = lanes / 2; mask > 0; mask /= 2) x = Op()(x, shuffle_xor(x, mask));
  return x;
}

// Several values over all lanes of a warp, one beside the other, where that is to be fast.
template <class Op, int count, class T>
SFR_DEVICE void over_all_lanes(T* x) {
#pragma unroll
  for (int mask = warp_threads / 2; mask > 0; mask /= 2)
#pragma unroll
    for (int k = 0; k < count; ++k) x[k] = Op()(x[k], shuffle_xor(x[k], mask));
}

// Rows of a matrix that a warp is at together: what it reads of them is on its way at the same time.
constexpr int rows_together = 4;

// Of `count` values in each of 2 * mask neighbouring lanes what one of them comes to over all: in the first 2 * mask /
// count lanes the first, and so on. Each step halves what a lane still has to do with.
template <class Op, int mask, int count, class T>
SFR_DEVICE T folded(const T (&x)[count], int lane) {
  if constexpr (count > 1) {
    const bool upper = lane & mask;
    T half[count / 2];
#pragma unroll
    for (int k = 0; k < count / 2; ++k)
      half[k] = Op()(upper ? x[count / 2 + k] : x[k], shuffle_xor(upper ? x[k] : x[count / 2 + k], mask));
    return folded<Op, mask / 2>(half, lane);
  } else {
    T own = x[0];
#pragma unroll
    for (int m = mask; m > 0; m /= 2) own = Op()(own, shuffle_xor(own, m));
    return own;
  }
}

// Whether rows of `ld` entries from here on can be read four at a time.
template <class T>
SFR_DEVICE bool in_fours(const T* rows, int64_t ld) {
  return reinterpret_cast<uintptr_t>(rows) % 16 == 0 && afresh(int(ld)) % 4 == 0;
}
// Four neighbours: all at once, or those that are there, one by one, and 0.
template <class T, class E>
SFR_DEVICE Four<T> read_four(const E* from, int64_t apart, int left) {
  Four<T> out = {};
#pragma unroll
  for (int k = 0; k < 4; ++k)
    if (k < left) out.at[k] = T(to_float(from[k * apart]));
  return out;
}
template <class T>
SFR_DEVICE Four<T> read_four(const T* from, bool whole, int left) {
  return whole && left >= 4 ? load4(from) : read_four<T>(from, int64_t(1), left);
}
template <class T>
SFR_DEVICE void write_four(T* to, const Four<T>& four, bool whole, int left) {
  if (whole && left >= 4) {
    store_vector(to, four);
    return;
  }
#pragma unroll
  for (int k = 0; k < 4; ++k)
    if (k < left) to[k] = four.at[k];
}

// Lanes that share a row of so many columns, four neighbours each: a power of two.
SFR_DEVICE int lanes_of(int columns) {
  int lanes = 1;
#pragma unroll 1
  while (lanes < warp_threads && 4 * lanes < columns) lanes *= 2;
  return lanes;
}

// use(i, j, row, column(j), read(row, j, whole), counts) for columns j to j + 3 of all rows i, j a multiple of 4, where
// `row` is row(i) and, since it is the lane's own, may gather what end(i, row, counts) makes of it: all lanes of a warp
// call that together. A lane is at `rows_together` rows; what is read of them is all on its way before the first of it
// is used. In the place of rows behind the last one stands that one, which does not count. `row`, `column` and `read`
// have no effects. `whole`: known to the compiler in `read`.
template <class Row, class Column, class Read, class Use, class End>
SFR_DEVICE void each_four(const Team& team, int rows, int columns, bool whole, Row&& row, Column&& column, Read&& read,
                          Use&& use, End&& end) {
  // What follows from a thread's place is found anew: else it takes registers of all other passes.
  const int lane = afresh(team.lane()), lanes = lanes_of(afresh(columns)), own = lane / lanes * rows_together;
  const int step = warp_threads / lanes * rows_together;
#pragma unroll 1
  for (int first = team.warp() * step; first < rows; first += team.warps() * step) {
    int at[rows_together];
    decltype(row(0)) of_row[rows_together];
#pragma unroll
    for (int r = 0; r < rows_together; ++r) {
      at[r] = first + own + r < rows ? first + own + r : rows - 1;
      of_row[r] = row(at[r]);
    }
#pragma unroll 1
    for (int base = 0; base < columns; base += 4 * lanes) {
      const int j = base + lane % lanes * 4;
      decltype(column(0)) of_column = {};
      decltype(read(of_row[0], 0, Constant<bool, true>{})) found[rows_together] = {};
      const auto ask = [&](auto known) {
#pragma unroll
        for (int r = 0; r < rows_together; ++r) found[r] = read(of_row[r], j, known);
      };
      if (j < columns) {
        of_column = column(j);
        if (whole)
          ask(Constant<bool, true>{});
        else
          ask(Constant<bool, false>{});
      }
      sync_warp();  // mutant: the compiler would ask for a row when it needs it, and wait for each
      if (j < columns)
#pragma unroll
        for (int r = 0; r < rows_together; ++r) use(at[r], j, of_row[r], of_column, found[r], first + own + r < rows);
    }
#pragma unroll
    for (int r = 0; r < rows_together; ++r) end(at[r], of_row[r], first + own + r < rows);
  }
}
template <class Row, class Column, class Read, class Use>
SFR_DEVICE void each_four(const Team& team, int rows, int columns, bool whole, Row&& row, Column&& column, Read&& read,
                          Use&& use) {
  each_four(team, rows, columns, whole, row, column, read, use, [](int, auto&, bool) {});
}

// What becomes(i, j, x) of a matrix that it makes of another, [rows][columns]; they may be one.
template <class T, class Becomes>
SFR_DEVICE void map_entries(const Team& team, int rows, int columns, const T* from, int64_t from_ld, T* to,
                            int64_t to_ld, Becomes&& becomes) {
  const bool store = in_fours(to, to_ld);
  each_four(
      team, rows, columns, in_fours(from, from_ld), [&](int i) { return from + i * from_ld; }, [](int) { return 0; },
      [&](const T* row, int j, auto whole) { return read_four(row + j, decltype(whole)::value, columns - j); },
      [&](int i, int j, const T*, int, const Four<T>& found, bool counts) {
        const int left = counts ? columns - j : 0;
        Four<T> out = {};
#pragma unroll
        for (int k = 0; k < 4; ++k)
          if (k < left) out.at[k] = becomes(i, j + k, found.at[k]);
        write_four(to + i * to_ld + j, out, store, left);
      });
}

// What the warps of a block have to say to each other, and the blocks of a team.
template <class T>
struct ReductionBuffer {
  T* warps = nullptr;   // [2][most_warps][most_scalars], shared memory
  T* blocks = nullptr;  // [2][blocks][width + most_scalars], global memory; teams of one block need none
  int width = 0;        // columns

  static SFR_BOTH int64_t entries_of_blocks(int blocks_of_team, int columns) {
    return 2 * int64_t(blocks_of_team) * (columns + most_scalars);
  }
  SFR_DEVICE T* of_block(int turn, int blocks_of_team, int block) const {
    return blocks + (int64_t(turn) * blocks_of_team + block) * (width + most_scalars);
  }
};

constexpr int64_t buffer_entries = 2 * most_warps * most_scalars;

// The warps' values, combined in order: of this block's threads alone. A barrier for them as well.
template <class Op, int count, class T>
SFR_DEVICE void over_block(Team& team, const ReductionBuffer<T>& buffer, T (&x)[count]) {
  static_assert(count <= most_scalars);
#pragma unroll
  for (int k = 0; k < count; ++k) x[k] = over_lanes<Op>(x[k], warp_threads);
  if (team.size == warp_threads) {
    team.sync();
    return;
  }
  T* parts = buffer.warps + team.turn * most_warps * most_scalars;
  team.turn ^= 1;
  if (team.lane() == 0)
#pragma unroll
    for (int k = 0; k < count; ++k) parts[team.warp() * most_scalars + k] = x[k];
  team.sync();
#pragma unroll
  for (int k = 0; k < count; ++k) {
    x[k] = parts[k];
#pragma unroll 1
    for (int w = 1; w < team.warps(); ++w) x[k] = Op()(x[k], parts[w * most_scalars + k]);
  }
}

// A block's values to the buffer of the blocks, and, once all have arrived, those of all blocks, combined in order.
template <int count, class T>
SFR_DEVICE void put_scalars(const Team& team, const ReductionBuffer<T>& buffer, int turn, const T (&x)[count]) {
  T* mine = buffer.of_block(turn, team.blocks, team.block) + buffer.width;
  if (team.rank == 0)
#pragma unroll
    for (int k = 0; k < count; ++k) mine[k] = x[k];
}
template <class Op, int count, class T>
SFR_DEVICE void add_scalars(const Team& team, const ReductionBuffer<T>& buffer, int turn, T (&x)[count]) {
#pragma unroll
  for (int k = 0; k < count; ++k) x[k] = buffer.of_block(turn, team.blocks, 0)[buffer.width + k];
#pragma unroll 4
  for (int b = 1; b < team.blocks; ++b)
#pragma unroll
    for (int k = 0; k < count; ++k) x[k] = Op()(x[k], buffer.of_block(turn, team.blocks, b)[buffer.width + k]);
}

// The same over all blocks of the team; a barrier for all of them.
template <class Op, int count, class T>
SFR_DEVICE void over_team(Team& team, const ReductionBuffer<T>& buffer, T (&x)[count]) {
  over_block<Op>(team, buffer, x);
  if (team.blocks == 1) return;
  const int turn = team.exchange();
  put_scalars(team, buffer, turn, x);
  team.grid_barrier();
  add_scalars<Op>(team, buffer, turn, x);
}

template <class Op, class T>
SFR_DEVICE T over_team(Team& team, const ReductionBuffer<T>& buffer, T x) {
  T one[1] = {x};
  over_team<Op>(team, buffer, one);
  return one[0];
}

}  // namespace sfr::cuda

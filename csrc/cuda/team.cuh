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
constexpr int columns_together = 2;  // of a lane

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

// use(r, i, j, read(row(i), j)) for the entries of rows i = first + r, `rows_together` of them, neighbouring lanes at
// neighbouring columns, `columns_together` times 32 of these at a time. What is read is all on its way before the first
// of it is used: in the place of rows behind the last one, that one is used again, which must come to the same, and
// columns behind the last one are not used. `row`, all that depends on the row alone, and `read` have no effects.
template <class Row, class Read, class Use>
SFR_DEVICE void each_entry_of_rows(int lane, int first, int rows, int columns, Row&& row, Read&& read, Use&& use) {
  int at[rows_together];
  decltype(row(0)) of_row[rows_together];
#pragma unroll
  for (int r = 0; r < rows_together; ++r) {
    at[r] = first + r < rows ? first + r : rows - 1;
    of_row[r] = row(at[r]);
  }
#pragma unroll 1
  for (int j = lane; j < columns; j += columns_together * warp_threads) {
    decltype(read(of_row[0], 0)) found[columns_together][rows_together];
#pragma unroll
    for (int k = 0; k < columns_together; ++k) {
      const int column = j + k * warp_threads < columns ? j + k * warp_threads : j;
#pragma unroll
      for (int r = 0; r < rows_together; ++r) found[k][r] = read(of_row[r], column);
    }
#pragma unroll
    for (int k = 0; k < columns_together; ++k)
      if (j + k * warp_threads < columns)
#pragma unroll
        for (int r = 0; r < rows_together; ++r) use(r, at[r], j + k * warp_threads, found[k][r]);
  }
}
// use(i, j, read(row(i), j)) for all entries; for some of them more than once.
template <class Row, class Read, class Use>
SFR_DEVICE void each_entry(const Team& team, int rows, int columns, Row&& row, Read&& read, Use&& use) {
#pragma unroll 1
  for (int first = team.warp() * rows_together; first < rows; first += team.warps() * rows_together)
    each_entry_of_rows(team.lane(), first, rows, columns, row, read,
                       [&](int, int i, int j, auto found) { use(i, j, found); });
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

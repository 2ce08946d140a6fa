// How a problem is laid out on the device: which threads work on it, and where its plan, its costs and its vectors lie.
// Follows from the problem's own shape and from the device, never from the batch: the same problem gives the same bits
// in any batch.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>

#include "cuda.h"
#include "launch.h"
#include "matrix.cuh"
#include "pairwise.cuh"
#include "plan.cuh"

namespace sfr::cuda {

// What has to be known of an operation to lay it out.
struct Operation {
  int64_t N = 0, M = 0;                       // patches
  int64_t x_pixels = 0, y_pixels = 0, C = 0;  // 0: costs are given
  int64_t G = 1;
  bool windows = false;   // a patch is more than one pixel
  bool norms = false;     // cosine
  bool products = false;  // squared distances by them
  bool matrix = false;    // and those by matrix instructions; known when it is laid out
  bool solved = true;     // there is a plan; else costs alone
  bool backward = false;
  bool reach = false;                // on a side
  bool weighted = false;             // some weights are given
  int compare_x = 0, compare_y = 0;  // pixels that are compared at once; 0: as many as there is room for
};

// The part of a layout that kernels see.
struct ProblemLayout {
  int N = 0, M = 0, x_pixels = 0, y_pixels = 0;
  int threads = 32, solvers = 32;  // of a team in one block; those that solve
  int teams = 1;                   // in one block
  int blocks = 1, slab = 0;        // of a team; rows of each
  bool resident = true;            // plan and vectors in shared memory
  bool cost_near = true;           // costs beside them
  bool in_registers = false;       // the plan while it is solved,
  bool held = false;               // or a copy of one in shared memory, while products of it are taken (HeldPlan)
  bool factorises = false;         // its system: there is room for the factors,
  bool factors_near = false;       // in shared memory
  int ld = 0;
  // Panels of features, to compare and to pull gradients: channels, and pixels of either map. A map with more comes in
  // tiles.
  int panel_channels = 0, compare_x = 0, compare_y = 0;
  int pair_slices = 1;     // of a panel's channels, where features are compared,
  bool by_matrix = false;  // and where they are by matrix instructions
  int matrix_slices = 1;
  int pull_channels = 0, pull_x = 0, pull_y = 0;
  bool pull_by_matrix = false;
  int64_t shared_bytes = 0;  // of one team in its block
  int64_t near_bytes = 0;    // global memory of one block of a team
  int64_t far_bytes = 0;     // global memory of a team

  SFR_BOTH Cover cover() const { return Cover(slab, M, solvers, !resident); }
  // From one vector over the columns to the next.
  SFR_BOTH int column_stride() const { return held && ld < HeldShape::columns ? HeldShape::columns : ld; }
  // Pixels of the student that one block compares at once.
  SFR_BOTH int compared(bool windows) const { return windows ? (x_pixels + blocks - 1) / blocks : slab; }
  // Tiles of the pairs of pixels from which gradients are pulled.
  SFR_BOTH int pull_rows() const { return (x_pixels + pull_x - 1) / pull_x; }
  SFR_BOTH int pull_columns() const { return (y_pixels + pull_y - 1) / pull_y; }
};

template <class T>
struct WeightSummary;
constexpr int64_t summary_entries = 8;  // that it takes

constexpr int most_own_near = 1024;  // pixels of both maps, whose coefficients have room in shared memory

// What a kernel knows of its problems when it is compiled.
enum class Place {
  any,   // nothing
  near,  // plan and vectors lie in shared memory, and one block solves a problem, whose sides have no reach
};
template <Place place>
constexpr bool in_one_block = place != Place::any;

// Where everything of one problem lies; the same function measures on the host and places on the device.
template <class T, Place place = Place::any>
struct ProblemMemory {
  static constexpr bool near_known = in_one_block<place>;

  // Near: in shared memory, or, streamed, in the block's own part of global memory.
  T *P, *cost, *row_weight, *column_weight, *row_vectors, *column_vectors, *partial;
  uint8_t *x_used, *y_used;
  // Shared memory always.
  T* warps;
  WeightSummary<T>* summary;
  Arena compare_panels, pull_panels, factors;
  // Far: global memory of the team.
  T *blocks, *far_cost, *pixel_costs, *gathered;
  T *x_own, *y_own;  // cosine, and gradients by products, for which one block has those of small maps in shared memory
  T *x_inverse, *y_inverse, *x_sums, *y_sums;  // cosine
  size_t shared_end, near_end, far_end;

  SFR_BOTH ProblemMemory(const ProblemLayout& s, const Operation& operation, Arena shared, Arena near, Arena far) {
    const int rows = round_up(s.slab, 4);
    const bool reach = !near_known && operation.reach;
    Arena& own = near_known || s.resident ? shared : near;
    const auto solver = [&](Arena& arena, int64_t count) { return operation.solved ? arena.take<T>(count) : nullptr; };
    warps = solver(shared, s.threads > warp_threads ? buffer_entries : 0);
    summary = reinterpret_cast<WeightSummary<T>*>(solver(shared, summary_entries));
    // Costs, or the weights of pairs; else they leave at once.
    const bool kept = operation.solved || operation.backward;
    cost = s.cost_near && kept ? own.take<T>(int64_t(rows) * s.ld) : nullptr;
    row_weight = solver(own, rows);
    column_weight = solver(own, s.ld);
    x_used = own.take<uint8_t>(kept ? s.x_pixels : 0);
    y_used = own.take<uint8_t>(kept ? s.y_pixels : 0);
    // Features are compared before there is a plan. When gradients are pulled, the weights of pairs are in its place,
    // unless they are where several blocks see them. The solver's vectors are needed at neither time.
    compare_panels = shared;
    P = solver(own, int64_t(rows) * s.ld);
    const bool alone = near_known || s.blocks == 1;
    pull_panels = alone ? shared : compare_panels;
    x_own = y_own = nullptr;
    const auto coefficients = [&](Arena& arena) {
      x_own = arena.take<T>(s.x_pixels);
      y_own = arena.take<T>(s.y_pixels);
    };
    const bool by_products = is_single<T> && operation.products && operation.backward;
    const bool own_near = by_products && alone && s.x_pixels + s.y_pixels <= most_own_near;
    if (own_near) coefficients(pull_panels);
    if (near_known && s.in_registers) {
      row_vectors = solver(own, tiles64.row_entries<T>());
      column_vectors = solver(own, s.solvers / warp_threads * tiles64.column_entries<T>());
      partial = solver(own, s.solvers > warp_threads ? tiles64.partial_entries() : 0);
    } else {
      const Cover cover = s.cover();
      row_vectors = solver(own, int64_t(Marginal<T>::of_rows + reach) * rows);
      column_vectors = solver(own, int64_t(Marginal<T>::of_columns + reach) * s.column_stride());
      const int64_t sums = int64_t(cover.slices) * cover.width;
      partial = solver(own, s.held && sums < HeldShape::entries_of_sums ? HeldShape::entries_of_sums : sums);
    }
    const auto factorise = [&](Arena& arena) {
      factors = arena;
      if (!s.factorises) return;
      if (s.blocks > 1) GatheredPlan<T>(arena, s.N, s.ld);
      Cholesky<T>::reserve(arena, s.N, s.M);
    };
    if (s.factors_near) factorise(shared);
    shared_end = shared.used;
    near_end = near.used;

    blocks = !alone ? far.take<T>(ReductionBuffer<T>::entries_of_blocks(s.blocks, s.M)) : nullptr;
    far_cost = s.cost_near ? nullptr : far.take<T>(int64_t(round_up(s.N, 4)) * s.ld);
    pixel_costs = operation.windows ? far.take<T>(int64_t(round_up(s.x_pixels, 4)) * round_up(s.y_pixels, 4)) : nullptr;
    const auto norms = [&](int64_t count) { return operation.norms ? far.take<T>(count) : nullptr; };
    if (operation.norms || (by_products && !own_near)) coefficients(far);
    x_inverse = norms(s.N);
    y_inverse = norms(s.M);
    x_sums = norms(s.N);
    y_sums = norms(s.M);
    gathered = operation.backward && operation.G > 1 ? far.take<T>(operation.C * s.x_pixels) : nullptr;
    if (!s.factors_near) factorise(far);
    far_end = far.used;
  }
};

// What squared distances by products take beside panels.
template <class T>
struct Centred {
  T *centre = nullptr, *squares = nullptr, *warps = nullptr;

  SFR_BOTH Centred(Arena& arena, const ProblemLayout& s, const Operation& operation) {
    if (!is_single<T> || !operation.products) return;
    centre = arena.take<T>(round_up(operation.C, MatrixUnit::depth));
    squares = arena.take<T>(2 * int64_t(s.compare_x + s.compare_y));
    warps = arena.take<T>(most_warps);
  }
};

// Bytes of shared memory that panels of `channels` channels take: to compare, and to pull gradients.
template <class T>
int64_t compare_bytes(const ProblemLayout& s, const Operation& operation, int channels) {
  const int edge = tile_edge<T>(s.compare_x, s.compare_y);
  Arena beside;
  Centred<T>(beside, s, operation);
  return int64_t(beside.used) +
         Panels<T>::bytes(channels, panel_row(s.compare_x, edge), panel_row(s.compare_y, edge), beyond_of(s.by_matrix));
}
template <class T>
int64_t pull_bytes(const ProblemLayout& s, const Operation& operation, int channels) {
  const bool tiles = s.pull_rows() * s.pull_columns() > 1;
  const int64_t centre = operation.products && tiles ? 4 * round_up(channels, 4) : 0;
  return centre + Panels<T>::bytes(channels, panel_row(s.pull_x, 4), panel_row(s.pull_y, 4), {});
}

// Slices of the channels of a panel to compare that keep the threads busy, and the warps.
struct Slices {
  int pair, matrix;
};
template <class T>
Slices most_slices(const ProblemLayout& s) {
  const int edge = tile_edge<T>(s.compare_x, s.compare_y);
  const Tiling tiling(s.compare_x, s.compare_y, edge, 1);
  const int64_t bytes = Panels<T>::bytes(s.panel_channels, panel_row(s.compare_x, edge), panel_row(s.compare_y, edge),
                                         beyond_of(s.by_matrix));
  const int room = int(bytes / int64_t(sizeof(T)));
  const MatrixTiling units(s.compare_x, s.compare_y, 1);
  return {tiling.most_slices(s.threads, room), units.most_slices(s.threads / warp_threads, room)};
}

constexpr int most_panel_channels = 64;  // more would gain nothing

// Panels to compare within `room` bytes, of whole maps or, `tiled`, of parts of them where not one channel has room.
template <class T>
int64_t fill_compare(ProblemLayout& s, const Operation& operation, int64_t room, bool tiled) {
  const int n = s.compare_x = s.compared(operation.windows), m = s.compare_y = s.y_pixels;
  s.by_matrix = operation.matrix;
  if (operation.compare_y > 0) {
    s.compare_x = std::min(n, operation.compare_x), s.compare_y = std::min(m, operation.compare_y);
  } else if (tiled && compare_bytes<T>(s, operation, 1) > room) {
    // As many tiles of results as a block has threads: then a panel is read once.
    const int edge = tile_edge<T>(n, m);
    for (int side = 16; side > 0; side /= 2) {
      s.compare_x = std::min(n, side * edge), s.compare_y = std::min(m, side * edge);
      if (compare_bytes<T>(s, operation, 8) <= room) break;
    }
  }
  if (operation.matrix && operation.compare_y == 0) {
    // As many pairs as the warps have units: then a pass over the features reads those of its pairs alone. Worth it
    // where what is read again, of x, is the smaller part.
    const MatrixTiling units(s.compare_x, s.compare_y, 1);
    const int warps = s.threads / warp_threads, columns = warps / units.rows;
    if (columns > 1 && columns < units.columns) s.compare_y = columns * MatrixUnit::width;
  }
  // As many channels as come in one round of loads; fewer where memory is short. GPUs with matrix instructions have
  // asynchronous copies: all of a panel is on its way at once, and the warps' shares of many channels are more alike.
  const int each = operation.matrix ? expanded * most_in_run : fetched_elements;
  const int pixels = std::max(s.compare_x, s.compare_y);
  int channels =
      std::clamp(s.threads * each / pixels / 8 * 8, 8, std::min(most_panel_channels, round_up(operation.C, 8)));
  const auto bytes = [&] {
    s.by_matrix = operation.matrix && channels % MatrixUnit::depth == 0;
    return compare_bytes<T>(s, operation, channels);
  };
  while (channels > 1 && bytes() > room) channels = channels > 8 ? channels - 8 : channels / 2;
  s.panel_channels = channels;
  return bytes();
}

// The same for panels to pull gradients.
template <class T>
int64_t fill_pull(ProblemLayout& s, const Operation& operation, int64_t room, bool tiled) {
  s.pull_x = s.x_pixels, s.pull_y = s.y_pixels;
  int tiles = (s.pull_x + 3) / 4 + (s.pull_y + 3) / 4;  // of results, 4 channels each
  if (tiled && pull_bytes<T>(s, operation, 1) > room) {
    // As many tiles of results as threads, in as many channels as leave a part of a map worth its loads.
    int side = 16 * s.threads / std::min(32, round_up(operation.C, 4)) / 4 * 4;
    for (;; side = side * 3 / 16 * 4) {
      s.pull_x = std::min(s.x_pixels, side), s.pull_y = std::min(s.y_pixels, side);
      if (side <= 4 || pull_bytes<T>(s, operation, std::min(8, round_up(operation.C, 4))) <= room) break;
    }
    tiles = std::max((s.pull_x + 3) / 4, (s.pull_y + 3) / 4);
  }
  // Weights that all blocks see are far: the more channels at once, the less often they are read.
  const int fewest = s.blocks > 1 ? std::clamp(round_up(operation.C / s.blocks, 4), 4, 16) : 4;
  const int most = std::min(most_panel_channels, round_up(operation.C, 4));
  int channels = std::clamp(s.threads / tiles * 4, std::min(fewest, most), most);
  s.pull_by_matrix = s.by_matrix && s.blocks == 1;
  if (s.pull_by_matrix) channels = std::max(channels / MatrixPull::width, 1) * MatrixPull::width;
  while (channels > 1 && pull_bytes<T>(s, operation, channels) > room)
    channels = channels > 8 && s.pull_by_matrix ? channels - 8 : channels > 4 ? channels - 4 : channels / 2;
  s.pull_channels = channels;
  // Where maps are cut, sums are to run in the same order.
  const auto cut = [](int part, int pixels) { return part < pixels && part % MatrixUnit::depth != 0; };
  s.pull_by_matrix = s.pull_by_matrix && channels % MatrixUnit::tile_width == 0 && !cut(s.pull_x, s.x_pixels) &&
                     !cut(s.pull_y, s.y_pixels);
  return pull_bytes<T>(s, operation, channels);
}

// Fills in sizes and panels; false: does not fit into `shared` bytes.
template <class T, Place place>
bool fill_panels(ProblemLayout& s, const Operation& operation, int64_t shared, bool tiled) {
  const ProblemMemory<T, place> places(s, operation, {}, {}, {});
  s.shared_bytes = int64_t(places.shared_end);
  const auto add = [&](const Arena& panels, auto fill) {
    const int64_t before = int64_t(panels.used);
    const int64_t room = std::min(shared - before, s.threads == warp_threads ? int64_t(16384) : shared);
    s.shared_bytes = std::max(s.shared_bytes, before + fill(s, operation, room, tiled));
  };
  if (operation.C > 0) add(places.compare_panels, fill_compare<T>);
  if (operation.C > 0 && operation.backward) add(places.pull_panels, fill_pull<T>);
  s.near_bytes = int64_t(places.near_end);
  s.far_bytes = int64_t(places.far_end);
  return s.shared_bytes <= shared;
}

// Teams in a block: several of one warp.
inline int teams_of(const ProblemLayout& s, int64_t shared) {
  return s.threads == warp_threads ? int(std::clamp(shared / s.shared_bytes, int64_t(1), int64_t(4))) : 1;
}
// Teams that a processor has at once: as there are registers, and memory, of which each block takes 1 KB more.
inline int64_t resident_teams(const ProblemLayout& s, int64_t shared) {
  constexpr int registers = 65536, of_thread = 256, of_block = 1024;
  const int teams = teams_of(s, shared);
  const int64_t most = registers / (of_thread * s.threads * teams);
  return teams * std::clamp((shared + of_block) / (s.shared_bytes * teams + of_block), int64_t(1), most);
}

template <class T>
bool fill(ProblemLayout& s, const Operation& operation, int64_t shared, bool tiled) {
  const auto fits = [&](ProblemLayout& in) {
    return in.in_registers ? fill_panels<T, Place::near>(in, operation, shared, tiled)
                           : fill_panels<T, Place::any>(in, operation, shared, tiled);
  };
  s.ld = s.cover().template row_length<T>(s.M);
  // Of patches with weights some may be left out: then there are few enough in somewhat larger problems, too.
  const int most = operation.weighted ? 4 * most_factorised : most_factorised;
  s.factorises = operation.solved && std::min(s.N, s.M) <= most;
  s.factors_near = false;
  if (!fits(s)) return false;
  // Factors take no room of anything else, nor of other problems.
  ProblemLayout near = s;
  near.factors_near = true;
  const auto resident = [&](const ProblemLayout& in) { return resident_teams(in, shared); };
  if (s.factorises && s.blocks == 1 && fits(near) && resident(near) >= resident(s)) s = near;
  return true;
}

// Threads that solve a problem of this size: few enough that a barrier is quick, a power of two of warps.
inline int solvers_of(int64_t entries) {
  int warps = 1;
  while (warps < most_warps && int64_t(warps) * 640 < entries) warps *= 2;
  return warps * warp_threads;
}

// Whether the plan of a problem that so many warps of one block solve lies in registers.
template <class T>
bool holds_in_registers(const Operation& operation, int warps) {
  return is_single<T> && operation.solved && !operation.reach &&
         operation.N <= tiles64.rows() / tiles64.warps * warps && operation.M <= tiles64.columns();
}

// Whether the threads of one block that solve a problem hold its plan's entries while they take products of it.
template <class T>
bool holds_entries(const Operation& operation, int threads) {
  return is_single<T> && operation.solved && !operation.reach && threads == HeldShape::threads &&
         operation.N <= HeldShape::rows && operation.M <= HeldShape::columns;
}

// The first strategy that fits, with panels of whole maps or of tiles; false: none does. Costs alone are computed
// `rows` rows at a time.
template <class T>
bool choose(ProblemLayout& s, const Operation& operation, Strategy forced, const DeviceLimits& device, bool tiled,
            int64_t rows) {
  constexpr int block_threads = most_warps * warp_threads;
  s = {};
  s.N = int(operation.N), s.M = int(operation.M), s.x_pixels = int(operation.x_pixels),
  s.y_pixels = int(operation.y_pixels);
  const int64_t shared = int64_t(device.shared);
  const auto wanted = [&](Strategy which) { return forced == Strategy::automatic || forced == which; };
  const auto split = [&](int blocks) {
    s.slab = (s.N + blocks - 1) / blocks;
    s.blocks = (s.N + s.slab - 1) / s.slab;
  };

  const int64_t longest = std::max({operation.N, operation.M, operation.x_pixels / 2, operation.y_pixels / 2});
  if (wanted(Strategy::warp) && longest <= 32) {
    s.threads = s.solvers = warp_threads;
    s.slab = s.N;
    s.in_registers = holds_in_registers<T>(operation, 1);
    if (fill<T>(s, operation, shared, tiled)) {
      s.teams = teams_of(s, shared);
      return true;
    }
    s.in_registers = false;
  }
  s.solvers = operation.solved ? solvers_of(operation.N * operation.M) : block_threads;
  s.threads = operation.C > 0 ? block_threads : s.solvers;
  if (wanted(Strategy::block) || !operation.solved) {
    s.slab = operation.solved || operation.backward ? s.N : int(rows);
    if (holds_in_registers<T>(operation, tiles64.warps)) {
      ProblemLayout held = s;
      held.in_registers = true;
      held.solvers = tiles64.threads();
      if (operation.C == 0) held.threads = held.solvers;
      if (fill<T>(held, operation, shared, tiled)) {
        s = held;
        return true;
      }
    }
    for (const bool held : {holds_entries<T>(operation, s.solvers), false})
      for (const bool near : {true, false}) {
        s.held = held;
        s.cost_near = near;
        if (fill<T>(s, operation, shared, tiled)) return true;
      }
  }
  if (!operation.solved) return false;
  s.threads = s.solvers = block_threads;
  s.cost_near = false;  // the weights of pairs, which take their place, are for all blocks
  const int most_blocks = device.together ? std::min(device.processors, 32) : 1;
  if (wanted(Strategy::cooperative))
    for (int blocks = 2; blocks <= most_blocks; blocks *= 2) {
      split(blocks);
      if (fill<T>(s, operation, shared, tiled)) return true;
    }
  if (!wanted(Strategy::stream)) return false;
  // Asked for at a small size, it still has blocks that wait for each other.
  const int64_t blocks = std::max(operation.N * operation.M / 65536, int64_t(forced == Strategy::stream ? 2 : 1));
  split(int(std::min(blocks, int64_t(std::min(most_blocks, 16)))));
  s.resident = false;
  return fill<T>(s, operation, shared, tiled);
}

template <class T>
ProblemLayout choose(const Operation& operation, Strategy forced, const DeviceLimits& device, int64_t rows) {
  ProblemLayout s;
  for (const bool tiled : {false, true})
    if (choose<T>(s, operation, forced, device, tiled, rows)) {
      if (operation.C > 0) {
        const Slices most = most_slices<T>(s);
        s.pair_slices = most.pair, s.matrix_slices = most.matrix;
      }
      return s;
    }
  throw std::runtime_error("sfr_ext: " + std::to_string(operation.N) + " x " + std::to_string(operation.M) +
                           " patches do not fit on this GPU" +
                           (forced == Strategy::automatic ? "" : " with the strategy that was asked for"));
}

// Costs alone have the bits that they have where a problem is solved, so that a plan that is made of them later is that
// of the problem: the same panels, of tiles no larger, and slices of their channels. (Of a problem with a reach they
// may differ by a rounding: its vectors leave less room for panels.) They need no team, unless patches share pixels:
// with few slices, as many rows at a time as keep the threads busy.
template <class T>
ProblemLayout choose_for_costs(const Operation& operation, Strategy forced, const DeviceLimits& device) {
  Operation solving = operation;
  solving.solved = true;
  const ProblemLayout solved = choose<T>(solving, forced, device, operation.N);
  Operation alone = operation;
  alone.compare_x = solved.compare_x, alone.compare_y = solved.compare_y;
  int64_t rows = operation.N;
  if (!operation.windows && operation.N > 64) {
    const auto busy = [&](int64_t n) {
      const MatrixTiling units(int(n), solved.compare_y, solved.matrix_slices);
      if (solved.by_matrix) return 2 * units.units() * units.slices > solved.threads / warp_threads;
      const Tiling tiling(int(n), solved.compare_y, tile_edge<T>(int(n), solved.compare_y), solved.pair_slices);
      return 2 * tiling.tiles() * tiling.slices > solved.threads;
    };
    const int step = solved.by_matrix ? MatrixUnit::height : 56;
    for (rows = step; rows < operation.N && !busy(rows);) rows += step;
    if (rows + rows / 2 > operation.N) rows = operation.N;  // what is left would be little
  }
  ProblemLayout s = choose<T>(alone, forced, device, rows);
  if (s.panel_channels >= solved.panel_channels && s.threads == solved.threads) {
    s.panel_channels = solved.panel_channels;
    s.by_matrix = solved.by_matrix;
    const Slices most = most_slices<T>(s);
    s.pair_slices = std::min(solved.pair_slices, most.pair);
    s.matrix_slices = std::min(solved.matrix_slices, most.matrix);
  }
  return s;
}

template <class T>
ProblemLayout choose(Operation operation, Strategy forced, const DeviceLimits& device) {
  operation.matrix = is_single<T> && operation.products && device.matrix;
  const bool costs_alone = !operation.solved && !operation.backward && operation.C > 0;
  return costs_alone ? choose_for_costs<T>(operation, forced, device)
                     : choose<T>(operation, forced, device, operation.N);
}

// What a kernel gets: the operation's parameters, the layout, and the memory it was given.
template <class Params>
struct KernelParams : Params {
  Operation operation;
  ProblemLayout layout;
  int64_t items = 0, teams = 0;
  unsigned char* scratch = nullptr;

  explicit KernelParams(const Params& p) : Params(p) {}
};

// One launch: its problems, its blocks, and the global memory it needs beside its inputs and outputs.
struct LaunchLayout {
  ProblemLayout problem;
  int blocks = 1;        // of the launch
  int64_t teams = 1;     // at work at the same time, each on one item after the other
  int64_t scratch = 0;   // bytes: counters, then each team's far memory, then each block's near memory
  int64_t counters = 0;  // bytes of it that must be 0
  int64_t shared = 0;    // bytes of a block
};

// `items` problems (or batch entries). Without scratch every item has a team of its own; with it, as many teams as the
// device runs at the same time, within a limit.
template <class Params>
LaunchLayout lay_out_launch(Kernel<Params> kernel, const ProblemLayout& layout, int64_t items, int device) {
  constexpr int64_t most_scratch = int64_t(1) << 28;
  LaunchLayout out;
  out.problem = layout;
  out.shared = layout.shared_bytes * layout.teams;
  const int64_t each = layout.far_bytes + layout.near_bytes * layout.blocks;
  out.teams = (items + layout.teams - 1) / layout.teams * layout.teams;
  if (each > 0) {
    const int resident = resident_blocks(kernel, device, layout.threads * layout.teams, size_t(out.shared));
    const int64_t fit = std::max(int64_t(resident) * layout.teams / layout.blocks, int64_t(layout.blocks == 1));
    if (fit == 0) throw std::runtime_error("sfr_ext: this GPU cannot run the blocks of one problem at the same time");
    const int64_t within = std::max(most_scratch / each / layout.teams * layout.teams, int64_t(layout.teams));
    out.teams = std::min({out.teams, fit, within});
    out.counters = layout.blocks > 1 ? out.teams * counter_bytes : 0;
    out.scratch = out.counters + out.teams * each;
  }
  out.blocks = int(out.teams / layout.teams) * layout.blocks;
  return out;
}

// Launches `kernel` on `items` problems (or batch entries) of the given shape, or says how much scratch that takes.
template <class Params>
int64_t launch_items(Kernel<KernelParams<Params>> kernel, const Params& params, const Operation& operation,
                     const ProblemLayout& layout, int64_t items, const Where& where) {
  if (items == 0) return 0;
  const LaunchLayout all = lay_out_launch(kernel, layout, items, where.device);
  if (all.scratch > where.scratch_bytes) return all.scratch;
  KernelParams<Params> work(params);
  work.operation = operation;
  work.layout = layout;
  work.items = items;
  work.teams = all.teams;
  work.scratch = static_cast<unsigned char*>(where.scratch);
  if (all.counters > 0)
    check(cudaMemsetAsync(where.scratch, 0, size_t(all.counters), static_cast<cudaStream_t>(where.stream())),
          "clearing memory failed");
  allow_shared(kernel, where.device);
  launch(kernel, {all.blocks, layout.threads * layout.teams, size_t(all.shared), layout.blocks > 1, where.stream()},
         work);
  return 0;
}

// An operation's kernels: for any place, and for what is near, which float64, for checks and not for speed, does
// without.
template <class Params>
struct Kernels {
  Kernel<KernelParams<Params>> any, near;

  Kernel<KernelParams<Params>> of(const Operation& operation, const ProblemLayout& s) const {
    return near && s.resident && s.blocks == 1 && !operation.reach ? near : any;
  }
};
// The same for a problem that is laid out as its operation asks for.
template <class T, class Params>
int64_t lay_out_and_launch(const Kernels<Params>& kernels, const Params& params, const Operation& operation,
                           int64_t items, const Where& where) {
  const OnDevice on(where.device);
  const ProblemLayout layout = choose<T>(operation, where.strategy, limits_of(kernels.any, where.device));
  return launch_items(kernels.of(operation, layout), params, operation, layout, items, where);
}

}  // namespace sfr::cuda

// The ground cost of one problem: pixels to patches to cost, and the way back to the features.
#pragma once

#include "../contracts/cost.h"
#include "centred.cuh"

namespace sfr::cuda {

inline Operation operation_of(const CostParams& p) {
  Operation operation;
  operation.N = p.N(), operation.M = p.M(), operation.C = p.C, operation.G = p.G;
  operation.x_pixels = p.x.H * p.x.W, operation.y_pixels = p.y.H * p.y.W;
  operation.windows = p.patch > 1;
  operation.norms = p.metric == Metric::cosine;
  // Not where one warp solves a problem, since what follows the sums takes longer than they gain; and the centre is to
  // fit into shared memory.
  constexpr int64_t most_channels = 4096;
  operation.products = p.compute == DType::float32 && may_take_products(p) && p.C <= most_channels &&
                       std::max(p.N(), p.M()) > warp_threads;
  return operation;
}

// One problem's features, and the team that is at them.
template <class T, Place place>
struct Ground : Problem<T, place> {
  using Problem<T, place>::at;
  using Problem<T, place>::layout;
  using Problem<T, place>::team;
  const CostParams& params;
  int64_t b, g;
  const uint8_t *x_used, *y_used;  // null: all pixels are; others read as 0
  bool products;                   // squared distances by them, and gradients

  SFR_DEVICE Ground(const TeamContext<place>& context, const CostParams& p, int64_t item, int64_t group)
      : Problem<T, place>(context), params(p), b(item), g(group), products(is_single<T> && context.operation.products) {
    const bool weighted = context.operation.solved && at.summary->weighted;
    x_used = weighted ? at.x_used : nullptr;
    y_used = weighted ? at.y_used : nullptr;
  }

  SFR_DEVICE int patch() const { return int(params.patch); }
  // Of the pixels of a region.
  SFR_DEVICE const uint8_t* used(const uint8_t* of_map, const Reader& reader) const {
    return of_map ? of_map + reader.region.first : nullptr;
  }
  // The teacher's pixel of which features are taken before there are products of them; negative: there are none.
  SFR_DEVICE int centre() const {
    const int first = products ? first_used(y_used, layout.y_pixels) : layout.y_pixels;
    return first < layout.y_pixels ? first : -1;
  }
  // v / (|x_i| |y_j|)
  SFR_DEVICE T scaled(T v, int i, int j) const { return v * at.x_inverse[i] * at.y_inverse[j]; }
  // The first pixel of patch i of a map.
  SFR_DEVICE int corner(const FeatureView& view, int i) const {
    if (patch() == 1) return i;
    const int W = int(view.W), columns = W - patch() + 1, row = i / columns;
    return row * W + i - row * columns;
  }
  // Calls f(patch) for every patch that covers a pixel.
  template <class F>
  SFR_DEVICE void each_cover(const FeatureView& view, int pixel, F&& f) const {
    const int W = int(view.W), columns = W - patch() + 1, rows = int(view.H) - patch() + 1;
    const int y = pixel / W, x = pixel - y * W;
#pragma unroll 1
    for (int dy = 0; dy < patch(); ++dy)
#pragma unroll 1
      for (int dx = 0; dx < patch(); ++dx) {
        const int r = y - dy, c = x - dx;
        if (r >= 0 && r < rows && c >= 0 && c < columns) f(r * columns + c);
      }
  }
  // This block's share of n things that the team splits.
  SFR_DEVICE int share_begin(int n) const {
    const int each = (n + team.blocks - 1) / team.blocks, begin = each * team.block;
    return begin < n ? begin : n;
  }
  SFR_DEVICE int share_end(int n) const {
    const int each = (n + team.blocks - 1) / team.blocks, end = each * (team.block + 1);
    return end < n ? end : n;
  }
  SFR_DEVICE Region x_region(int first, int count) const {
    return Region(params.x, map_offset(params.x, b, 0), first, count);
  }
  SFR_DEVICE Region y_region(int first, int count) const {
    return Region(params.y, map_offset(params.y, b, g), first, count);
  }
};

// Squared norms of all pixels, then 1 / |patch| of all patches: 0 for 0.
template <class T, Place place>
SFR_DEVICE void invert_norms(Ground<T, place>& ground) {
  Team& team = ground.team;
  const ProblemLayout& layout = ground.layout;
  const auto squares = [&](const Region& region, const uint8_t* used, T* out) {
#pragma unroll 1
    for (int p = team.rank; p < region.count; p += team.size) {
      // Several sums wait less for each other, and round less.
      constexpr int several = 4;
      T sums[several] = {};
      if (!used || used[region.first + p])
        with_element(region.view->dtype, [&](auto element) {
          using E = decltype(element);
          if constexpr (sizeof(T) >= sizeof(E)) {
            const E* pixel = static_cast<const E*>(region.view->data) + region.offset(p);
#pragma unroll 1
            for (int64_t c = 0; c < ground.params.C; c += several)
#pragma unroll
              for (int k = 0; k < several; ++k)
                if (c + k < ground.params.C) {
                  const T x = T(to_float(pixel[(c + k) * region.view->stride_c]));
                  sums[k] += x * x;
                }
          }
        });
      out[region.first + p] = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    }
  };
  const int x_begin = ground.share_begin(layout.x_pixels), y_begin = ground.share_begin(layout.y_pixels);
  squares(ground.x_region(x_begin, ground.share_end(layout.x_pixels) - x_begin), ground.x_used, ground.at.x_own);
  squares(ground.y_region(y_begin, ground.share_end(layout.y_pixels) - y_begin), ground.y_used, ground.at.y_own);
  team.grid_barrier();
  const auto invert = [&](const FeatureView& view, int patches, const T* of_pixels, T* out) {
    const int W = int(view.W);
#pragma unroll 1
    for (int i = ground.share_begin(patches) + team.rank; i < ground.share_end(patches); i += team.size) {
      const int corner = ground.corner(view, i);
      T sum = 0;
#pragma unroll 1
      for (int dy = 0; dy < ground.patch(); ++dy)
#pragma unroll 1
        for (int dx = 0; dx < ground.patch(); ++dx) sum += of_pixels[corner + dy * W + dx];
      out[i] = sum == 0 ? T(0) : 1 / sqrt_of(sum);
    }
  };
  invert(ground.params.x, layout.N, ground.at.x_own, ground.at.x_inverse);
  invert(ground.params.y, layout.M, ground.at.y_own, ground.at.y_inverse);
  team.grid_barrier();
}

// From pairs of pixels to pairs of patches: the sums over both windows into out [rows][ld].
template <class T, Place place>
SFR_DEVICE void sum_windows(const Ground<T, place>& ground, int first, int rows, T* out, int64_t ld) {
  const Team& team = ground.team;
  const FeatureView &x = ground.params.x, &y = ground.params.y;
  const int patch = ground.patch(), pixel_ld = round_up(ground.layout.y_pixels, 4);
#pragma unroll 1
  for (int i = team.warp(); i < rows; i += team.warps()) {
    const int x_corner = ground.corner(x, first + i);
#pragma unroll 1
    for (int j = team.lane(); j < ground.layout.M; j += warp_threads) {
      const int y_corner = ground.corner(y, j);
      T sum = 0;
#pragma unroll 1
      for (int dy = 0; dy < patch; ++dy)
#pragma unroll 1
        for (int dx = 0; dx < patch; ++dx)
          sum +=
              ground.at.pixel_costs[int64_t(x_corner + dy * int(x.W) + dx) * pixel_ld + y_corner + dy * int(y.W) + dx];
      out[i * ld + j] = sum;
    }
  }
}

// Whether products are taken by matrix instructions; known to be false where there are none.
template <class T>
SFR_DEVICE bool by_matrix(const ProblemLayout& layout) {
  return matrix_units && is_single<T> && layout.by_matrix;
}

// Sums over channels of all pairs of two regions into sums [x][row]; by products costs, and those pairs that products
// tell too little of once more, by differences. Ends with a barrier.
template <class T, Place place>
SFR_DEVICE void compare_tile(Ground<T, place>& ground, const Reader& x, const Reader& y, Panels<T>& panels,
                             const Centred<T>& centred, bool products, int edge, T* sums, int64_t row) {
  Team& team = ground.team;
  const CostParams& p = ground.params;
  const int height = x.region.count, width = y.region.count;
  const bool root = p.metric == Metric::l2;
  bool again = false;
#pragma unroll 1
  for (;;) {
    const auto wanted = [&](int r, int c) {
      bool some = !again;
#pragma unroll 1
      for (int k = 0; again && k < edge * edge; ++k) {
        const int i = r + k / edge, j = c + k % edge;
        if (i < height && j < width) some = some || sums[i * row + j] == T(untold);
      }
      return some;
    };
    const auto seen = [&](int k, int c, int channels) {
      if (products)
        add_squares(team, panels.x(k), panels.x_row, height, panels.y(k), panels.y_row, width, centred.centre + c,
                    channels, c == 0, centred.squares);
    };
    const auto put = [&](int r, int c, T sum) {
      T& to = sums[r * row + c];
      if (!again) to = sum;
      if (again && to == T(untold)) to = -sum;
    };
    const ProblemLayout& layout = ground.layout;
    if (products && by_matrix<T>(layout))
      matrix_sums(team, layout.matrix_slices, x, y, int(p.C), centred.centre, panels, seen,
                  [&](int r, int c, T sum) { sums[r * row + c] = sum; });
    else
      pair_sums(team, pair_of(p.metric), edge, layout.pair_slices, x, y, int(p.C), products, centred.centre, panels,
                wanted, seen, put);
    if (!products) break;
    again = finish_products(team, root, height, width, centred.squares, ground.used(ground.x_used, x),
                            ground.used(ground.y_used, y), centred.warps, sums, row);
    if (!again) break;
    products = false;
  }
  if (again) finish_differences(team, root, height, width, sums, row);
}

// Costs of the rows [first, first + rows) of problem (b, g) into out [rows][ld], from the features. Ends with a barrier
// of the block.
template <class T, Place place>
[[nodiscard]] SFR_DEVICE unsigned ground_forward(TeamContext<place> context, const CostParams& params, int64_t b,
                                                 int64_t g, int first, int rows, T* out, int64_t ld) {
  Ground<T, place> ground(context, params, b, g);
  Team& team = ground.team;
  const ProblemLayout& layout = ground.layout;
  const CostParams& p = ground.params;
  const bool windows = ground.patch() > 1;
  const int pixel_ld = round_up(layout.y_pixels, 4);
  if (p.metric == Metric::cosine) invert_norms(ground);

  const int begin = windows ? ground.share_begin(layout.x_pixels) : first;
  const int count = windows ? ground.share_end(layout.x_pixels) - begin : rows;
  T* of_pixels = ground.at.pixel_costs + int64_t(begin) * pixel_ld;
  const int x_tile = layout.compare_x, y_tile = layout.compare_y, edge = tile_edge<T>(x_tile, y_tile);
  Arena room = ground.at.compare_panels;
  const Centred<T> centred(room, layout, context.operation);
  const int centre = ground.centre();
  const bool by_products = centre >= 0;
  if (by_products) {
    read_centre(team, ground.y_region(0, layout.y_pixels), centre, 0, int(p.C), centred.centre);
    if (team.rank < MatrixUnit::depth && p.C + team.rank < round_up(p.C, MatrixUnit::depth))
      centred.centre[p.C + team.rank] = 0;
    team.sync();  // mutant: that of the first panel comes before it is read, too
  }
  Panels<T> panels(room, layout.panel_channels, panel_row(x_tile, edge), panel_row(y_tile, edge),
                   beyond_of(layout.by_matrix));
#pragma unroll 1
  for (int i = 0; i < count; i += x_tile)
#pragma unroll 1
    for (int j = 0; j < layout.y_pixels; j += y_tile) {
      const int height = part_of(count, i, x_tile), width = part_of(layout.y_pixels, j, y_tile);
      panels.clear_ends(team, height, width);
      const Reader x(ground.x_region(begin + i, height), ground.x_used, layout.panel_channels);
      const Reader y(ground.y_region(j, width), ground.y_used, layout.panel_channels);
      T* sums = windows ? of_pixels + int64_t(i) * pixel_ld + j : out + i * ld + j;
      const int64_t row = windows ? pixel_ld : ld;
      compare_tile(ground, x, y, panels, centred, by_products, edge, sums, row);
    }
  if (windows) team.grid_barrier();

  if (windows) {
    sum_windows(ground, first, rows, out, ld);
    team.sync();
  }
  with_metric(p.metric, [&](auto metric) {
    constexpr Metric of = decltype(metric)::value;
    if (by_products) return;
    if constexpr (of == Metric::l2 || of == Metric::cosine)  // of others they are the sums
      map_entries(team, rows, layout.M, out, ld, out, ld, [&](int i, int j, T sum) {
        return cost_of<of>(sum, [&](T v) { return ground.scaled(v, first + i, j); });
      });
  });
  team.sync();
  return team.epoch;
}

// From d/dC of the team's slab to the weights of pairs of patches, W [slab][ld] (may be in the place of either):
// grad_x_i = sum_j pull(W_ij, x_i, y_j), to which cosine adds own_i x_i. The ends of its rows, and the rows after the
// last patch up to a multiple of 4, are 0. `broken`: NaN everywhere. Where gradients are pulled by products the last
// bit of a weight says whether its pair is near, and the sum over a row of them is its pixel's coefficient. `aligned`:
// gradients and costs are known to come in fours.
template <bool aligned, class T, Place place>
SFR_DEVICE void weigh(Ground<T, place>& ground, const T* grad, int64_t ld_grad, const T* cost, int64_t ld_cost, T* W,
                      int64_t ld, bool broken) {
  const Team& team = ground.team;
  const int first = ground.first, rows = ground.rows, columns = ground.layout.M;
  const bool last = first + rows == ground.layout.N;
  const int end = last ? round_up(ground.layout.N, 4) - first : rows;
  const bool whole = aligned || (in_fours(grad, ld_grad) && in_fours(cost, ld_cost));
  const int centre = ground.centre();
  const bool by_products = centre >= 0;
  const int lanes = lanes_of(columns);
  struct Row {
    const T *cost, *grad;
    T least;  // cost of a pair that is not near
    T sum;
  };
  struct Two {
    Four<T> cost, grad;
  };
  with_metric(ground.params.metric, [&](auto metric) {
    each_four(
        team, end, columns, whole,
        [&](int i) {
          if (i >= rows) return Row{};  // one behind the last patch
          const T* of_row = cost + i * ld_cost;
          const T least = by_products ? near_share<T>(ground.params.metric) * of_row[centre] : T(0);
          return Row{of_row, grad + i * ld_grad, least, T(0)};
        },
        [](int) { return 0; },
        [&](const Row& row, int j, auto known) {
          if (!row.cost) return Two{};
          constexpr bool at_once = decltype(known)::value;
          return Two{read_four(row.cost + j, at_once, columns - j), read_four(row.grad + j, at_once, columns - j)};
        },
        [&](int i, int j, Row& row, int, const Two& of, bool counts) {
          Four<T> out;
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            T w = 0;
            if (row.cost && j + k < columns) {  // mutant: what lies beyond has a gradient of 0, unless all is NaN
              const auto scaled = [&](T v) { return ground.scaled(v, first + i, j + k); };
              w = broken ? T(NAN) : weight_of<decltype(metric)::value>(of.grad.at[k], of.cost.at[k], scaled);
              if (by_products) w = marked(w, !(of.cost.at[k] >= row.least));
            }
            out.at[k] = w;
            row.sum += told_weight(w);
          }
          if (counts) store_vector(W + i * ld + j, out);  // hot: pair weighed
        },
        [&](int i, const Row& row, bool counts) {
          if (!by_products) return;
          const T sum = over_lanes<Sum>(row.sum, lanes);
          if (counts && i < rows && team.lane() % lanes == 0)  // mutant: memory ends at a multiple of 4, too
            ground.at.x_own[first + i] = sum;
        });
  });
}

// Adjoint of the windows' sums: a pair of pixels gets the weights of all pairs of patches that it is part of.
template <class T, Place place>
SFR_DEVICE void spread_windows(Ground<T, place>& ground, const T* W, int64_t ld) {
  Team& team = ground.team;
  const ProblemLayout& layout = ground.layout;
  const FeatureView &x = ground.params.x, &y = ground.params.y;
  const int patch = ground.patch(), pixel_ld = round_up(layout.y_pixels, 4);
  const int x_columns = int(x.W) - patch + 1, x_rows = int(x.H) - patch + 1;
  const int y_columns = int(y.W) - patch + 1, y_rows = int(y.H) - patch + 1;
  const int rows = round_up(layout.x_pixels, 4);
#pragma unroll 1
  for (int p = ground.share_begin(rows) + team.warp(); p < ground.share_end(rows); p += team.warps()) {
    const int py = p / int(x.W), px = p - py * int(x.W);
#pragma unroll 1
    for (int q = team.lane(); q < pixel_ld; q += warp_threads) {
      const int qy = q / int(y.W), qx = q - qy * int(y.W);
      T sum = 0;
      // No patch covers the pixels after the last one, up to a multiple of 4: those get 0.
#pragma unroll 1
      for (int dy = 0; dy < patch; ++dy)
#pragma unroll 1
        for (int dx = 0; dx < patch; ++dx) {
          const int r = py - dy, c = px - dx, s = qy - dy, t = qx - dx;
          if (r >= 0 && r < x_rows && c >= 0 && c < x_columns && s >= 0 && s < y_rows && t >= 0 && t < y_columns)
            sum += W[int64_t(r * x_columns + c) * ld + s * y_columns + t];
        }
      ground.at.pixel_costs[int64_t(p) * pixel_ld + q] = sum;
    }
  }
}

// Cosine: from the sums over each patch's row or column of d/dC (1 - C), in x_sums and y_sums, to the pixels' own
// coefficients: sum over their patches of |patch|^-2 times that.
template <class T, Place place>
SFR_DEVICE void own_coefficients(Ground<T, place>& ground) {
  const Team& team = ground.team;
  const auto spread = [&](const FeatureView& view, int pixels, const T* sums, const T* inverse, T* out) {
#pragma unroll 1
    for (int p = ground.share_begin(pixels) + team.rank; p < ground.share_end(pixels); p += team.size) {
      T own = 0;
      ground.each_cover(view, p, [&](int i) { own += sums[i] * inverse[i] * inverse[i]; });
      out[p] = own;
    }
  };
  const ProblemMemory<T, place>& at = ground.at;
  spread(ground.params.x, ground.layout.x_pixels, at.x_sums, at.x_inverse, at.x_own);
  spread(ground.params.y, ground.layout.y_pixels, at.y_sums, at.y_inverse, at.y_own);
}

// Products: the coefficients of the teacher's pixels, the sums over the columns of the weights; those of the student's
// are there. A barrier of the team must follow.
template <class T, Place place>
SFR_DEVICE void sum_weights(Ground<T, place>& ground, const T* W, int64_t ld) {
  Team& team = ground.team;
  const int M = ground.layout.M, rows = ground.rows, quads = (M + 3) / 4;
  const bool alone = in_one_block<place> || team.blocks == 1;
  const int turn = team.exchange();
  T* out = alone ? ground.at.y_own : ground.buffer().of_block(turn, team.blocks, team.block);
  constexpr int together = 8, groups = warp_threads / together;  // neighbouring lanes; of rows
  const int lane = afresh(team.lane()), group = lane / together;
#pragma unroll 1
  for (int base = team.warp() * together; base < quads; base += team.warps() * together) {
    const int quad = base + lane % together, j = 4 * quad;
    Four<T> sums = {};
#pragma unroll 1
    for (int first = group; first - group < rows; first += groups * rows_together) {
      Four<T> found[rows_together] = {};
#pragma unroll
      for (int r = 0; r < rows_together; ++r) {
        const int i = first + r * groups;
        if (i < rows && quad < quads) found[r] = load4(W + i * ld + j);
      }
      sync_warp();  // mutant: see each_four
#pragma unroll
      for (int r = 0; r < rows_together; ++r)
#pragma unroll
        for (int k = 0; k < 4; ++k) sums.at[k] += told_weight(found[r].at[k]);  // hot: weight summed
    }
#pragma unroll
    for (int mask = together; mask < warp_threads; mask *= 2)
#pragma unroll
      for (int k = 0; k < 4; ++k) sums.at[k] += shuffle_xor(sums.at[k], mask);
    if (group == 0)
#pragma unroll
      for (int k = 0; k < 4; ++k)
        if (j + k < M) out[j + k] = sums.at[k];
  }
  if (alone) return;
  team.grid_barrier();
#pragma unroll 1
  for (int j = ground.share_begin(M) + team.rank; j < ground.share_end(M); j += team.size) {
    T sum = 0;
#pragma unroll 8
    for (int b = 0; b < team.blocks; ++b) sum += ground.buffer().of_block(turn, team.blocks, b)[j];
    ground.at.y_own[j] = sum;
  }
}

// Panels of both sides and of both gradients.
template <class T>
struct PullPanels {
  T *x, *y, *grad_x, *grad_y;
  T* centre;  // its features, where no panel is sure to have them
  int x_row, y_row;

  SFR_DEVICE PullPanels(Arena arena, const ProblemLayout& s, bool products)
      : x_row(panel_row(s.pull_x, 4)), y_row(panel_row(s.pull_y, 4)) {
    x = arena.take<T>(int64_t(s.pull_channels) * x_row);
    y = arena.take<T>(int64_t(s.pull_channels) * y_row);
    grad_x = arena.take<T>(int64_t(s.pull_channels) * x_row);
    grad_y = arena.take<T>(int64_t(s.pull_channels) * y_row);
    centre = products && s.pull_rows() * s.pull_columns() > 1 ? arena.take<T>(s.pull_channels) : nullptr;
  }
};

// What is pulled at once: a panel of channels of tile `row` of the student's pixels and tile `column` of the teacher's.
// Whole maps give both gradients. In tiles first the gradient of x, each of its tiles from all of y's, then that of y:
// sums run in the order of the pixels, however the maps are cut.
struct PullStep {
  int rows, columns;      // tiles of either side
  bool wants_x, wants_y;  // gradients
  int channel;            // the first
  bool to_x, to_y;        // what this step adds to
  int row = 0, column = 0;

  SFR_DEVICE PullStep(const ProblemLayout& s, bool x, bool y, int first_channel)
      : rows(s.pull_rows()), columns(s.pull_columns()), wants_x(x), wants_y(y), channel(first_channel) {
    begin();
  }
  SFR_DEVICE bool whole() const { return rows * columns == 1; }
  // Whether the gradient's tile begins here, or is complete after this step.
  SFR_DEVICE bool first() const { return (to_x ? column : row) == 0; }
  SFR_DEVICE bool last() const { return to_x ? column == columns - 1 : row == rows - 1; }

  SFR_DEVICE void begin() {
    to_x = wants_x, to_y = wants_y && (whole() || !wants_x);
    row = column = 0;
  }
  // On to the next; by so many channels after the last tile.
  SFR_DEVICE void advance(int channels) {
    int &inner = to_x ? column : row, &outer = to_x ? row : column;
    if (++inner < (to_x ? columns : rows)) return;
    inner = 0;
    if (++outer < (to_x ? rows : columns)) return;
    outer = 0;
    if (to_x && wants_y && !whole()) {
      to_x = false, to_y = true;
      return;
    }
    channel += channels;
    begin();
  }
};

// Weights of pairs of pixels [x_pixels][ld], in one of two places.
template <class T>
struct PairWeights {
  const T *near, *far;  // `far` in global memory, or null
  int64_t ld;

  SFR_DEVICE PairWeights from(int x, int y) const {
    const int64_t offset = x * ld + y;
    return {near + offset, far ? far + offset : nullptr, ld};
  }
};

// Tiles of one side's gradient for a panel: onto `out`, unless it is the first of the others' tiles that they see.
template <Pull pull, class T>
SFR_DEVICE void pull_panel(const Team& team, Pair pair, int first_unit, const T* mine, int my_row, const T* theirs,
                           int their_row, int pixels, int others, const PairWeights<T>& W, int channels,
                           const OwnShare<T>& share, bool by_matrix, bool first, bool last, T* out) {
  if constexpr (matrix_units && is_single<T>) {
    by_matrix = by_matrix && share.centre && centre_is_finite(team.lane(), share, channels);
    // Of the other side there are units before these, too.
    if (by_matrix)
      matrix_pull<pull>(team, first_unit > 0 ? MatrixPull::units(others, channels) : 0, mine, my_row, theirs, their_row,
                        pixels, others, W.near, W.ld, channels, share, first, last, out);
  }
  const int columns = (pixels + 3) / 4, rows = (channels + 3) / 4, tiles = columns * rows;
  const int apart = pull == Pull::to_x ? columns : 1;
  // Units are counted over both sides, so that their tiles fill the team together. Neighbours are at the same pixels:
  // what they read of the weights is the same.
#pragma unroll 1
  for (int unit = (team.rank + team.size - first_unit % team.size) % team.size; unit < tiles; unit += team.size) {
    const int tile = unit / rows, pixel = tile * (pull == Pull::to_x ? 1 : 4), channel = (unit - tile * rows) * 4;
    bool centred = share.centre != nullptr;
    // A weight of 0 makes nothing of a centre that is no number.
#pragma unroll
    for (int c = 0; c < 4; ++c)
      if (centred && channel + c < channels) {  // mutant: what lies beyond takes differences at most
        const T middle = share.centre[(channel + c) * share.apart];
        centred = middle - middle == 0;
      }
    // Pixels that have been pulled already, by matrix instructions, are left alone.
    bool done[4], told = centred;
#pragma unroll
    for (int p = 0; p < 4; ++p) {
      const T own = centred && pixel + p * apart < pixels ? share.own[pixel + p * apart] : T(0);
      done[p] = matrix_units && by_matrix && is_pulled_by_products(own);
      told = told && is_pulled_by_products(own);
    }
    centred = told;
    if (matrix_units && by_matrix && centred) continue;
    T sum[4][4] = {};
    if (!first)
#pragma unroll
      for (int c = 0; c < 4; ++c)
        if (channel + c < channels)
#pragma unroll
          for (int p = 0; p < 4; ++p)
            if (pixel + p * apart < pixels && !done[p])  // mutant: what lies beyond is added to what nobody stores
              sum[c][p] = out[(channel + c) * my_row + pixel + p * apart];
    const auto add = [&](auto known, auto of_centred, const T* weights) {
      pull_tile<decltype(known)::value, pull, decltype(of_centred)::value>(mine, my_row, theirs, their_row, others,
                                                                           weights, W.ld, pixel, apart, channel,
                                                                           channels, share.centre, share.apart, sum);
    };
    const auto by_pair = [&](const T* weights) {
      with_pair(pair, [&](auto known) { add(known, Constant<bool, false>{}, weights); });
    };
    // Where weights may lie in either memory, each has instructions of its own.
    if (centred)
      add(Constant<Pair, Pair::product>{}, Constant<bool, true>{}, W.near);
    else
      W.far ? by_pair(W.far) : by_pair(W.near);
#pragma unroll
    for (int c = 0; c < 4; ++c)
      if (channel + c < channels) {
        const T middle = centred ? share.centre[(channel + c) * share.apart] : T(0);
#pragma unroll
        for (int p = 0; p < 4; ++p) {
          const int at = (channel + c) * my_row + pixel + p * apart;
          const bool of_own = last && (centred || pair == Pair::product);
          if (done[p]) continue;
          if (pixel + p * apart < pixels)  // mutant: what lies beyond is the end of the panel's row, which nobody reads
            out[at] = of_own ? sum[c][p] + share.own[pixel + p * apart] * (mine[at] - middle) : sum[c][p];
        }
      }
  }
}

// Gradients of both maps from the weights of pairs of pixels; blocks take panels of channels in
// turn. The gradient of x gathers over the groups, and leaves with the last.
template <class T, Place place>
SFR_DEVICE void pull_features(Ground<T, place>& ground, const PairWeights<T>& W, const FeatureView& grad_x,
                              const FeatureView& grad_y) {
  Team& team = ground.team;
  const ProblemLayout& layout = ground.layout;
  const CostParams& p = ground.params;
  const Pair pair = pair_of(p.metric);
  const int C = int(p.C), width = layout.pull_channels;
  PullPanels<T> panels(ground.at.pull_panels, layout, ground.products);
  const int centre = ground.centre();
  const auto channels_at = [&](int c) { return C - c < width ? C - c : width; };
  const auto x_part = [&](const PullStep& at) {
    return part_of(layout.x_pixels, at.row * layout.pull_x, layout.pull_x);
  };
  const auto y_part = [&](const PullStep& at) {
    return part_of(layout.y_pixels, at.column * layout.pull_y, layout.pull_y);
  };
  const auto x_reader = [&](const PullStep& at) {
    return Reader(ground.x_region(at.row * layout.pull_x, x_part(at)), ground.x_used, width);
  };
  const auto y_reader = [&](const PullStep& at) {
    return Reader(ground.y_region(at.column * layout.pull_y, y_part(at)), ground.y_used, width);
  };
  // What lies behind a row's last pixel is weighed with 0, so it must be a number.
  const auto clear_end = [&](T* panel, int row, int pixels) {
    const int ends = row - pixels;
#pragma unroll 1
    for (int e = team.rank; e < width * ends; e += team.size) panel[e / ends * row + pixels + e % ends] = 0;
  };

  PullStep now(layout, grad_x.data != nullptr, grad_y.data != nullptr, team.block * width);
  const bool whole = now.whole();
  Reader x = x_reader(now), y = y_reader(now);
  if (whole) {
    clear_end(panels.x, panels.x_row, layout.x_pixels);
    clear_end(panels.y, panels.y_row, layout.y_pixels);
  }
  Fetched<T> next_x = {}, next_y = {};  // else registers would be kept for what was there before
  if (now.channel < C) {                // mutant: past the last channel there is nothing to fetch
    fetch(team, x, now.channel, channels_at(now.channel), 0, next_x);
    fetch(team, y, now.channel, channels_at(now.channel), 0, next_y);
  }
#pragma unroll 1
  while (now.channel < C) {
    const int c = now.channel, channels = channels_at(c), nx = x.region.count, ny = y.region.count;
    const int x_first = x.region.first, y_first = y.region.first;
    commit(team, x, c, channels, next_x, panels.x, panels.x_row);
    commit(team, y, c, channels, next_y, panels.y, panels.y_row);
    if (!whole) {
      if (centre >= 0) read_centre(team, ground.y_region(0, layout.y_pixels), centre, c, channels, panels.centre);
      clear_end(panels.x, panels.x_row, nx);
      clear_end(panels.y, panels.y_row, ny);
    }
    team.sync();
    PullStep next = now;
    next.advance(width * team.blocks);
    if (next.channel < C) {  // mutant: as above
      if (!whole) x = x_reader(next), y = y_reader(next);
      fetch(team, x, next.channel, channels_at(next.channel), 0, next_x);
      fetch(team, y, next.channel, channels_at(next.channel), 0, next_y);
    }
    const PairWeights<T> weights = W.from(x_first, y_first);
    const T* of_centre = centre < 0 ? nullptr : whole ? panels.y + centre : panels.centre;
    const auto share = [&](const T* own) { return OwnShare<T>{own, of_centre, whole ? panels.y_row : 1}; };
    const int x_tiles = now.to_x ? (nx + 3) / 4 * ((channels + 3) / 4) : 0;
    if (now.to_x)
      pull_panel<Pull::to_x>(team, pair, 0, panels.x, panels.x_row, panels.y, panels.y_row, nx, ny, weights, channels,
                             share(ground.at.x_own + x_first), layout.pull_by_matrix, now.first(), now.last(),
                             panels.grad_x);
    if (now.to_y)
      pull_panel<Pull::to_y>(team, pair, x_tiles, panels.y, panels.y_row, panels.x, panels.x_row, ny, nx, weights,
                             channels, share(ground.at.y_own + y_first), layout.pull_by_matrix, now.first(), now.last(),
                             panels.grad_y);
    team.sync();
    if (now.to_x && now.last()) {
      T* sum = ground.at.gathered;
      const bool leaves = ground.g == p.G - 1;
      if (sum)
#pragma unroll 1
        for (int e = team.rank; e < channels * nx; e += team.size) {
          T* panel = panels.grad_x + e / nx * panels.x_row + e % nx;
          T* so_far = sum + int64_t(c + e / nx) * layout.x_pixels + x_first + e % nx;
          if (ground.g > 0) *panel += *so_far;
          *so_far = *panel;
        }
      if (leaves) {
        if (sum) team.sync();
        store_panel(team, Reader(Region(grad_x, map_offset(grad_x, ground.b, 0), x_first, nx), nullptr, width), c,
                    channels, panels.grad_x, panels.x_row);
      }
    }
    if (now.to_y && now.last())
      store_panel(team, Reader(Region(grad_y, map_offset(grad_y, ground.b, ground.g), y_first, ny), nullptr, width), c,
                  channels, panels.grad_y, panels.y_row);
    now = next;
  }
}

// Gradients of both maps from the weights of pairs of patches, known to the whole team. Ends with a barrier.
template <class T, Place place>
SFR_DEVICE void ground_backward(Ground<T, place>& ground, const T* W, int64_t ld, const FeatureView& grad_x,
                                const FeatureView& grad_y) {
  const bool cosine = ground.params.metric == Metric::cosine, windows = ground.patch() > 1;
  if (windows) {
    spread_windows(ground, W, ld);
  }
  const PairWeights<T> weights{W, windows ? ground.at.pixel_costs : nullptr,
                               windows ? round_up(ground.layout.y_pixels, 4) : ld};
  const bool products = ground.centre() >= 0;
  if (cosine) own_coefficients(ground);
  if (products) sum_weights(ground, W + int64_t(ground.first) * ld, ld);
  if (windows || cosine || products) ground.team.grid_barrier();
  pull_features(ground, weights, grad_x, grad_y);
  ground.team.grid_barrier();
}

}  // namespace sfr::cuda

// The ground cost of one problem in a workspace: pixels to patches to cost, and the way back to the features.
#pragma once

#include <cmath>

#include "../contracts/cost.h"
#include "centred.h"
#include "dispatch.h"
#include "team.h"

namespace sfr::cpu::SFR_ISA {

// Some channels of one side: rows of pixels, a row `ld` after the other. What follows the last pixel of a row, up to a
// whole vector, can be read and means nothing.
template <class T>
struct Panel {
  const T* data;
  int64_t ld;
};

// One side of a problem: its map, and the patches of it that take part.
template <class T>
struct Side {
  const FeatureView* view = nullptr;
  int64_t map = 0;  // offset of this problem's map
  int64_t end = 0;  // behind the last element of all maps
  int64_t patch = 1;
  Pixels pixels;                  // to read: those of the kept patches where a patch is one pixel, else all
  int64_t patches = 0;            // kept
  const int32_t* kept = nullptr;  // which; null: all
  int64_t ld = 0;                 // row length of panels over the pixels
  uint8_t* unused = nullptr;      // [pixels] 1: a pixel reads as 0, as one that no kept patch covers (patch > 1)
  bool hidden = false;            // whether there may be such pixels
  T* squares = nullptr;           // [ld] |pixel|^2 (cosine; less the centre: distances by products)
  T* inverse = nullptr;           // [padded patches] 1 / |patch|, 0 for 0 (cosine)
  T* own = nullptr;               // [ld] coefficient of the pixel itself in its gradient (cosine, products)

  // `last`: offset of the last map.
  void reserve(Arena& arena, const FeatureView& features, int64_t last, const CostParams& p) {
    view = &features;
    patch = p.patch;
    end = last + (p.C - 1) * view->stride_c + (view->H - 1) * view->stride_h + (view->W - 1) * view->stride_w + 1;
    const int64_t count = view->H * view->W;
    pixels.offset = arena.take<int64_t>(count);
    unused = arena.take<uint8_t>(count);
    squares = arena.take<T>(padded<T>(count));
    inverse = arena.take<T>(padded<T>(count));
    own = arena.take<T>(padded<T>(count));
  }

  void set(int64_t offset, const int32_t* kept_patches, int64_t count) {
    map = offset;
    kept = kept_patches;
    patches = count;
    pixels.locate(*view, patch == 1 ? kept : nullptr, count);
    ld = padded<T>(pixels.count);
    hidden = false;
    if (patch > 1 && kept) hide_all_but([](int64_t) { return true; });
  }

  // Hides the pixels that are in none of the patches for which `counts`.
  template <class Counts>
  void hide_all_but(Counts&& counts) {
    std::memset(unused, 1, pixels.count);
    for (int64_t i = 0; i < patches; ++i) {
      if (!counts(i)) continue;
      for (int64_t dy = 0; dy < patch; ++dy) std::memset(unused + corner(i) + dy * view->W, 0, patch);
    }
    hidden = std::memchr(unused, 1, pixels.count) != nullptr;
  }

  int64_t columns() const { return view->W - patch + 1; }
  int64_t rows() const { return view->H - patch + 1; }

  // The first pixel of a patch; with patch == 1 pixels are already those kept.
  int64_t corner(int64_t i) const {
    if (patch == 1) return i;
    const int64_t p = kept ? kept[i] : i;
    return p / columns() * view->W + p % columns();
  }

  // Channels c .. c + channels of `all`: where they lie, if they lie as panels do, else a copy.
  Panel<T> read(int64_t c, int64_t channels, T* copy) const {
    const bool same = view->dtype == (sizeof(T) == 4 ? DType::float32 : DType::float64);
    // Up to a whole vector, a row's end is followed by what is next, of this map or another.
    const bool followed = map + (c + channels - 1) * view->stride_c + whole_vectors<T>(pixels.count) <= end;
    if (same && pixels.adjacent && followed && !hidden)
      return {static_cast<const T*>(view->data) + map + c * view->stride_c, view->stride_c};
    pack(*view, map, pixels, c, channels, copy, ld);
    for (int64_t k = 0; hidden && k < channels; ++k)
      for (int64_t p = 0; p < pixels.count; ++p)
        if (unused[p]) copy[k * ld + p] = 0;
    return {copy, ld};
  }
};

// Rows of pixels that one block of the team works on: whole tiles, and whole vectors.
constexpr int64_t pixel_rows = lanes<float> > 8 ? 48 : 24;
static_assert(pixel_rows % tile_rows<1> == 0 && pixel_rows % tile_rows<2> == 0 && pixel_rows % tile_rows<3> == 0 &&
              pixel_rows % lanes<float> == 0 && pixel_rows % lanes<double> == 0);

template <class T>
struct Ground {
  const CostParams* params = nullptr;
  int64_t b = 0, g = 0;
  Side<T> x, y;
  int64_t ld = 0;            // row length of cost
  T* cost = nullptr;         // [N][ld], padding 0
  T* pixel_cost = nullptr;   // [pixels of x][y.ld] where a patch is more than one pixel
  T* rest = nullptr;         // [most_rest][x.ld] sums of y's pixels behind whole vectors
  bool padded_too = false;   // patches that are kept may be padding all the same, which changes no bit
  bool by_products = false;  // squared distances, from features less a centre

  void reserve(Arena& arena, const CostParams& p) {
    params = &p;
    padded_too = p.patch > 1;
    x.reserve(arena, p.x, map_offset(p.x, p.B - 1, 0), p);
    y.reserve(arena, p.y, map_offset(p.y, p.B - 1, p.G - 1), p);
    cost = arena.take<T>(p.N() * padded<T>(p.M()));
    if (p.patch > 1) pixel_cost = arena.take<T>(p.x.H * p.x.W * padded<T>(p.y.H * p.y.W));
    rest = arena.take<T>(most_rest<T> * padded<T>(p.x.H * p.x.W));
  }

  void set(int64_t batch, int64_t group, const int32_t* kept_x, int64_t n, const int32_t* kept_y, int64_t m) {
    b = batch;
    g = group;
    x.set(map_offset(*x.view, b, 0), kept_x, n);
    y.set(map_offset(*y.view, b, g), kept_y, m);
    ld = padded<T>(m);
    by_products = sizeof(T) == 4 && may_take_products(*params) && n > 0 && m > 0 && products_are_faster();
  }

  // v / (|x_i| |y_j|)
  T scaled(T v, int64_t i, int64_t j) const { return v * x.inverse[i] * y.inverse[j]; }

  // Panels of one thread: of both sides, less the centre, and of both gradients; or, beside the first, vectors of sums
  // and where they are.
  static int64_t thread_bytes(const CostParams& p) {
    Arena arena;
    arena.take<T>(3 * panel_channels * padded<T>(p.x.H * p.x.W));
    arena.take<T>(3 * panel_channels * padded<T>(p.y.H * p.y.W));
    if (p.patch == 1) {
      arena.take<T>(pixel_rows * padded<T>(p.M()));
      arena.take<Meeting>(pixel_rows * padded<T>(p.M()) / lanes<T>);
    }
    return arena.used() + 64;
  }

  static double nanoseconds(const CostParams& p) {
    return 0.1 * double(p.x.H * p.x.W) * double(p.y.H * p.y.W) * double(p.C);
  }
};

template <class T>
void add_squares(const Side<T>& side, Panel<T> panel, int64_t channels, bool first) {
  for (int64_t p = 0; p < side.pixels.count; p += lanes<T>) {
    // Several, of this panel alone: they wait less for each other, and round less.
    constexpr int several = 4;
    Vec<T> sums[several] = {};
    int64_t c = 0;
    const auto add = [&](Vec<T>& sum, int64_t c) {
      const Vec<T> x = load(panel.data + c * panel.ld + p);
      sum += x * x;
    };
    for (; c + several <= channels; c += several)
      for (int k = 0; k < several; ++k) add(sums[k], c + k);
    for (; c < channels; ++c) add(sums[0], c);
    const Vec<T> sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    store(side.squares + p, first ? sum : load(side.squares + p) + sum);
  }
}

// Panels of both sides less the centre, in x_copy and y_copy, where they may be.
template <class T>
void centre_panels(const Side<T>& x, const Side<T>& y, int64_t channels, Panel<T>& of_x, Panel<T>& of_y, T* x_copy,
                   T* y_copy) {
  // The teacher's last: it holds the centre.
  subtract_centre(of_x.data, of_x.ld, x.pixels.count, channels, of_y.data, of_y.ld, x_copy, x.ld);
  subtract_centre(of_y.data, of_y.ld, y.pixels.count, channels, of_y.data, of_y.ld, y_copy, y.ld);
  of_x = {x_copy, x.ld};
  of_y = {y_copy, y.ld};
}

// 1 / |patch| from the squared pixels.
template <class T>
void invert_norms(Side<T>& side) {
  for (int64_t i = 0; i < side.patches; ++i) {
    const int64_t corner = side.corner(i);
    T sum = 0;
    for (int64_t dy = 0; dy < side.patch; ++dy)
      for (int64_t dx = 0; dx < side.patch; ++dx) sum += side.squares[corner + dy * side.view->W + dx];
    side.inverse[i] = sum == 0 ? T(0) : 1 / T(__builtin_sqrt(double(sum)));
  }
}

// Row i of the patches' sums from the pixels': along the diagonal of offsets.
template <class T>
void sum_windows(const Ground<T>& ground, int64_t i, T* row, T* all) {
  const int64_t patch = ground.params->patch, W = ground.y.view->W;
  const int64_t columns = ground.y.columns(), rows = ground.y.rows(), corner = ground.x.corner(i);
  for (int64_t p = 0; p < rows * columns; ++p) all[p] = 0;
  for (int64_t dy = 0; dy < patch; ++dy)
    for (int64_t dx = 0; dx < patch; ++dx) {
      const T* in = ground.pixel_cost + (corner + dy * ground.x.view->W + dx) * ground.y.ld + dy * W + dx;
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < columns; ++c) all[r * columns + c] += in[r * W + c];
    }
  for (int64_t j = 0; j < ground.y.patches; ++j) row[j] = all[ground.y.kept ? ground.y.kept[j] : j];
}

template <class T>
void finish_row(const Ground<T>& ground, int64_t i) {
  T* row = ground.cost + i * ground.ld;
  const int64_t m = ground.y.patches;
  with_metric(ground.params->metric, [&](auto metric) {
    for (int64_t j = 0; j < m; ++j)
      row[j] = cost_of<decltype(metric)::value>(row[j], [&](T v) { return ground.scaled(v, i, j); });
  });
  for (int64_t j = m; j < ground.ld; ++j) row[j] = 0;
}

// Rows [i, i + rows) of products, in the costs' place, to squared distances.
template <class T>
void finish_products(const Ground<T>& ground, int64_t i, int64_t rows, char* memory) {
  constexpr int L = lanes<T>;
  const Side<T>&x = ground.x, &y = ground.y;
  const int64_t m = y.pixels.count, C = ground.params->C;
  Arena own(memory);
  T* x_copy = own.take<T>(panel_channels * x.ld);
  T* y_copy = own.take<T>(panel_channels * y.ld);
  T* sums = own.take<T>(pixel_rows * ground.ld);
  Meeting* again = own.take<Meeting>(pixel_rows * ground.ld / L);  // where a pair is to be summed anew
  int64_t count = 0;
  Int<T> lane{};
  for (int l = 0; l < L; ++l) lane[l] = l;
  const auto mask = [&](int64_t r, int64_t j, Vec<T> squared) {
    const Int<T> inside = lane < typename Simd<T>::Scalar(m - j < L ? m - j : L);
    return ~is_told(x.squares[r], load(y.squares + j), squared) & inside;
  };
  for (int64_t r = i; r < i + rows; ++r) {
    T* row = ground.cost + r * ground.ld;
    Int<T> any{};
    for (int64_t j = 0; j < m; j += L) {
      const Vec<T> squared = from_products(x.squares[r], load(y.squares + j), load(row + j));
      store(row + j, squared);
      any |= mask(r, j, squared);
    }
    if (!any_lane<T>(any)) continue;
    for (int64_t j = 0; j < m; j += L)
      if (any_lane<T>(mask(r, j, load(row + j)))) again[count++] = {int32_t(r), int32_t(j)};
  }
  for (int64_t c = 0; count > 0 && c < C; c += panel_channels) {
    const int64_t channels = C - c < panel_channels ? C - c : panel_channels;
    const Panel<T> of_x = x.read(c, channels, x_copy), of_y = y.read(c, channels, y_copy);
    sum_meetings(again, count, of_x.data, of_x.ld, of_y.data, of_y.ld, channels, sums, c == 0);
  }
  for (int64_t k = 0; k < count; ++k) {
    T* out = ground.cost + again[k].x * ground.ld + again[k].y;
    const Vec<T> squared = load(out);
    store(out, mask(again[k].x, again[k].y, squared) ? load(sums + k * L) : squared);
  }
}

// ground.cost from the features, by the whole team.
template <class T>
void ground_forward(const Team& team, Ground<T>& ground) {
  const CostParams& p = *ground.params;
  Side<T>&x = ground.x, &y = ground.y;
  const bool cosine = p.metric == Metric::cosine, windows = p.patch > 1;
  T* sums = windows ? ground.pixel_cost : ground.cost;
  const int64_t ld = windows ? y.ld : ground.ld;
  Arena own(team.own);
  T* x_copy = own.take<T>(panel_channels * x.ld);
  T* y_copy = own.take<T>(panel_channels * y.ld);
  const Lanewise of = by_lanes<T>(y.pixels.count, x.pixels.count, 0);
  const int64_t behind = y.pixels.count - of.rest, blocks = (x.pixels.count + pixel_rows - 1) / pixel_rows;
  const auto rows_of = [&](int64_t block) {
    const int64_t left = x.pixels.count - block * pixel_rows;
    return left < pixel_rows ? left : pixel_rows;
  };

  for (int64_t c = 0; c < p.C; c += panel_channels) {
    const int64_t channels = p.C - c < panel_channels ? p.C - c : panel_channels;
    Panel<T> of_x = x.read(c, channels, x_copy), of_y = y.read(c, channels, y_copy);
    if (ground.by_products) centre_panels(x, y, channels, of_x, of_y, x_copy, y_copy);
    if ((cosine || ground.by_products) && team.rank == 0) {
      add_squares(x, of_x, channels, c == 0);
      add_squares(y, of_y, channels, c == 0);
    }
    team.blocks(blocks, [&](int64_t block) {
      const int64_t i = block * pixel_rows, rows = rows_of(block);
      with_pair(ground.by_products ? Pair::product : pair_of(p.metric), [&](auto known) {
        constexpr Pair pair = decltype(known)::value;
        pair_sums<pair>(of_x.data + i, of_x.ld, rows, of_y.data, of_y.ld, of.vectors, channels, sums + i * ld, ld,
                        c == 0);
        if (of.rest > 0)
          pair_sums<pair>(of_y.data + behind, of_y.ld, of.rest, of_x.data + i, of_x.ld,
                          whole_vectors<T>(rows) / lanes<T>, channels, ground.rest + i, x.ld, c == 0);
      });
      for (int64_t k = 0; c + channels == p.C && k < of.rest; ++k)
        for (int64_t r = i; r < i + rows; ++r) sums[r * ld + behind + k] = ground.rest[k * x.ld + r];
    });
  }
  if (cosine && team.rank == 0) {
    invert_norms(x);
    invert_norms(y);
  }
  team.barrier();
  if (ground.by_products)
    team.blocks(blocks,
                [&](int64_t block, char* own) { finish_products(ground, block * pixel_rows, rows_of(block), own); });
  team.blocks(x.patches, [&](int64_t i, char* own) {
    if (windows) sum_windows(ground, i, ground.cost + i * ground.ld, Arena(own).take<T>(y.pixels.count));
    finish_row(ground, i);
  });
  team.barrier();
}

// The patches' norms alone.
template <class T>
void ground_norms(const Team& team, Ground<T>& ground) {
  if (team.rank == 0)
    for (Side<T>* side : {&ground.x, &ground.y}) {
      T* copy = Arena(team.own).take<T>(panel_channels * side->ld);
      for (int64_t c = 0; c < ground.params->C; c += panel_channels) {
        const int64_t left = ground.params->C - c, channels = left < panel_channels ? left : panel_channels;
        add_squares(*side, side->read(c, channels, copy), channels, c == 0);
      }
      invert_norms(*side);
    }
  team.barrier();
}

// Rows of costs as they lie in a workspace, to where they lie close together, and back; by the whole team.
template <class T>
void rows_out(const Team& team, const T* rows, int64_t ld, int64_t n, int64_t m, T* out) {
  team.blocks(n, [&](int64_t i) { std::memcpy(out + i * m, rows + i * ld, sizeof(T) * m); });
}
template <class T>
void rows_in(const Team& team, const T* in, int64_t n, int64_t m, T* rows, int64_t ld) {
  team.blocks(n, [&](int64_t i) {
    std::memcpy(rows + i * ld, in + i * m, sizeof(T) * m);
    for (int64_t j = m; j < ld; ++j) rows[i * ld + j] = 0;
  });
}

// The costs, and the norms of patches, where the costs are known: those between kept patches, close together.
template <class T>
void ground_again(const Team& team, Ground<T>& ground, const T* cost) {
  if (ground.params->metric == Metric::cosine) ground_norms(team, ground);
  rows_in(team, cost, ground.x.patches, ground.y.patches, ground.cost, ground.ld);
  team.barrier();
}

// Backward's own workspace of one problem.
template <class T>
struct GroundGrad {
  FeatureView x, y;           // gradients; no data: not wanted
  Pixels x_pixels, y_pixels;  // where they go
  T* pixel_weight = nullptr;  // [H W][y.ld] (patch > 1)
  T* transposed = nullptr;    // [pixels of y][x.ld]
  T* gathered = nullptr;  // [C][x.ld] gradient of x; with groups, their sum over all pixels, whichever each group kept
  bool by_products = false;
  Meeting* near = nullptr;   // pairs so near that a product's gradient cancels, of which there are few
  T* near_weight = nullptr;  // theirs, which the weights of all pairs are without
  int64_t near_count = 0;

  // Of so many pairs; more are not worth a list.
  static int64_t few_of(int64_t pairs) { return pairs / 64; }

  void reserve(Arena& arena, const CostParams& p, const FeatureView& grad_x, const FeatureView& grad_y) {
    x = grad_x;
    y = grad_y;
    const int64_t px = p.x.H * p.x.W, py = p.y.H * p.y.W;
    x_pixels.offset = arena.take<int64_t>(px);
    y_pixels.offset = arena.take<int64_t>(py);
    if (p.patch > 1) pixel_weight = arena.take<T>(px * padded<T>(py));
    transposed = arena.take<T>(py * padded<T>(px));
    gathered = arena.take<T>(p.C * padded<T>(px));
    near = arena.take<Meeting>(few_of(px * py));
    near_weight = arena.take<T>(few_of(px * py));
  }
};

// From d/dC (in place) to the weights of pairs of patches, such that grad_x_i = sum_j pull(W_ij, x_i, y_j), to which
// cosine adds own_i x_i.
template <class T>
void weigh_row(const Ground<T>& ground, int64_t i, T* row) {
  const T* cost = ground.cost + i * ground.ld;
  const int64_t m = ground.y.patches;
  with_metric(ground.params->metric, [&](auto metric) {
    for (int64_t j = 0; j < m; ++j)
      row[j] = weight_of<decltype(metric)::value>(row[j], cost[j], [&](T v) { return ground.scaled(v, i, j); });
  });
  for (int64_t j = m; j < ground.ld; ++j) row[j] = 0;
}

// Cosine: the pixels' own coefficients, own = sum over their patches of |patch|^-2 sum_j (d/dC)_ij (1 - C_ij).
template <class T>
void own_coefficients(Ground<T>& ground, const T* grad) {
  Side<T>&x = ground.x, &y = ground.y;
  for (int64_t p = 0; p < x.ld; ++p) x.own[p] = 0;
  for (int64_t p = 0; p < y.ld; ++p) y.own[p] = 0;
  // Fused or not, but the same for every pair, wherever a compiler's vectors end: padding changes no bit.
  const auto add_term = [&](T& sum, int64_t i, int64_t j) {
    const T weight = grad[i * ground.ld + j], alike = alike_of(weight, ground.cost[i * ground.ld + j]);
#ifdef __FP_FAST_FMA
    sum = std::fma(weight, alike, sum);
#else
    sum += weight * alike;
#endif
  };
  const auto spread = [](Side<T>& side, int64_t i, T sum) {
    for (int64_t dy = 0; dy < side.patch; ++dy)
      for (int64_t dx = 0; dx < side.patch; ++dx)
        side.own[side.corner(i) + dy * side.view->W + dx] += sum * side.inverse[i] * side.inverse[i];
  };
  for (int64_t i = 0; i < x.patches; ++i) {
    T sum = 0;
    for (int64_t j = 0; j < y.patches; ++j) add_term(sum, i, j);
    spread(x, i, sum);
  }
  for (int64_t j = 0; j < y.patches; ++j) {
    T sum = 0;
    for (int64_t i = 0; i < x.patches; ++i) add_term(sum, i, j);
    spread(y, j, sum);
  }
}

// Adjoint of sum_windows: every pair of patches adds its weight to its pairs of pixels.
template <class T>
void scatter_windows(const Ground<T>& ground, const T* weight, T* pixel_weight) {
  const Side<T>&x = ground.x, &y = ground.y;
  for (int64_t k = 0; k < x.pixels.count * y.ld; ++k) pixel_weight[k] = 0;
  for (int64_t i = 0; i < x.patches; ++i)
    for (int64_t dy = 0; dy < x.patch; ++dy)
      for (int64_t dx = 0; dx < x.patch; ++dx) {
        T* out = pixel_weight + (x.corner(i) + dy * x.view->W + dx) * y.ld + dy * y.view->W + dx;
        for (int64_t j = 0; j < y.patches; ++j) out[y.corner(j)] += weight[i * ground.ld + j];
      }
}

// Pixels whose gradient is pulled in vectors, and those whose sums run across lanes: in another order.
template <class T>
Lanewise pulled(const Ground<T>& ground, const Side<T>& to, const Side<T>& from) {
  constexpr int64_t sums = 3;
  if (ground.padded_too) return {whole_vectors<T>(to.pixels.count) / lanes<T>, 0};
  return by_lanes<T>(to.pixels.count, from.pixels.count, sums);
}

// The weights of pairs of pixels, row by row, in both directions.
template <class T>
struct PairWeights {
  const T* W;  // [pixels of from][ld]
  int64_t ld;
  const T* transposed;  // [pixels of to][ld_transposed]; of those alone whose sums run across lanes
  int64_t ld_transposed;
};

// One gradient panel, lanes over the pixels of `to`; added to what `out` has unless first.
template <class T>
void pull_side(const Ground<T>& ground, Pair pair, const Side<T>& to, Panel<T> of_to, const Side<T>& from,
               Panel<T> of_from, const PairWeights<T>& weights, int64_t channels, T* out, bool first) {
  const Lanewise of = pulled(ground, to, from);
  const int64_t count = from.pixels.count;
  with_pair(pair, [&](auto known) {
    constexpr Pair pair = decltype(known)::value;
    pull<pair>(of_to.data, of_to.ld, of.vectors, of_from.data, of_from.ld, count, weights.W, weights.ld, channels, out,
               to.ld, first);
    for (int64_t i = to.pixels.count - of.rest; i < to.pixels.count; ++i)
      pull_pixel<pair>(of_to.data + i, of_to.ld, of_from.data, of_from.ld, count,
                       weights.transposed + i * weights.ld_transposed, channels, out + i, to.ld, first);
  });
  if (pair != Pair::product) return;
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t i = 0; i < to.pixels.count; i += lanes<T>) {
      T* of_pixels = out + c * to.ld + i;
      store(of_pixels, load(of_pixels) + load(to.own + i) * load(of_to.data + c * of_to.ld + i));
    }
}

// Adds what a group's kept pixels get, to all pixels; the first group finds none.
template <class T>
void add_kept(const Side<T>& side, const T* panel, int64_t channels, bool first, T* all, int64_t ld) {
  for (int64_t c = 0; c < channels; ++c) {
    T* sum = all + c * ld;
    for (int64_t i = 0; first && i < ld; ++i) sum[i] = 0;
    for (int64_t i = 0; i < side.pixels.count; ++i) sum[side.kept[i]] += panel[c * side.ld + i];
  }
}

template <class T>
void write_side(const T* panel, int64_t ld, int64_t c, int64_t channels, const FeatureView& view, const Pixels& pixels,
                int64_t map) {
  if (pixels.count < view.H * view.W) fill(view, map, c, channels, 0);
  unpack(panel, ld, pixels, c, channels, view, map);
}

// Where gradients of features go: to the pixels that they are of.
template <class T>
void locate_gradients(const Ground<T>& ground, GroundGrad<T>& work) {
  const Side<T>&x = ground.x, &y = ground.y;
  const bool compact = ground.params->patch == 1;
  if (work.x.data) work.x_pixels.locate(work.x, compact && ground.params->G == 1 ? x.kept : nullptr, x.patches);
  if (work.y.data) work.y_pixels.locate(work.y, compact ? y.kept : nullptr, y.patches);
}

// Of both sides.
template <class T>
struct Panels {
  Panel<T> x, y;
};

// Panel after panel of channels, by whichever thread: pull_x(panels, centred, channels, out, first) makes a panel of
// x's gradient, or adds to that of the groups before, and pull_y one of y's; both are written where they belong.
// `centred`: less the centre, for products.
template <class T, class PullX, class PullY>
void pull_panels(const Team& team, Ground<T>& ground, GroundGrad<T>& work, PullX&& pull_x, PullY&& pull_y) {
  const CostParams& p = *ground.params;
  Side<T>&x = ground.x, &y = ground.y;
  team.blocks((p.C + panel_channels - 1) / panel_channels, [&](int64_t block, char* memory) {
    Arena own(memory);
    T* x_copy = own.take<T>(panel_channels * x.ld);
    T* y_copy = own.take<T>(panel_channels * y.ld);
    T* gx_panel = own.take<T>(panel_channels * x.ld);
    T* gy_panel = own.take<T>(panel_channels * y.ld);
    T* x_centred = own.take<T>(panel_channels * x.ld);
    T* y_centred = own.take<T>(panel_channels * y.ld);
    const int64_t c = block * panel_channels;
    const int64_t channels = p.C - c < panel_channels ? p.C - c : panel_channels;
    const Panels<T> of{x.read(c, channels, x_copy), y.read(c, channels, y_copy)};
    Panels<T> centred = of;
    if (work.by_products) centre_panels(x, y, channels, centred.x, centred.y, x_centred, y_centred);
    if (work.x.data) {
      const bool first = ground.g == 0, apart = p.G > 1 && p.patch == 1 && x.kept;
      const int64_t ld = p.G == 1 ? x.ld : padded<T>(p.x.H * p.x.W);
      T* sum = work.gathered + c * ld;
      pull_x(of, centred, channels, apart ? gx_panel : sum, apart || first);
      if (apart) add_kept(x, gx_panel, channels, first, sum, ld);
      if (ground.g == p.G - 1) write_side(sum, ld, c, channels, work.x, work.x_pixels, map_offset(work.x, ground.b, 0));
    }
    if (work.y.data) {
      pull_y(of, centred, channels, gy_panel);
      write_side(gy_panel, y.ld, c, channels, work.y, work.y_pixels, map_offset(work.y, ground.b, ground.g));
    }
  });
  team.barrier();
}

// Whether gradients are pulled by products: takes the weights of near pairs out of W [N][ld] into the list, and leaves
// the sums of what stays in `own` of both sides. A pixel is as far from the centre as from the teacher's first.
template <class T>
bool part_near(const Ground<T>& ground, GroundGrad<T>& work, T* W) {
  const Side<T>&x = ground.x, &y = ground.y;
  const int64_t n = x.patches, m = y.patches, ld = ground.ld;
  const T share = near_share<T>(ground.params->metric);
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) {
    const T* cost = ground.cost + i * ld;
    const T least = share * cost[0];
    bool any = false;
    for (int64_t j = 0; j < m; ++j) any |= !(cost[j] >= least);
    for (int64_t j = 0; any && j < m; ++j) {
      if (cost[j] >= least) continue;
      if (count == work.few_of(n * m)) return false;
      work.near[count++] = {int32_t(i), int32_t(j)};
    }
  }
  work.near_count = count;
  for (int64_t k = 0; k < count; ++k) {
    T& weight = W[work.near[k].x * ld + work.near[k].y];
    work.near_weight[k] = weight;
    weight = 0;
  }
  for (int64_t i = 0; i < x.ld; i += lanes<T>) store(x.own + i, Vec<T>{});
  for (int64_t j = 0; j < ld; j += lanes<T>) store(y.own + j, Vec<T>{});
  for (int64_t i = 0; i < n; ++i) {
    Vec<T> sum{};
    for (int64_t j = 0; j < ld; j += lanes<T>) {
      const Vec<T> w = load(W + i * ld + j);
      sum += w;
      store(y.own + j, load(y.own + j) + w);
    }
    x.own[i] = sum_lanes<T>(sum);
  }
  return true;
}

// What near pairs add to a panel of the gradient of one side: W (x - y), or W (y - x).
template <class T>
void add_near(const GroundGrad<T>& work, Panel<T> of_mine, Panel<T> of_theirs, int32_t Meeting::* mine,
              int32_t Meeting::* theirs, int64_t channels, T* out, int64_t ld) {
  for (int64_t k = 0; k < work.near_count; ++k) {
    const int64_t i = work.near[k].*mine, j = work.near[k].*theirs;
    for (int64_t c = 0; c < channels; ++c)
      out[c * ld + i] +=
          work.near_weight[k] * (of_mine.data[c * of_mine.ld + i] - of_theirs.data[c * of_theirs.ld + j]);
  }
}

// Gradients of both maps from d/dC [N][ld] (overwritten). The gradient of x gathers over the groups in
// work.gathered and leaves with the last.
template <class T>
void ground_backward(const Team& team, Ground<T>& ground, GroundGrad<T>& work, T* grad) {
  const CostParams& p = *ground.params;
  Side<T>&x = ground.x, &y = ground.y;
  if (team.rank == 0) {
    if (p.metric == Metric::cosine) own_coefficients(ground, grad);
    locate_gradients(ground, work);
  }
  team.barrier();
  team.blocks(x.patches, [&](int64_t i) { weigh_row(ground, i, grad + i * ground.ld); });
  team.barrier();
  if (team.rank == 0) work.by_products = ground.by_products && !ground.padded_too && part_near(ground, work, grad);
  team.barrier();
  const T* weight = grad;
  int64_t ld = ground.ld;
  if (p.patch > 1) {
    if (team.rank == 0) scatter_windows(ground, grad, work.pixel_weight);
    weight = work.pixel_weight;
    ld = y.ld;
    team.barrier();
  }
  const int64_t across = pulled(ground, y, x).rest;
  if (work.x.data || across > 0) {
    const int64_t first = work.x.data ? 0 : y.pixels.count - across;
    team.blocks(y.pixels.count - first, [&](int64_t k) {
      const int64_t j = first + k;
      T* row = work.transposed + j * x.ld;
      for (int64_t i = 0; i < x.pixels.count; ++i) row[i] = weight[i * ld + j];
      for (int64_t i = x.pixels.count; i < x.ld; ++i) row[i] = 0;
    });
    team.barrier();
  }

  const Pair pair = work.by_products ? Pair::product : pair_of(p.metric);
  const PairWeights<T> to_x{work.transposed, x.ld, weight, ld}, to_y{weight, ld, work.transposed, x.ld};
  pull_panels(
      team, ground, work,
      [&](const Panels<T>& of, const Panels<T>& centred, int64_t channels, T* out, bool first) {
        pull_side(ground, pair, x, centred.x, y, centred.y, to_x, channels, out, first);
        if (work.by_products) add_near(work, of.x, of.y, &Meeting::x, &Meeting::y, channels, out, x.ld);
      },
      [&](const Panels<T>& of, const Panels<T>& centred, int64_t channels, T* out) {
        pull_side(ground, pair, y, centred.y, x, centred.x, to_y, channels, out, true);
        if (work.by_products) add_near(work, of.y, of.x, &Meeting::y, &Meeting::x, channels, out, y.ld);
      });
}

// Compiled once, in ground.cpp.
#define SFR_GROUND(prefix, T)                                   \
  prefix template void ground_forward(const Team&, Ground<T>&); \
  prefix template void ground_backward(const Team&, Ground<T>&, GroundGrad<T>&, T*);
SFR_GROUND(extern, float)
SFR_GROUND(extern, double)

}  // namespace sfr::cpu::SFR_ISA

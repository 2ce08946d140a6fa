// The way back to the features from a gradient of the costs that is nearly all zeros, as that of exact transport is: a
// plan that is a vertex has no more entries than both sides have patches together. Only those are looked at.
#pragma once

#include "ground.h"

namespace sfr::cpu::SFR_ISA {

// The other side's patches that each patch of one side is paired with, in slots: entry k of patch i at [k][i].
template <class T>
struct Slots {
  int64_t ld = 0, depth = 0, most = 0;
  int32_t* from = nullptr;  // [most][ld]
  T* weight = nullptr;      // [most][ld], 0: no entry
  int32_t* used = nullptr;  // [ld]
  T* apart = nullptr;       // [most][ld] squared distances

  // `most`: of one patch.
  void reserve(Arena& arena, int64_t patches, int64_t most_of_one) {
    most = most_of_one;
    ld = whole_vectors<T>(patches);
    from = arena.take<int32_t>(most * ld);
    weight = arena.take<T>(most * ld);
    used = arena.take<int32_t>(ld);
    apart = arena.take<T>(most * ld);
  }

  void clear() {
    depth = 0;
    for (int64_t i = 0; i < ld; ++i) used[i] = 0;
  }

  // False: no slot is left.
  bool add(int64_t i, int64_t j, T w) {
    const int64_t k = used[i];
    if (k == most) return false;
    if (k == depth) {
      for (int64_t p = 0; p < ld; ++p) from[k * ld + p] = 0, weight[k * ld + p] = 0;
      depth = k + 1;
    }
    from[k * ld + i] = int32_t(j);
    weight[k * ld + i] = w;
    used[i] = int32_t(k + 1);
    return true;
  }
};

// Of one patch; beyond, the dense way is as fast.
constexpr int64_t few_slots = 4;

// Both sides' slots from d/dC and C of one problem, contiguous [N][M]. False where there are more entries than slots.
template <class T>
bool find_entries(Metric metric, const T* grad, const T* cost, int64_t n, int64_t m, Slots<T>& of_x, Slots<T>& of_y) {
  constexpr int together = 2 * lanes<T>;
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  of_x.clear();
  of_y.clear();
  bool fits = true;
  for (int64_t i = 0; i < n && fits; ++i) {
    const T* row = grad + i * m;
    const auto see = [&](int64_t j) {
      if (row[j] == 0) return;
      __builtin_prefetch(cost + i * m + j);  // from memory: all are under way before the first is used
      fits = fits && of_x.add(i, j, row[j]);
    };
    int64_t j = 0;
    for (; j + together <= m; j += together) {
      Bits seen[together], all = 0;
      std::memcpy(seen, row + j, sizeof seen);
      for (int k = 0; k < together; ++k) all |= seen[k];
      if (all == 0) continue;
      for (int64_t k = j; k < j + together; ++k) see(k);
    }
    for (; j < m; ++j) see(j);
  }
  with_metric(metric, [&](auto known) {
    for (int64_t k = 0; k < of_x.depth && fits; ++k)
      for (int64_t i = 0; i < n; ++i) {
        T& weight = of_x.weight[k * of_x.ld + i];
        if (weight == 0) continue;
        const int64_t j = of_x.from[k * of_x.ld + i];
        weight = weight_of<decltype(known)::value>(weight, cost[i * m + j], [](T v) { return v; });
        if (weight != 0) fits = fits && of_y.add(j, i, weight);
      }
  });
  return fits;
}

// Makes of the masses in the student's slots the weights of pairs, by the distances from the features themselves, and
// of these the teacher's slots.
template <class T>
void weigh_entries(const Ground<T>& ground, Slots<T>& of_x, Slots<T>& of_y, char* memory) {
  const CostParams& p = *ground.params;
  const int64_t n = ground.x.patches;
  Arena own(memory);
  T* x_copy = own.take<T>(panel_channels * ground.x.ld);
  T* y_copy = own.take<T>(panel_channels * ground.y.ld);
  with_metric(p.metric, [&](auto known) {
    constexpr Metric metric = decltype(known)::value;
    if constexpr (metric == Metric::l2) {
      for (int64_t k = 0; k < of_x.depth * of_x.ld; ++k) of_x.apart[k] = 0;
      for (int64_t c = 0; c < p.C; c += panel_channels) {
        const int64_t channels = p.C - c < panel_channels ? p.C - c : panel_channels;
        const Panel<T> x = ground.x.read(c, channels, x_copy), y = ground.y.read(c, channels, y_copy);
        for (int64_t k = 0; k < of_x.depth; ++k) {
          const int32_t* index = of_x.from + k * of_x.ld;
          T* sum = of_x.apart + k * of_x.ld;
          for (int64_t channel = 0; channel < channels; ++channel) {
            const T *of_patch = x.data + channel * x.ld, *others = y.data + channel * y.ld;
#pragma GCC ivdep
            for (int64_t i = 0; i < n; ++i) add_pair<Pair::difference>(sum[i], of_patch[i], others[index[i]]);
          }
        }
      }
    }
    of_y.clear();
    for (int64_t k = 0; k < of_x.depth; ++k)
      for (int64_t i = 0; i < n; ++i) {
        const int64_t at = k * of_x.ld + i;
        T& weight = of_x.weight[at];
        if (weight == 0) continue;
        weight =
            weight_of<metric>(weight, metric == Metric::l2 ? sqrt_of(of_x.apart[at]) : T(1), [](T v) { return v; });
        of_y.add(of_x.from[at], i, weight);
      }
  });
}

// One gradient panel, as pull_side makes it.
template <class T>
void pull_entries(Metric metric, const Slots<T>& slots, int64_t count, Panel<T> to, Panel<T> from, int64_t channels,
                  T* out, int64_t ldo, bool first) {
  with_pair(pair_of(metric), [&](auto known) {
    constexpr Pair pair = decltype(known)::value;
    for (int64_t c = 0; c < channels; ++c) {
      const T *x = to.data + c * to.ld, *y = from.data + c * from.ld;
      T* sum = out + c * ldo;
      if (first)
        for (int64_t i = 0; i < count; ++i) sum[i] = 0;
      for (int64_t k = 0; k < slots.depth; ++k) {
        const T* weight = slots.weight + k * slots.ld;
        const int32_t* index = slots.from + k * slots.ld;
#pragma GCC ivdep
        for (int64_t i = 0; i < count; ++i) {
          T pulled = 0;
          add_pull<pair>(pulled, weight[i], x[i], y[index[i]]);
          sum[i] += weight[i] != 0 ? pulled : T(0);  // no entry: whatever patch 0 holds
        }
      }
    }
  });
}

// As ground_backward, from entries instead of a matrix; of single pixels and not of the cosine.
template <class T>
void entries_backward(const Team& team, Ground<T>& ground, GroundGrad<T>& work, const Slots<T>& of_x,
                      const Slots<T>& of_y) {
  const CostParams& p = *ground.params;
  Side<T>&x = ground.x, &y = ground.y;
  if (team.rank == 0) locate_gradients(ground, work);
  team.barrier();
  pull_panels(
      team, ground, work,
      [&](const Panels<T>& of, const Panels<T>&, int64_t channels, T* out, bool first) {
        pull_entries(p.metric, of_x, x.patches, of.x, of.y, channels, out, x.ld, first);
      },
      [&](const Panels<T>& of, const Panels<T>&, int64_t channels, T* out) {
        pull_entries(p.metric, of_y, y.patches, of.y, of.x, channels, out, y.ld, true);
      });
}

}  // namespace sfr::cpu::SFR_ISA

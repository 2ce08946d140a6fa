// Features in and out: from any element type and any strides to channel-major panels [channels][ld] of the accumulator
// type in shared memory, a block of channels at a time, and gradients back.
//
// Where memory lies so that 16 bytes can be read at a time, a panel is filled in two steps: `fetch` asks for the bits,
// `commit` converts them once they have come, and arithmetic on the panel before hides their way.
#pragma once

#include "team.cuh"

namespace sfr::cuda::element {

using float16 = Half;
using bfloat16 = Bfloat;
using float32 = float;
using float64 = double;

}  // namespace sfr::cuda::element

#define SFR_GROUND_NAMESPACE sfr::cuda
#define SFR_GROUND_INLINE SFR_DEVICE
#include "../ground/elements.h"

namespace sfr::cuda {

SFR_BOTH int element_bytes(DType dtype) {
  return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2;
}

// i / n for i up to 2^22, without a division.
struct Divider {
  int n;
  float inverse;

  SFR_DEVICE explicit Divider(int by) : n(by), inverse(1.0f / float(by)) {}
  SFR_DEVICE int operator()(int i) const { return int((float(i) + 0.5f) * inverse); }
};

// Some pixels of one map: [first, first + count) of its H W.
struct Region {
  const FeatureView* view;
  int64_t map;  // offset of the map
  int first, count;
  bool flat;  // rows follow each other

  SFR_DEVICE Region(const FeatureView& of, int64_t offset, int begin, int pixels)
      : view(&of), map(offset), first(begin), count(pixels), flat(of.H == 1 || of.stride_h == of.W * of.stride_w) {}

  SFR_DEVICE int64_t offset(int pixel) const {
    const int p = first + pixel;
    if (flat) return map + p * view->stride_w;
    const int W = int(view->W), row = p / W;
    return map + row * view->stride_h + (p - row * W) * view->stride_w;
  }
};

enum class Order {
  pixels,    // memory goes on from pixel to pixel: maps [C, H, W]
  channels,  // memory goes on from channel to channel: channels_last, tokens
};

// Elements of a panel that each thread holds between fetch and commit. A larger panel comes in several rounds.
constexpr int fetched_elements = 8;

// The bits of one thread's part of a panel; elements are no wider than the accumulator's type.
template <class T>
struct Fetched {
  static constexpr int words = fetched_elements * int(sizeof(T)) / 16;
  Word16 word[words];
};

// Where element e of a panel lies in it.
struct PanelEntry {
  int channel, pixel;
};

SFR_DEVICE Order order_of(const FeatureView& v) {
  return v.stride_c == 1 && v.stride_w != 1 ? Order::channels : Order::pixels;
}

// How panels of a region are read; the same for the whole team.
struct Reader {
  Region region;
  const uint8_t* used;  // of all pixels of the map; 0: reads as 0; null: all are used
  Order order;
  bool wide;  // 16 bytes at a time
  int run;    // elements in 16 bytes

  // `channels`: of every panel but the last, a multiple of 8.
  SFR_DEVICE Reader(const Region& of, const uint8_t* used_pixels, int channels)
      : region(of), used(used_pixels), order(order_of(*of.view)), run(16 / element_bytes(of.view->dtype)) {
    const FeatureView& v = *of.view;
    const bool start = (reinterpret_cast<uintptr_t>(v.data) + size_t(of.map) * (16 / run)) % 16 == 0;
    if (order == Order::pixels) {
      const bool whole = of.first == 0 && of.count == v.H * v.W;
      wide = whole && start && of.flat && v.stride_w == 1 && v.stride_c == of.count && channels * of.count % run == 0;
    } else {
      wide = start && v.stride_w % run == 0 && (of.flat || v.stride_h % run == 0) && channels % run == 0;
    }
  }

  // Whether this panel comes in whole runs; the last one of a map may not.
  SFR_DEVICE bool in_runs(int channels) const {
    return wide && (order == Order::pixels ? region.count * channels : channels) % run == 0;
  }
  SFR_DEVICE int64_t offset(PanelEntry at, int c0) const {
    return region.offset(at.pixel) + (c0 + at.channel) * region.view->stride_c;
  }
};

// Element e of a panel of `channels` channels, in the order of memory, to its place.
struct Walk {
  Order order;
  int pixels, channels;
  Divider by;

  SFR_DEVICE Walk(Order o, int count, int width)
      : order(o), pixels(count), channels(width), by(o == Order::pixels ? count : width) {}
  SFR_DEVICE PanelEntry operator()(int e) const {
    const int quotient = by(e);
    if (order == Order::pixels) return {quotient, e - quotient * pixels};
    return {e - quotient * channels, quotient};
  }
  // The place after this one, within a run of 16 bytes.
  SFR_DEVICE PanelEntry next(PanelEntry at) const {
    if (order == Order::channels) return {at.channel + 1, at.pixel};
    return at.pixel + 1 < pixels ? PanelEntry{at.channel, at.pixel + 1} : PanelEntry{at.channel + 1, 0};
  }
};

// First element of word k of a round.
SFR_DEVICE int first_element(const Team& team, const Reader& reader, int round, int k) {
  return ((round * (fetched_elements / reader.run) + k) * team.size + team.rank) * reader.run;
}

template <class T>
SFR_DEVICE void fetch(const Team& team, const Reader& reader, int c0, int channels, int round, Fetched<T>& out) {
  if (!reader.in_runs(channels)) return;
  const int total = reader.region.count * channels;
  const Walk walk(reader.order, reader.region.count, channels);
  const char* data = static_cast<const char*>(reader.region.view->data);
#pragma unroll
  for (int k = 0; k < Fetched<T>::words; ++k) {
    const int e = first_element(team, reader, round, k);
    if (k < fetched_elements / reader.run && e < total)  // mutant: a later word is one of the next round's, read twice
      out.word[k] = load16(data + reader.offset(walk(e), c0) * (16 / reader.run));
  }
}

// Calls put(x) for each element of 16 bytes, in order.
template <class T, class Put>
SFR_DEVICE void each_element(DType dtype, const Word16& word, Put&& put) {
  if (dtype == DType::float32) {
#pragma unroll
    for (int k = 0; k < 4; ++k) put(T(bits_float(word.part[k])));
  } else if (dtype == DType::float64) {
    put(T(bits_double(uint64_t(word.part[0]) | uint64_t(word.part[1]) << 32)));
    put(T(bits_double(uint64_t(word.part[2]) | uint64_t(word.part[3]) << 32)));
  } else {
    const auto of = [&](uint32_t bits) {
      return T(dtype == DType::float16 ? to_float(Half{uint16_t(bits)}) : to_float(Bfloat{uint16_t(bits)}));
    };
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      put(of(word.part[k]));
      put(of(word.part[k] >> 16));
    }
  }
}

// Into panel [channels][ld]: the first round from `first`, the others now. What lies behind the pixels of a row is left
// alone.
template <class T>
SFR_DEVICE void commit(const Team& team, const Reader& reader, int c0, int channels, const Fetched<T>& first, T* panel,
                       int ld) {
  const Region& region = reader.region;
  const int total = region.count * channels;
  const Walk walk(reader.order, region.count, channels);
  const auto put = [&](PanelEntry at, T x) {
    const bool used = !reader.used || reader.used[region.first + at.pixel];
    panel[at.channel * ld + at.pixel] = used ? x : T(0);
  };
  if (!reader.in_runs(channels)) {
    with_element(region.view->dtype, [&](auto kind) {
      using E = decltype(kind);
      if constexpr (sizeof(T) >= sizeof(E)) {
        const E* data = static_cast<const E*>(region.view->data);
#pragma unroll 4
        for (int e = team.rank; e < total; e += team.size) {
          const PanelEntry at = walk(e);
          put(at, T(to_float(data[reader.offset(at, c0)])));
        }
      }
    });
    return;
  }
  const int each = team.size * fetched_elements;
  Fetched<T> now = first;
#pragma unroll 1
  for (int round = 0; round * each < total; ++round) {
    if (round > 0) fetch(team, reader, c0, channels, round, now);
#pragma unroll
    for (int k = 0; k < Fetched<T>::words; ++k) {
      const int e = first_element(team, reader, round, k);
      if (k < fetched_elements / reader.run && e < total) {  // mutant: the next round puts it right
        PanelEntry at = walk(e);
        each_element<T>(region.view->dtype, now.word[k], [&](T x) {
          put(at, x);
          at = walk.next(at);
        });
      }
    }
  }
}

// A panel of the gradient to where it belongs, in the order of memory.
template <class T>
SFR_DEVICE void store_panel(const Team& team, const Region& region, int c0, int channels, const T* panel, int ld) {
  const FeatureView& view = *region.view;
  const Walk walk(order_of(view), region.count, channels);
  with_element(view.dtype, [&](auto kind) {
    using E = decltype(kind);
    if constexpr (sizeof(T) >= sizeof(E)) {
      E* data = static_cast<E*>(view.data);
#pragma unroll 4
      for (int e = team.rank; e < region.count * channels; e += team.size) {
        const PanelEntry at = walk(e);
        from_float(panel[at.channel * ld + at.pixel],
                   data[region.offset(at.pixel) + (c0 + at.channel) * view.stride_c]);
      }
    }
  });
}

}  // namespace sfr::cuda

// Features in and out: from any element type and any strides to channel-major panels [channels][ld] of the accumulator
// type in shared memory, a block of channels at a time, and gradients back.
//
// Where memory lies so that 16 bytes can be read at a time, a panel is filled in two steps: `fetch` asks for the bits,
// `commit` converts them once they have come, and arithmetic on the panel before hides their way. A panel that lies as
// memory does is copied as it is, 16 bytes at a time; the rows of others are cut where they belong. Where a GPU copies
// asynchronously, panels with a second buffer are filled by `copy_panel` and `expand_halves` instead.
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

// How panels of a region are read, and written; the same for the whole team.
struct Reader {
  Region region;
  const uint8_t* used;  // of all pixels of the map; 0: reads as 0; null: all are used
  Order order;
  bool wide;      // 16 bytes at a time
  bool together;  // of pixels: a whole map, whose channels follow each other, so that runs go on from row to row
  int run;        // elements in 16 bytes

  // `channels`: of every panel but the last, a multiple of 8.
  SFR_DEVICE Reader(const Region& of, const uint8_t* used_pixels, int channels)
      : region(of), used(used_pixels), order(order_of(*of.view)), run(16 / element_bytes(of.view->dtype)) {
    const FeatureView& v = *of.view;
    const bool start = (reinterpret_cast<uintptr_t>(v.data) + size_t(of.map) * (16 / run)) % 16 == 0;
    together = false;
    if (order == Order::pixels) {
      together = of.count == v.H * v.W && v.stride_c == of.count;
      const bool rows = of.first % run == 0 && of.count % run == 0 && v.stride_c % run == 0;
      const bool runs = together ? channels * of.count % run == 0 && of.count >= run : rows;
      wide = start && of.flat && v.stride_w == 1 && runs;
    } else {
      wide = start && v.stride_w % run == 0 && (of.flat || v.stride_h % run == 0) && channels % run == 0;
    }
  }

  // Whether this panel comes in whole runs; the last one of a map may not.
  SFR_DEVICE bool in_runs(int channels) const {
    return wide && (order == Order::pixels ? region.count * channels : channels) % run == 0;
  }
  // Whether a panel with rows of `ld` lies as memory does.
  SFR_DEVICE bool copies(int ld) const { return order == Order::pixels && ld == region.count; }
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
};

constexpr int most_in_run = 8;

// The places in a panel of 16 bytes of elements. Of pixels they go on in the next row once; of channels each lies in a
// row of its own.
struct Run {
  int first, gap;  // where it begins, and how much further those from element `left` on lie
  int step, left;

  SFR_DEVICE Run(const Walk& walk, int e, int ld) {
    const PanelEntry at = walk(e);
    const bool by_pixels = walk.order == Order::pixels;
    first = at.channel * ld + at.pixel;
    gap = ld - walk.pixels;
    step = by_pixels ? 1 : ld;
    left = by_pixels ? walk.pixels - at.pixel : most_in_run;
  }
  SFR_DEVICE int operator()(int k) const { return first + k * step + (k < left ? 0 : gap); }
};

// 16 bytes of a panel.
template <class T>
struct alignas(16) Pack {
  static constexpr int count = 16 / int(sizeof(T));
  T at[count];
};
// Packs that the widest run becomes.
template <class T>
constexpr int most_packs = most_in_run / Pack<T>::count;

// Pack q of a run.
template <class T>
SFR_DEVICE Pack<T> unpacked(DType dtype, const Word16& word, int q) {
  Pack<T> out;
  const auto fill = [&](auto element) {
#pragma unroll
    for (int k = 0; k < Pack<T>::count; ++k) out.at[k] = element(q * Pack<T>::count + k);
  };
  const auto half = [&](int e) { return uint16_t(word.part[e / 2] >> 16 * (e % 2)); };
  if (dtype == DType::float32)
    fill([&](int e) { return T(bits_float(word.part[e % 4])); });
  else if (sizeof(T) == 8 && dtype == DType::float64)
    fill([&](int e) {
      const int low = 2 * (e % 2);
      return T(bits_double(uint64_t(word.part[low]) | uint64_t(word.part[low + 1]) << 32));
    });
  else if (dtype == DType::float16)
    fill([&](int e) { return T(to_float(Half{half(e)})); });
  else
    fill([&](int e) { return T(to_float(Bfloat{half(e)})); });
  return out;
}

// The other way: puts pack q into a run.
template <class T>
SFR_DEVICE void pack_into(DType dtype, const Pack<T>& pack, int q, Word16& word) {
  const auto each = [&](auto put) {
#pragma unroll
    for (int k = 0; k < Pack<T>::count; ++k) put(q * Pack<T>::count + k, pack.at[k]);
  };
  const auto put_half = [&](int e, auto half) {
    word.part[e / 2] = e % 2 == 0 ? half.bits : word.part[e / 2] | uint32_t(half.bits) << 16;
  };
  if (dtype == DType::float32)
    each([&](int e, T x) { word.part[e % 4] = float_bits(float(x)); });
  else if (sizeof(T) == 8 && dtype == DType::float64)
    each([&](int e, T x) {
      const uint64_t bits = double_bits(double(x));
      word.part[2 * (e % 2)] = uint32_t(bits), word.part[2 * (e % 2) + 1] = uint32_t(bits >> 32);
    });
  else if (dtype == DType::float16)
    each([&](int e, T x) {
      Half half;
      from_float(x, half);
      put_half(e, half);
    });
  else
    each([&](int e, T x) {
      Bfloat half;
      from_float(x, half);
      put_half(e, half);
    });
}

// First element of word k of a round.
SFR_DEVICE int first_element(const Team& team, const Reader& reader, int round, int k) {
  return (round * fetched_elements + k * reader.run) * team.size + team.rank * reader.run;
}

// Element e of a panel of channels that follow each other.
SFR_DEVICE int64_t offset_together(const Reader& reader, int c0, int e) {
  return reader.region.map + int64_t(c0) * reader.region.count + e;
}
// The byte where the run that begins with element e of a panel lies.
SFR_DEVICE int64_t offset_of_run(const Reader& reader, const Walk& walk, int c0, int e) {
  const int64_t element = reader.together ? offset_together(reader, c0, e) : reader.offset(walk(e), c0);
  return element * (16 / reader.run);
}

template <class T>
SFR_DEVICE void fetch(const Team& team, const Reader& reader, int c0, int channels, int round, Fetched<T>& out) {
  if (!reader.in_runs(channels)) return;
  const int total = reader.region.count * channels;
  const Walk walk(reader.order, reader.region.count, channels);
  const char* data = static_cast<const char*>(reader.region.view->data);
  const auto ask = [&](auto offset) {
#pragma unroll
    for (int k = 0; k < Fetched<T>::words; ++k) {
      const int e = first_element(team, reader, round, k);
      if (k * reader.run < fetched_elements && e < total)  // mutant: a later word is the next round's, read twice
        out.word[k] = load16(data + offset(e) * (16 / reader.run));
    }
  };
  // Two loops: else each run would find its place by division.
  if (reader.together)
    ask([&](int e) { return offset_together(reader, c0, e); });
  else
    ask([&](int e) { return reader.offset(walk(e), c0); });
}

// How the words of a panel become its elements.
struct Unpacking {
  DType dtype;
  int run;
  const uint8_t* used;  // of the region's pixels
  bool copies;

  SFR_DEVICE Unpacking(const Reader& reader, int ld)
      : dtype(reader.region.view->dtype),
        run(reader.run),
        used(reader.used ? reader.used + reader.region.first : nullptr),
        copies(reader.copies(ld)) {}
};

// In pack q of the run that begins with element e of a panel, of pixels that are not used.
template <class T>
SFR_DEVICE void clear_unused(const uint8_t* used, const Walk& walk, int e, int q, Pack<T>& pack) {
  const int first = walk(e).pixel;
#pragma unroll
  for (int i = 0; i < Pack<T>::count; ++i) {
    int pixel = first;
    if (walk.order == Order::pixels) {
      pixel += q * Pack<T>::count + i;
      if (pixel >= walk.pixels) pixel -= walk.pixels;
    }
    if (!used[pixel]) pack.at[i] = 0;
  }
}

// The run that begins with element e into panel [channels][ld].
template <class T>
SFR_DEVICE void put_run(const Unpacking& by, const Walk& walk, int e, const Word16& word, T* panel, int ld) {
#pragma unroll
  for (int q = 0; q < most_packs<T>; ++q) {
    if (q * Pack<T>::count >= by.run) break;
    Pack<T> pack = unpacked<T>(by.dtype, word, q);
    if (by.used) clear_unused(by.used, walk, e, q, pack);
    if (by.copies) {
      store_vector(panel + e + q * Pack<T>::count, pack);  // hot: panel copied
      continue;
    }
    const Run run(walk, e, ld);
#pragma unroll
    for (int i = 0; i < Pack<T>::count; ++i) panel[run(q * Pack<T>::count + i)] = pack.at[i];  // hot: panel cut
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
  if (!reader.in_runs(channels)) {
    with_element(region.view->dtype, [&](auto kind) {
      using E = decltype(kind);
      if constexpr (sizeof(T) >= sizeof(E)) {
        const E* data = static_cast<const E*>(region.view->data);
#pragma unroll 4
        for (int e = team.rank; e < total; e += team.size) {
          const PanelEntry at = walk(e);
          const bool used = !reader.used || reader.used[region.first + at.pixel];
          panel[at.channel * ld + at.pixel] = used ? T(to_float(data[reader.offset(at, c0)])) : T(0);
        }
      }
    });
    return;
  }
  const int each = team.size * fetched_elements;
  const Unpacking by(reader, ld);
  Fetched<T> now = first;
#pragma unroll 1
  for (int round = 0; round * each < total; ++round) {
    if (round > 0) fetch(team, reader, c0, channels, round, now);
#pragma unroll
    for (int k = 0; k < Fetched<T>::words; ++k) {
      const int e = first_element(team, reader, round, k);
      if (k * reader.run < fetched_elements && e < total)  // mutant: the next round puts it right
        put_run(by, walk, e, now.word[k], panel, ld);
    }
  }
}

// Whether panels of T with a second buffer are filled by asynchronous copies.
template <class T>
constexpr bool filled_async = async_copies && sizeof(T) == 4;

// The bits of half types come to the end of the panel that they become, half of which they take. A thread expands those
// that it asked for, `expanded` words in a round. Rounds go up, and so do the places of pixels: what one writes lies
// before the bits of the next. Channels lie anywhere, and must come in one round.
constexpr int expanded = 4;

SFR_DEVICE bool is_expanded(const Team& team, const Reader& reader, int channels, int ld) {
  return reader.run == 8 && reader.in_runs(channels) && channels * ld % 4 == 0 &&
         (reader.order == Order::pixels || reader.region.count * channels <= team.size * expanded * reader.run);
}
// The byte of a panel at which they begin: a multiple of 16.
SFR_DEVICE int first_half(int elements, int channels, int ld) {
  return channels * ld * 4 - elements * 2;
}

// Asks for panel [channels][ld] of float32, or for the bits that it is made of, all at once. Of half types that do not
// come in runs it is there when this returns.
SFR_DEVICE void copy_panel(const Team& team, const Reader& reader, int c0, int channels, float* panel, int ld) {
  const Region& region = reader.region;
  const DType dtype = region.view->dtype;
  const bool single = dtype == DType::float32;
  const int total = region.count * channels, rank = afresh(team.rank), size = afresh(team.size);
  const char* data = static_cast<const char*>(region.view->data);
  const bool by_pixels = reader.order == Order::pixels;
  if (single ? !reader.used && reader.together && reader.copies(ld) && reader.in_runs(channels)
             : is_expanded(team, reader, channels, ld)) {
    const int element = 16 / reader.run, bytes = total * element;
    char* to = reinterpret_cast<char*>(panel) + (single ? 0 : first_half(total, channels, ld));
    if (reader.together) {
      const char* from = data + (region.map + int64_t(c0) * region.count) * element;
#pragma unroll 2
      for (int at = rank * 16; at < bytes; at += size * 16) copy_async<16>(to + at, from + at);  // hot: panel sent
    } else {
      const Walk walk(reader.order, region.count, channels);
#pragma unroll 1
      for (int at = rank * 16; at < bytes; at += size * 16)
        copy_async<16>(to + at, data + offset_of_run(reader, walk, c0, at / 16 * reader.run));
    }
    return;
  }
  // Rows of a part of a map, or longer ones than the map's.
  if (single && !reader.used && by_pixels && reader.in_runs(channels) && region.count % 4 == 0 && ld % 4 == 0) {
    const int64_t apart = region.view->stride_c;
    const float* from = reinterpret_cast<const float*>(data) + region.offset(0) + c0 * apart;
#pragma unroll 1
    for (int c = rank / warp_threads; c < channels; c += size / warp_threads)
#pragma unroll 2
      for (int p = rank % warp_threads * 4; p < region.count; p += 4 * warp_threads)
        copy_async<16>(panel + c * ld + p, from + c * apart + p);  // hot: panel sent by rows
    return;
  }
  // Neighbours in memory, for neighbouring threads; of channels 8, as many as 32 bytes hold, since in a panel they lie
  // a row apart.
  constexpr int together = 8;
  const int pixel0 = by_pixels ? rank % warp_threads : rank / together;
  const int pixel_step = by_pixels ? warp_threads : size / together;
  const int channel0 = by_pixels ? rank / warp_threads : rank % together;
  const int channel_step = by_pixels ? size / warp_threads : together;
#pragma unroll 1
  for (int p = pixel0; p < region.count; p += pixel_step) {
    const bool used = !reader.used || reader.used[region.first + p];
    const int64_t first = reader.offset({channel0, p}, c0), step = channel_step * region.view->stride_c;
    float* to = panel + channel0 * ld + p;
    if (single) {
      const float* from = reinterpret_cast<const float*>(data) + first;
#pragma unroll 2
      for (int c = channel0; c < channels; c += channel_step, to += channel_step * ld, from += step)
        copy_async<4>(to, from, used);  // hot: panel scattered
    } else {
      const Half* from = reinterpret_cast<const Half*>(data) + first;
#pragma unroll 4
      for (int c = channel0; c < channels; c += channel_step, to += channel_step * ld, from += step) {
        const Half half = *from;
        *to = !used ? 0 : dtype == DType::float16 ? to_float(half) : to_float(Bfloat{half.bits});
      }
    }
  }
}

// Panel [channels][ld] of the bits that this thread has waited for; with barriers of the team. Where a row ends there
// may have been bits: it is cleared.
SFR_DEVICE void expand_halves(const Team& team, const Reader& reader, int channels, float* panel, int ld) {
  const int count = reader.region.count, total = count * channels, ends = ld - count;
  const int rank = afresh(team.rank), size = afresh(team.size);
  const unsigned char* bits = reinterpret_cast<unsigned char*>(panel) + first_half(total, channels, ld);
  const Walk walk(reader.order, count, channels);
  const Unpacking by(reader, ld);
  const auto each = [&](int round, auto use) {
#pragma unroll
    for (int k = 0; k < expanded; ++k) {
      const int e = ((round * expanded + k) * size + rank) * reader.run;
      if (e < total) use(k, e);
    }
  };
#pragma unroll 1
  for (int round = 0; round * expanded * size * reader.run < total; ++round) {
    Word16 word[expanded] = {};  // else registers would be kept for what was there before
    each(round, [&](int k, int e) { word[k] = load16(bits + e * 2); });
    team.sync();
    each(round, [&](int k, int e) { put_run(by, walk, e, word[k], panel, ld); });
  }
#pragma unroll 1
  for (int e = rank; e < ends * channels; e += size) panel[e / ends * ld + count + e % ends] = 0;
}

// A panel of the gradient to where it belongs, in the order of memory.
template <class T>
SFR_DEVICE void store_panel(const Team& team, const Reader& to, int c0, int channels, const T* panel, int ld) {
  const FeatureView& view = *to.region.view;
  const int total = to.region.count * channels;
  const Walk walk(to.order, to.region.count, channels);
  if (!to.in_runs(channels)) {
    with_element(view.dtype, [&](auto kind) {
      using E = decltype(kind);
      if constexpr (sizeof(T) >= sizeof(E)) {
        E* data = static_cast<E*>(view.data);
#pragma unroll 4
        for (int e = team.rank; e < total; e += team.size) {
          const PanelEntry at = walk(e);
          from_float(panel[at.channel * ld + at.pixel], data[to.offset(at, c0)]);
        }
      }
    });
    return;
  }
  const bool copies = to.copies(ld);
  char* data = static_cast<char*>(view.data);
#pragma unroll 1
  for (int e = team.rank * to.run; e < total; e += team.size * to.run) {
    Word16 word;
#pragma unroll
    for (int q = 0; q < most_packs<T>; ++q) {
      if (q * Pack<T>::count >= to.run) break;
      Pack<T> pack;
      if (copies) {
        pack = load_vector<Pack<T>>(panel + e + q * Pack<T>::count);  // hot: gradient copied
      } else {
        const Run run(walk, e, ld);
#pragma unroll
        for (int i = 0; i < Pack<T>::count; ++i) pack.at[i] = panel[run(q * Pack<T>::count + i)];  // hot: gradient cut
      }
      pack_into(view.dtype, pack, q, word);
    }
    store_vector(data + offset_of_run(to, walk, c0, e), word);
  }
}

}  // namespace sfr::cuda

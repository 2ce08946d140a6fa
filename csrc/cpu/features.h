// Features in and out: from any element type and any strides to channel-major panels [channels][ld] of the
// accumulator type, a block of channels at a time, and gradients back.
#pragma once

#include <type_traits>

#include "simd.h"

namespace sfr::cpu::SFR_ISA {

// Channels in a panel: two panels of 49 patches, and a matrix of 49 x 49, fit a 32 KiB L1 cache.
constexpr int64_t panel_channels = 48;

template <class T>
constexpr int64_t whole_vectors(int64_t n) {
  return (n + lanes<T> - 1) / lanes<T> * lanes<T>;
}

// Row length for n values: whole vectors, and where rows are long not a multiple of 256 bytes, of which a column would
// meet a sixteenth of the cache's sets alone.
template <class T>
constexpr int64_t padded(int64_t n) {
  constexpr int64_t stride = 256 / sizeof(T);
  const int64_t values = whole_vectors<T>(n);
  return values + (values > stride && values % stride == 0 ? lanes<T> : 0);
}

inline float bits_to_float(uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline uint32_t float_to_bits(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  return bits;
}

struct Half {
  uint16_t bits;
};
struct Bfloat {
  uint16_t bits;
};

SFR_INLINE float to_float(Half h) {
  const uint32_t magnitude = h.bits & 0x7fffu, sign = uint32_t(h.bits & 0x8000u) << 16;
  const uint32_t exponent = magnitude >= 0x7c00u ? 0x7f800000u : (magnitude << 13) + 0x38000000u;
  const uint32_t normal = magnitude >= 0x7c00u ? exponent | (magnitude << 13) : exponent;
  const uint32_t subnormal = float_to_bits(float(int32_t(magnitude)) * 5.9604644775390625e-08f);  // 2^-24
  return bits_to_float(sign | (magnitude < 0x0400u ? subnormal : normal));
}
SFR_INLINE float to_float(Bfloat h) {
  return bits_to_float(uint32_t(h.bits) << 16);
}

// Round to nearest, ties to even.
SFR_INLINE void from_float(float f, Half& out) {
  const uint32_t bits = float_to_bits(f), magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t subnormal = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t h = magnitude < 0x38800000u ? subnormal : normal;
  h = magnitude >= 0x477ff000u ? 0x7c00u : h;
  h = magnitude > 0x7f800000u ? 0x7e00u : h;
  out.bits = uint16_t(h | ((bits & 0x80000000u) >> 16));
}
SFR_INLINE void from_float(float f, Bfloat& out) {
  const uint32_t bits = float_to_bits(f);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  out.bits = uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

template <class T>
SFR_INLINE T convert_in(Half h) {
  return T(to_float(h));
}
template <class T>
SFR_INLINE T convert_in(Bfloat h) {
  return T(to_float(h));
}
template <class T>
SFR_INLINE T convert_in(float x) {
  return T(x);
}
template <class T>
SFR_INLINE T convert_in(double x) {
  return T(x);
}
template <class T>
SFR_INLINE void convert_out(T x, Half& out) {
  from_float(float(x), out);
}
template <class T>
SFR_INLINE void convert_out(T x, Bfloat& out) {
  from_float(float(x), out);
}
template <class T>
SFR_INLINE void convert_out(T x, float& out) {
  out = float(x);
}
template <class T>
SFR_INLINE void convert_out(T x, double& out) {
  out = double(x);
}

namespace element {
using float16 = Half;
using bfloat16 = Bfloat;
using float32 = float;
using float64 = double;
}  // namespace element

}  // namespace sfr::cpu::SFR_ISA

#define SFR_GROUND_NAMESPACE sfr::cpu::SFR_ISA
#define SFR_GROUND_INLINE SFR_INLINE
#include "../ground/elements.h"

namespace sfr::cpu::SFR_ISA {

// Where the pixels of a map lie: offsets in elements from the map's first.
struct Pixels {
  int64_t count = 0;
  int64_t* offset = nullptr;
  bool adjacent = false;  // offsets 0, 1, 2, ...

  // All pixels of the map, or the `some` listed in `kept`.
  void locate(const FeatureView& view, const int32_t* kept, int64_t some) {
    count = kept ? some : view.H * view.W;
    adjacent = true;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t p = kept ? kept[i] : i;
      offset[i] = p / view.W * view.stride_h + p % view.W * view.stride_w;
      adjacent = adjacent && offset[i] == i;
    }
  }
};

template <class T, class E>
void pack_elements(const E* map, int64_t stride_c, const Pixels& pixels, int64_t c0, int64_t channels, T* panel,
                   int64_t ld) {
  constexpr int L = lanes<T>;
  const int64_t n = pixels.count;
  map += c0 * stride_c;
  if (pixels.adjacent) {
    for (int64_t c = 0; c < channels; ++c) {
      const E* in = map + c * stride_c;
      T* out = panel + c * ld;
      for (int64_t p = 0; p < n; ++p) out[p] = convert_in<T>(in[p]);
      for (int64_t p = n; p < ld; ++p) out[p] = 0;
    }
  } else if (stride_c == 1) {
    T rows[L][panel_channels];
    for (int64_t p = 0; p < whole_vectors<T>(n); p += L) {
      const T* row[L];  // converted, or where it is
      for (int r = 0; r < L; ++r) {
        row[r] = rows[r];
        // The next panel's piece of the row, which no hardware guesses.
        for (int64_t c = 0; p + r < n && c < panel_channels; c += 64 / int64_t(sizeof(E)))
          __builtin_prefetch(map + pixels.offset[p + r] + channels + c, 0, 2);
        if (p + r >= n) {
          for (int64_t c = 0; c < channels; ++c) rows[r][c] = 0;
        } else if constexpr (std::is_same_v<T, E>) {
          row[r] = map + pixels.offset[p + r];
        } else {
          const E* in = map + pixels.offset[p + r];
          for (int64_t c = 0; c < channels; ++c) rows[r][c] = convert_in<T>(in[c]);
        }
      }
      int64_t c = 0;
      for (; c + L <= channels; c += L) {
        Vec<T> square[L];
        for (int r = 0; r < L; ++r) square[r] = load(row[r] + c);
        transpose<T>(square);
        for (int r = 0; r < L; ++r) store(panel + (c + r) * ld + p, square[r]);
      }
      for (; c < channels; ++c)
        for (int r = 0; r < L; ++r) panel[c * ld + p + r] = row[r][c];
    }
  } else {
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t p = 0; p < n; ++p) panel[c * ld + p] = convert_in<T>(map[c * stride_c + pixels.offset[p]]);
      for (int64_t p = n; p < ld; ++p) panel[c * ld + p] = 0;
    }
  }
}

template <class T, class E>
void unpack_elements(const T* panel, int64_t ld, const Pixels& pixels, int64_t c0, int64_t channels, E* map,
                     int64_t stride_c) {
  constexpr int L = lanes<T>;
  const int64_t n = pixels.count;
  map += c0 * stride_c;
  if (pixels.adjacent) {
    for (int64_t c = 0; c < channels; ++c) {
      E* out = map + c * stride_c;
      const T* in = panel + c * ld;
      for (int64_t p = 0; p < n; ++p) convert_out(in[p], out[p]);
    }
  } else if (stride_c == 1) {
    T rows[L][panel_channels];
    for (int64_t p = 0; p < n; p += L) {
      int64_t c = 0;
      for (; c + L <= channels; c += L) {
        Vec<T> square[L];
        for (int r = 0; r < L; ++r) square[r] = load(panel + (c + r) * ld + p);
        transpose<T>(square);
        for (int r = 0; r < L; ++r) store(&rows[r][c], square[r]);
      }
      for (; c < channels; ++c)
        for (int r = 0; r < L; ++r) rows[r][c] = panel[c * ld + p + r];
      for (int r = 0; r < L && p + r < n; ++r) {
        E* out = map + pixels.offset[p + r];
        for (int64_t k = 0; k < channels; ++k) convert_out(rows[r][k], out[k]);
      }
    }
  } else {
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t p = 0; p < n; ++p) convert_out(panel[c * ld + p], map[c * stride_c + pixels.offset[p]]);
  }
}

// Channels c0 .. c0 + channels of a map as a panel; the padding of each row, up to a whole vector, is 0.
template <class T>
void pack(const FeatureView& view, int64_t map, const Pixels& pixels, int64_t c0, int64_t channels, T* panel,
          int64_t ld) {
  with_element(view.dtype, [&](auto element) {
    using E = decltype(element);
    pack_elements(static_cast<const E*>(view.data) + map, view.stride_c, pixels, c0, channels, panel, ld);
  });
}

// The reverse, for gradients.
template <class T>
void unpack(const T* panel, int64_t ld, const Pixels& pixels, int64_t c0, int64_t channels, const FeatureView& view,
            int64_t map) {
  with_element(view.dtype, [&](auto element) {
    using E = decltype(element);
    unpack_elements(panel, ld, pixels, c0, channels, static_cast<E*>(view.data) + map, view.stride_c);
  });
}

// Every pixel of channels c0 .. c0 + channels set to one value: removed patches, and problems that hold a NaN.
inline void fill(const FeatureView& view, int64_t map, int64_t c0, int64_t channels, float value) {
  with_element(view.dtype, [&](auto element) {
    using E = decltype(element);
    E* data = static_cast<E*>(view.data) + map;
    E filler;
    convert_out(value, filler);
    for (int64_t c = c0; c < c0 + channels; ++c)
      for (int64_t h = 0; h < view.H; ++h)
        for (int64_t w = 0; w < view.W; ++w) data[c * view.stride_c + h * view.stride_h + w * view.stride_w] = filler;
  });
}

}  // namespace sfr::cpu::SFR_ISA

#include "../contracts/directions.h"

#include <limits>

#include "features.h"
#include "team.h"
#include "variant.h"

namespace sfr::cpu::SFR_ISA {
namespace {

// One map of one group, and how it is cut into blocks.
template <class T>
struct Map {
  const DirectionsParams& p;
  int64_t offset, down, across, pixels;

  Map(const DirectionsParams& params, int64_t b, int64_t g)
      : p(params), offset(map_offset(p.x, b, g)), down(p.x.H / p.h), across(p.x.W / p.w), pixels(p.h * p.w) {}

  T* row(int64_t c, int64_t y) const {
    return static_cast<T*>(const_cast<void*>(p.x.data)) + offset + c * p.x.stride_c + y * p.x.stride_h;
  }
};

// Calls f with a number of neighbours that the compiler knows, where it is a usual one.
template <int64_t count>
struct Across {
  SFR_INLINE constexpr operator int64_t() const { return count; }
};
template <class F>
SFR_INLINE void with_across(int64_t across, F&& f) {
  switch (across) {
    case 1:
      return f(Across<1>{});
    case 2:
      return f(Across<2>{});
    case 4:
      return f(Across<4>{});
    default:
      return f(across);
  }
}

// Room for the rows of blocks of one channel, and for one number of each pixel.
template <class T>
struct Work {
  T *rows, *of_pixels;

  Work(Arena& arena, const DirectionsParams& p) {
    rows = arena.take<T>(p.h * p.x.W);
    of_pixels = arena.take<T>(p.h * p.w);
  }
};

template <class T>
void pool_channel(const Map<T>& map, int64_t c, T* rows, T* out) {
  const int64_t W = map.p.x.W;
  for (int64_t y = 0; y < map.p.h; ++y) {
    T* sum = rows + y * W;
    const T* first = map.row(c, y * map.down);
    for (int64_t k = 0; k < W; ++k) sum[k] = first[k];
    for (int64_t dy = 1; dy < map.down; ++dy) {
      const T* next = map.row(c, y * map.down + dy);
      for (int64_t k = 0; k < W; ++k) sum[k] += next[k];
    }
  }
  const T share = T(1) / T(map.down * map.across);
  with_across(map.across, [&](auto across) {
    for (int64_t i = 0; i < map.pixels; ++i) {
      T sum = rows[i * across];
      for (int64_t k = 1; k < across; ++k) sum += rows[i * across + k];
      out[i] = sum * share;
    }
  });
}

template <class T>
void forward(const DirectionsForwardParams& p) {
  const double nanoseconds = 0.1 * double(p.G * p.C) * double(p.x.H * p.x.W);
  for_each_problem_in<Work<T>>({p.B, nanoseconds, 0, p.threads}, p, [&](const Team&, int64_t b, Work<T>& work) {
    for (int64_t g = 0; g < p.G; ++g) {
      const Map<T> map(p, b, g);
      const int64_t item = b * p.G + g, n = map.pixels;
      T *out = static_cast<T*>(p.directions) + item * p.C * n, *inverse = static_cast<T*>(p.inverse) + item * n;
      T* squares = work.of_pixels;
      for (int64_t i = 0; i < n; ++i) squares[i] = 0;
      for (int64_t c = 0; c < p.C; ++c) {
        T* channel = out + c * n;
        pool_channel(map, c, work.rows, channel);
        for (int64_t i = 0; i < n; ++i) squares[i] += channel[i] * channel[i];
      }
      T *lengths = inverse, sum = 0;  // for a moment
      for (int64_t i = 0; i < n; ++i) lengths[i] = sqrt_of(squares[i]);
      for (int64_t i = 0; i < n; ++i) sum += lengths[i];
      const T length = sum / T(n) * T(1e-3), square = length * length;
      const T least = square < std::numeric_limits<T>::min() ? std::numeric_limits<T>::min() : square;
      for (int64_t i = 0; i < n; ++i) {
        const bool above = squares[i] > least;
        squares[i] = 1 / sqrt_of(above ? squares[i] : least);
        inverse[i] = above ? squares[i] : -squares[i];
      }
      for (int64_t c = 0; c < p.C; ++c)
        for (int64_t i = 0; i < n; ++i) out[c * n + i] *= squares[i];
    }
  });
}

// Along the direction nothing changes, unless the length is the floor.
template <class T>
void backward(const DirectionsBackwardParams& p) {
  const double nanoseconds = 0.1 * double(p.G * p.C) * double(p.x.H * p.x.W);
  for_each_problem_in<Work<T>>({p.B, nanoseconds, 0, p.threads}, p, [&](const Team&, int64_t b, Work<T>& work) {
    for (int64_t g = 0; g < p.G; ++g) {
      const Map<T> map(p, b, g);
      const int64_t item = b * p.G + g, n = map.pixels, W = p.x.W;
      const T *directions = static_cast<const T*>(p.directions) + item * p.C * n,
              *inverse = static_cast<const T*>(p.inverse) + item * n,
              *grad = static_cast<const T*>(p.grad) + item * p.C * n;
      T* along = work.of_pixels;
      for (int64_t i = 0; i < n; ++i) along[i] = 0;
      for (int64_t c = 0; c < p.C; ++c)
        for (int64_t i = 0; i < n; ++i) along[i] += grad[c * n + i] * directions[c * n + i];
      for (int64_t i = 0; i < n; ++i) along[i] = inverse[i] < 0 ? T(0) : along[i];
      const T share = T(1) / T(map.down * map.across);
      for (int64_t c = 0; c < p.C; ++c) {
        with_across(map.across, [&](auto across) {
          for (int64_t i = 0; i < n; ++i) {
            const T length = inverse[i] < 0 ? -inverse[i] : inverse[i];
            const T x = (grad[c * n + i] - directions[c * n + i] * along[i]) * length * share;
            for (int64_t k = 0; k < across; ++k) work.rows[i * across + k] = x;
          }
        });
        for (int64_t y = 0; y < p.x.H; ++y) {
          const T* row = work.rows + y / map.down * W;
          T* out = map.row(c, y);
          for (int64_t k = 0; k < W; ++k) out[k] = row[k];
        }
      }
    }
  });
}

}  // namespace

Status directions_forward(const DirectionsForwardParams& p) {
  p.compute == DType::float64 ? forward<double>(p) : forward<float>(p);
  return Status::ok;
}
Status directions_backward(const DirectionsBackwardParams& p) {
  p.compute == DType::float64 ? backward<double>(p) : backward<float>(p);
  return Status::ok;
}

}  // namespace sfr::cpu::SFR_ISA

// The costs of one problem, row by row: where somebody else has them, or laid out beside each other.
#pragma once

#include <cstdint>

namespace SFR_EXACT_NAMESPACE {

// What is among the costs between kept patches.
struct CostKinds {
  bool sound, forbidden, large;
};

template <class S>
struct Costs {
  const S* data = nullptr;
  int64_t stride = 0;             // between rows
  const int32_t* kept = nullptr;  // the rows that count; null: all of them
  int64_t n = 0, m = 0;           // rows, columns
  int64_t width = 0;              // of a row as it is scanned: m, and perhaps padding of +inf
  int64_t span = 0;               // of vectors beside a row: width, in whole vectors
  bool forbidden = false;         // some are +inf

  SFR_LANES const S* row(int64_t i) const { return data + (kept ? kept[i] : i) * stride; }
  SFR_LANES double at(int64_t i, int64_t j) const { return double(row(i)[j]); }
};

}  // namespace SFR_EXACT_NAMESPACE

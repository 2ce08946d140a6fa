#include "../contracts/exact.h"

#include <optional>

#include "scan.h"
// After what it is made of.
#include "../exact/matching.h"
#include "transport.h"
#include "variant.h"

namespace sfr::cpu::SFR_ISA {
namespace {

// Rows so long that scans of them where they lie cost no more than of a copy.
constexpr int64_t long_row = 128;

template <class T>
bool may_lie(const ExactForwardParams& p) {
  return p.cost.dtype == p.compute && p.cost.stride_m == 1 && p.N <= p.M && p.M >= long_row && !priced(p);
}

template <class T>
struct Forward : ExactWork<T> {
  T* copy;  // of the costs; null where these may lie

  Forward(Arena& arena, const ExactForwardParams& p, bool lie = true) {
    const int64_t rows = this->least_side(p) + 1, span = padded<double>(p.N + p.M - this->least_side(p) + 1);
    copy = lie && may_lie<T>(p) ? nullptr : arena.take<T>(rows * span);
    this->reserve(arena, p, span);
  }
};

// Either side's weights.
template <class T>
struct Backward {
  Weights<T> weights;
  T* normalised;

  Backward(Arena& arena, const ExactParams& p) {
    const int64_t most = p.N > p.M ? p.N : p.M;
    weights.reserve(arena, most);
    normalised = arena.take<T>(most);
  }
};

template <class T>
struct Match : Forward<T> {
  Matching<T> most;

  Match(Arena& arena, const AssignmentForwardParams& p)
      : Forward<T>(arena, as_transport(p), Gate{p.maximize, p.limit}.open()) {
    const int64_t rows = p.N < p.M ? p.N : p.M;
    most.reserve(arena, rows, padded<double>(p.N + p.M - rows + 1));
    most.costs = arena.take<T>(rows * padded<double>(rows));
  }
};

// Whether all are finite, and none is large.
template <class T>
bool are_ordinary(const Costs<T>& cost, int64_t rows, int64_t columns) {
  const int64_t whole = columns / lanes<double> * lanes<double>;
  Indices ordinary = every(-1);
  for (int64_t i = 0; i < rows; ++i) {
    const T* row = cost.row(i);
    over_row(row, 0, whole,
             [&](Vec<double> x, int64_t) { ordinary &= vabs<double>(x) <= splat<double>(largest_cost); });
    for (int64_t j = whole; j < columns; ++j)
      if (!(std::fabs(double(row[j])) <= largest_cost)) return false;
  }
  return !any_lane(~ordinary);
}

// What kinds of costs there are.
template <class T>
CostKinds kinds_of(const Costs<T>& cost, int64_t rows, int64_t columns) {
  if (are_ordinary(cost, rows, columns)) return {true, false, false};
  Indices finite_or_inf = every(-1), infinite{}, large{};
  for (int64_t i = 0; i < rows; ++i) {
    const T* row = cost.row(i);
    const auto see = [&](Vec<double> x, Indices counted) {
      finite_or_inf &= (x > -infinity) | ~counted;
      infinite |= (x == infinity) & counted;
      large |= (vabs<double>(x) > largest_cost) & (x < infinity) & counted;
    };
    over_row(row, 0, columns, [&](Vec<double> x, int64_t j) { see(x, lane_numbers() + j < columns); });
  }
  return {!any_lane(~finite_or_inf), any_lane(infinite), any_lane(large)};
}

// Rows of kept patches beside each other, as they count.
template <class T, class Counts>
void copy_costs(const ExactForwardParams& p, int64_t item, ExactWork<T>& work, T* out, Counts counts) {
  const Masses &rows = work.rows(), &columns = work.columns();
  const int64_t between_rows = work.turned ? p.cost.stride_m : p.cost.stride_n,
                along = work.turned ? p.cost.stride_n : p.cost.stride_m;
  Costs<T>& cost = work.cost;
  cost = {out, cost.span, nullptr, cost.n, cost.m, cost.span, cost.span, false};
  with_element(p.cost.dtype, [&](auto element) {
    using E = decltype(element);
    const E* in = first_of<E>(p.cost, item / p.G, item % p.G);
    const auto copy = [&](int64_t i, int64_t j) {
      out[i * cost.stride + j] = counts(convert_in<T>(in[rows.index(i) * between_rows + columns.index(j) * along]));
    };
    if (between_rows < along) {
      for (int64_t j = 0; j < columns.count; ++j)
        for (int64_t i = 0; i < rows.count; ++i) copy(i, j);
    } else if (along == 1 && !columns.kept) {
      for (int64_t i = 0; i < rows.count; ++i) {
        const E* row = in + rows.index(i) * between_rows;
        for (int64_t j = 0; j < columns.count; ++j) out[i * cost.stride + j] = counts(convert_in<T>(row[j]));
      }
    } else {
      for (int64_t i = 0; i < rows.count; ++i)
        for (int64_t j = 0; j < columns.count; ++j) copy(i, j);
    }
  });
  for (int64_t i = 0; i < cost.n; ++i)
    for (int64_t j = columns.count; j < cost.stride; ++j) out[i * cost.stride + j] = std::numeric_limits<T>::infinity();
  if (!priced(p)) return;
  const double row_price = work.turned ? p.options.price_b : p.options.price_a,
               column_price = work.turned ? p.options.price_a : p.options.price_b;
  for (int64_t i = 0; i < rows.count; ++i) out[i * cost.stride + columns.count] = counts(T(row_price));
  T* more = out + rows.count * cost.stride;
  for (int64_t j = 0; j < columns.count; ++j) more[j] = counts(T(column_price));
  more[columns.count] = 0;
}

// The costs between kept patches, where they lie or in `out`, or in `own` if there is no `out` and they cannot stay.
// False: one is not a cost.
template <class T, class Counts>
bool read_cost(const ExactForwardParams& p, int64_t item, ExactWork<T>& work, T* out, std::optional<Memory>& own,
               Counts counts) {
  const Masses &rows = work.rows(), &columns = work.columns();
  Costs<T>& cost = work.cost;
  const int64_t more = priced(p) ? 1 : 0;
  cost.n = rows.count + more, cost.m = columns.count + more;
  cost.span = padded<double>(cost.m);
  work.scale = 1;
  const auto room = [&] {
    if (out) return out;
    own.emplace(cost.n * cost.span * int64_t(sizeof(T)));
    return reinterpret_cast<T*>(own->data());
  };
  if (!out && !columns.kept && !work.turned) {
    cost.data = first_of<T>(p.cost, item / p.G, item % p.G);
    cost.stride = p.cost.stride_n;
    cost.kept = rows.kept;
    cost.width = cost.m;
  } else {
    copy_costs(p, item, work, room(), counts);
  }
  const CostKinds found = kinds_of(cost, rows.count, columns.count);
  cost.forbidden = found.forbidden;
  if (!found.sound || (p.options.features && found.forbidden)) return false;
  if (found.large) {
    copy_costs(p, item, work, room(), [&](T x) { return counts(x) * T(scaled_down); });
    work.scale = 1 / scaled_down;
  }
  return true;
}

double nanoseconds(const ExactParams& p) {
  return 20 * double(p.N) * double(p.M);
}

template <class T>
Status forward(const ExactForwardParams& p) {
  const Status weights = check_weights<T>(p, p.B, p.G, p.N, p.M);
  if (weights != Status::ok) return weights;
  const Lanes lanes;
  const int64_t items = p.B * p.G;
  const Workload workload{items, nanoseconds(p), 0, p.threads < items ? p.threads : int(items)};
  for_each_problem_in<Forward<T>>(workload, p, [&](const Team&, int64_t item, Forward<T>& work) {
    std::optional<Memory> own;
    const Reading reading = work.template read_weights<T>(lanes, p, item);
    if (reading == Reading::empty)
      write<T>(lanes, p, item, of_nothing(), 0);
    else if (reading == Reading::bad || !read_cost(p, item, work, work.copy, own, [](T x) { return x; }))
      write<T>(lanes, p, item, of_nan(), 0);
    else
      solve_and_write<T>(lanes, p, item, work);
  });
  return Status::ok;
}

template <class T>
Status backward(const ExactBackwardParams& p) {
  const int64_t items = p.B * p.G;
  const Lanes lanes;
  const Workload workload{items, double(p.N) * double(p.M), 0, p.threads < items ? p.threads : int(items)};
  for_each_problem_in<Backward<T>>(workload, p, [&](const Team&, int64_t item, Backward<T>& work) {
    const T up = static_cast<const T*>(p.grad_value)[item];
    const T* mass = static_cast<const T*>(p.mass) + item * most_entries(p);
    if (p.grad_cost) {
      T* out = static_cast<T*>(p.grad_cost) + item * p.N * p.M;
      const T rest = mass[0] - mass[0];  // NaN where the problem is
      for (int64_t k = 0; k < p.N * p.M; ++k) out[k] = rest;
      const int32_t *rows = p.rows + item * most_entries(p), *columns = p.columns + item * most_entries(p);
      for (int64_t k = 0; k < most_entries(p) && mass[k] > 0; ++k) out[rows[k] * p.M + columns[k]] = up * mass[k];
    }
    // Through the normalisation a = w / sum(w), unless the side keeps its sum. Where nothing weighs, potentials are 0.
    const auto finish = [&](const WeightView& view, bool keeps_its_sum, const void* potentials, int64_t n,
                            void* gradient) {
      if (!gradient) return;
      const T* w = static_cast<const T*>(view.data);
      if (w) w += item / p.G * view.stride_b + item % p.G * view.stride_g;
      const auto weighs = [&](int64_t i) { return !w || w[i * view.stride_n] > 0; };
      const T* potential = static_cast<const T*>(potentials) + item * n;
      T *out = static_cast<T*>(gradient) + item * n, along = 0;
      if (keeps_its_sum || lanes.find(n, weighs) == n) {
        for (int64_t i = 0; i < n; ++i) out[i] = weighs(i) ? up * potential[i] : T(0);
        return;
      }
      auto& [weights, normalised] = work;
      weights.read(view, item / p.G, item % p.G, n, normalised);
      for (int64_t i = 0; i < weights.count; ++i) along += normalised[i] * potential[weights.index(i)];
      for (int64_t i = 0; i < weights.count; ++i)
        normalised[i] = T(up * (potential[weights.index(i)] - along) / weights.total);
      weights.scatter(normalised, out);
    };
    finish(p.a, p.options.price_a < infinity, p.f, p.N, p.grad_a);
    finish(p.b, p.options.price_b < infinity, p.g, p.M, p.grad_b);
  });
  return Status::ok;
}

template <class T>
Status match_all(const AssignmentForwardParams& p) {
  const ExactForwardParams problem = as_transport(p);
  const int64_t items = p.B * p.G;
  const Lanes lanes;
  const Workload workload{items, nanoseconds(problem), 0, p.threads < items ? p.threads : int(items)};
  for_each_problem_in<Match<T>>(workload, p, [&](const Team&, int64_t item, Match<T>& work) {
    std::optional<Memory> own;
    work.template read_weights<T>(lanes, problem, item);
    const bool sound = read_cost(problem, item, work, work.copy, own, Gate{p.maximize, p.limit});
    if (sound) match(lanes, work, work.most);
    write(lanes, p, item, work, work.most, sound);
  });
  return Status::ok;
}

}  // namespace

Status exact_forward(const ExactForwardParams& p) {
  return p.compute == DType::float64 ? forward<double>(p) : forward<float>(p);
}
Status exact_backward(const ExactBackwardParams& p) {
  return p.compute == DType::float64 ? backward<double>(p) : backward<float>(p);
}

Status assignment_forward(const AssignmentForwardParams& p) {
  return p.compute == DType::float64 ? match_all<double>(p) : match_all<float>(p);
}

}  // namespace sfr::cpu::SFR_ISA

#include "../contracts/exact.h"

#include "scan.cuh"
// After what it is made of.
#include "../exact/matching.h"
#include "transport.cuh"

namespace sfr::cuda {
namespace {

// A problem is one warp's: a scan over a row ends with a barrier of the lanes, however many lanes there are, and
// between two scans there is little to do.
//
// What it needs lies in shared memory as far as it fits: the vectors, then the costs beside them.
template <class T>
SFR_BOTH ExactWork<T> place(const ExactParams& p, Arena& vectors, Arena& costs, T*& cost) {
  ExactWork<T> work;
  const int64_t rows = work.least_side(p), columns = p.N + p.M - rows, more = priced(p) ? 1 : 0;
  work.reserve(vectors, p, columns + more);
  cost = costs.take<T>((rows + more) * (columns + more));
  return work;
}

template <class T>
SFR_BOTH ExactWork<T> place_matching(const AssignmentForwardParams& p, Arena& vectors, Arena& costs, T*& cost,
                                     Matching<T>& most) {
  const ExactWork<T> work = place<T>(as_transport(p), vectors, costs, cost);
  const int64_t rows = p.N < p.M ? p.N : p.M;
  most.reserve(vectors, rows, p.N + p.M - rows);
  most.costs = costs.take<T>(rows * rows);
  return work;
}

// The costs between kept patches, and with prices one more row and column. False: one is not a cost.
template <class T, class Counts>
SFR_DEVICE bool read_cost(const Lanes& lanes, const ExactForwardParams& p, int64_t item, ExactWork<T>& work, T* out,
                          Counts counts) {
  const Masses &rows = work.rows(), &columns = work.columns();
  const int64_t between_rows = work.turned ? p.cost.stride_m : p.cost.stride_n,
                along = work.turned ? p.cost.stride_n : p.cost.stride_m;
  const int64_t more = priced(p) ? 1 : 0, width = columns.count + more;
  bool bad = false, infinite = false, large = false;
  with_element(p.cost.dtype, [&](auto element) {
    using E = decltype(element);
    if constexpr (sizeof(T) >= sizeof(E)) {
      const E* cost = first_of<E>(p.cost, item / p.G, item % p.G);
#pragma unroll 1
      for (int64_t i = 0; i < rows.count; ++i) {
        const E* in = cost + rows.index(i) * between_rows;
#pragma unroll 4
        for (int64_t j = lanes.lane; j < columns.count; j += warp_threads) {
          const T x = counts(T(to_float(in[columns.index(j) * along])));
          bad = bad || !(double(x) > -infinity);
          infinite = infinite || double(x) == infinity;
          large = large || (fabs(double(x)) > largest_cost && double(x) < infinity);
          out[i * width + j] = x;
        }
      }
    }
  });
  const auto anywhere = [](bool x) { return over_lanes<Max>(x ? 1.0f : 0.0f, warp_threads) != 0; };
  lanes.sync();  // mutant: the shuffles below meet too, and a lane reads again only what it wrote itself
  const CostKinds found{!anywhere(bad), anywhere(infinite), anywhere(large)};
  if (!found.sound || (p.options.features && found.forbidden)) return false;
  const double factor = found.large ? scaled_down : 1;
  if (found.large)
#pragma unroll 1
    for (int64_t i = 0; i < rows.count; ++i)
#pragma unroll 1
      for (int64_t j = lanes.lane; j < columns.count; j += warp_threads) out[i * width + j] *= T(factor);
  if (more > 0) {
    const double row_price = work.turned ? p.options.price_b : p.options.price_a,
                 column_price = work.turned ? p.options.price_a : p.options.price_b;
    lanes.each(rows.count, [&](int64_t i) { out[i * width + columns.count] = T(row_price * factor); });
    T* last = out + rows.count * width;
    lanes.each(width, [&](int64_t j) { last[j] = T(j < columns.count ? column_price * factor : 0); });
  }
  work.scale = 1 / factor;
  work.cost = {out, width, nullptr, rows.count + more, width, width, width, found.forbidden};
  lanes.sync();  // mutant: the shuffles above are barriers too, but order no memory
  return true;
}

// Calls f(item, vectors, costs) for every problem of this block, with the memory that its vectors and its costs lie in.
template <class Params, class F>
SFR_DEVICE void each_problem(const KernelParams<Params>& p, const Lanes& lanes, F&& f) {
  const ProblemLayout& s = p.layout;
#pragma unroll 1
  for (int64_t item = blockIdx.x; item < p.items; item += p.teams) {
    Arena shared{shared_memory(), 0}, far{p.scratch + int64_t(blockIdx.x) * s.far_bytes, 0};
    f(item, s.resident ? shared : far, s.cost_near ? shared : far);
    lanes.sync();  // mutant: every way through f ends with one; this is for those to come
  }
}

template <class T>
__global__ void __launch_bounds__(warp_threads)
    exact_forward_kernel(const __grid_constant__ KernelParams<ExactForwardParams> p) {
  const Lanes lanes(int(threadIdx.x));
  each_problem(p, lanes, [&](int64_t item, Arena& vectors, Arena& costs) {
    T* cost;
    ExactWork<T> work = place<T>(p, vectors, costs, cost);
    const Reading reading = work.template read_weights<T>(lanes, p, item);
    if (reading == Reading::empty)
      write<T>(lanes, p, item, of_nothing(), 0);
    else if (reading == Reading::bad || !read_cost(lanes, p, item, work, cost, [](T x) { return x; }))
      write<T>(lanes, p, item, of_nan(), 0);
    else
      solve_and_write<T>(lanes, p, item, work);
  });
}

template <class T>
__global__ void __launch_bounds__(warp_threads)
    assignment_forward_kernel(const __grid_constant__ KernelParams<AssignmentForwardParams> p) {
  const Lanes lanes(int(threadIdx.x));
  each_problem(p, lanes, [&](int64_t item, Arena& vectors, Arena& costs) {
    T* cost;
    Matching<T> most;
    const ExactForwardParams problem = as_transport(p);
    ExactWork<T> work = place_matching<T>(p, vectors, costs, cost, most);
    work.template read_weights<T>(lanes, problem, item);
    const bool sound = read_cost(lanes, problem, item, work, cost, Gate{p.maximize, p.limit});
    if (sound) match(lanes, work, most);
    write(lanes, p, item, work, most, sound);
  });
}

// d/da of one side, through the normalisation a = w / sum(w) unless the side keeps its sum.
template <class T>
SFR_DEVICE void weight_gradient(Team& team, const ReductionBuffer<T>& buffer, const WeightView& view, int64_t b,
                                int64_t g, int n, bool keeps_its_sum, const T* potential, T up, T* out) {
  if (!out) return;
  Weights<T> side(view, b, g, n);
  int kept;
  side.read(team, buffer, kept);
  const bool plain = keeps_its_sum || kept == 0;  // where nothing is kept, potentials are 0
  T along[1] = {};
#pragma unroll 1
  for (int i = team.rank; i < n; i += team.size)
    if (!plain && side.keeps(i)) along[0] += side.marginal(i) * potential[i];
  over_block<Sum>(team, buffer, along);
#pragma unroll 1
  for (int i = team.rank; i < n; i += team.size) {
    const T direct = up * potential[i];
    out[i] = plain           ? (kept == 0 || side.keeps(i) ? direct : T(0))
             : side.keeps(i) ? up * (potential[i] - along[0]) / (side.total * side.most)
                             : T(0);
  }
}

template <class T>
SFR_KERNEL exact_backward_kernel(const __grid_constant__ KernelParams<ExactBackwardParams> p) {
  Team team;
  team.rank = int(threadIdx.x);
  team.size = p.layout.threads;
  const ReductionBuffer<T> buffer{reinterpret_cast<T*>(shared_memory()), nullptr, 0};
  const int64_t most = most_entries(p), pairs = p.N * p.M;
#pragma unroll 1
  for (int64_t item = blockIdx.x; item < p.items; item += p.teams) {
    const T up = static_cast<const T*>(p.grad_value)[item];
    if (p.grad_cost) {
      T* out = static_cast<T*>(p.grad_cost) + item * pairs;
      const T* mass = static_cast<const T*>(p.mass) + item * most;
      const T rest = mass[0] - mass[0];  // NaN where the problem is
#pragma unroll 4
      for (int64_t k = team.rank; k < pairs; k += team.size) out[k] = rest;
      team.sync();
#pragma unroll 1
      for (int64_t k = team.rank; k < most; k += team.size)
        if (mass[k] > 0) out[p.rows[item * most + k] * p.M + p.columns[item * most + k]] = up * mass[k];
    }
    const int64_t b = item / p.G, g = item % p.G;
    const T *f = static_cast<const T*>(p.f) + item * p.N, *h = static_cast<const T*>(p.g) + item * p.M;
    T* grad_a = p.grad_a ? static_cast<T*>(p.grad_a) + item * p.N : nullptr;
    T* grad_b = p.grad_b ? static_cast<T*>(p.grad_b) + item * p.M : nullptr;
    weight_gradient(team, buffer, p.a, b, g, int(p.N), p.options.price_a < infinity, f, up, grad_a);
    weight_gradient(team, buffer, p.b, b, g, int(p.M), p.options.price_b < infinity, h, up, grad_b);
  }
}

// Forced, `warp` has everything in shared memory, `block` the costs in global memory, `stream` all of it.
ProblemLayout choose_exact(int64_t N, int64_t M, const Arena& vectors, const Arena& costs, Strategy forced,
                           const DeviceLimits& device) {
  ProblemLayout s;
  s.N = int(N), s.M = int(M);
  for (const Strategy which : {Strategy::warp, Strategy::block, Strategy::stream}) {
    if (forced != Strategy::automatic && forced != which) continue;
    s.resident = which != Strategy::stream;
    s.cost_near = which == Strategy::warp;
    s.shared_bytes = int64_t((s.resident ? vectors.used : 0) + (s.cost_near ? costs.used : 0));
    s.far_bytes = int64_t(vectors.used + costs.used) - s.shared_bytes;
    if (s.shared_bytes <= int64_t(device.shared)) return s;
  }
  throw std::runtime_error("sfr_ext: " + std::to_string(N) + " x " + std::to_string(M) +
                           " patches do not fit on this GPU with the strategy that was asked for");
}

}  // namespace

template <class T>
int64_t exact_forward(const ExactForwardParams& p, const Where& where) {
  const OnDevice on(where.device);
  Arena vectors, costs;
  T* cost;
  place<T>(p, vectors, costs, cost);
  const ProblemLayout layout = choose_exact(p.N, p.M, vectors, costs, where.strategy, limits(where.device));
  return launch_items<ExactForwardParams>(exact_forward_kernel<T>, p, {}, layout, p.B * p.G, where);
}

template <class T>
int64_t exact_backward(const ExactBackwardParams& p, const Where& where) {
  const OnDevice on(where.device);
  ProblemLayout layout;
  layout.threads = most_warps * warp_threads;
  layout.shared_bytes = buffer_entries * int64_t(sizeof(T));
  return launch_items<ExactBackwardParams>(exact_backward_kernel<T>, p, {}, layout, p.B * p.G, where);
}

template <class T>
int64_t assignment_forward(const AssignmentForwardParams& p, const Where& where) {
  const OnDevice on(where.device);
  Arena vectors, costs;
  T* cost;
  Matching<T> most;
  place_matching<T>(p, vectors, costs, cost, most);
  const ProblemLayout layout = choose_exact(p.N, p.M, vectors, costs, where.strategy, limits(where.device));
  return launch_items<AssignmentForwardParams>(assignment_forward_kernel<T>, p, {}, layout, p.B * p.G, where);
}

template int64_t assignment_forward<SFR_REAL>(const AssignmentForwardParams&, const Where&);
template int64_t exact_forward<SFR_REAL>(const ExactForwardParams&, const Where&);
template int64_t exact_backward<SFR_REAL>(const ExactBackwardParams&, const Where&);

}  // namespace sfr::cuda

// The extension module: a table of contents. Tensors arrive as addresses with sizes and strides; shapes, types
// and options have been checked by sfr_ext/checks.py. The GIL is released while kernels run.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <tuple>

#include "contracts/cost.h"
#include "contracts/emd.h"
#include "contracts/exact.h"
#include "contracts/sinkhorn.h"
#include "cpu/dispatch.h"
#ifdef SFR_CUDA
#include "cuda/cuda.h"
#include "cuda/runtime.h"
#endif

namespace py = pybind11;

namespace {

using sfr::DType;
using Address = uintptr_t;
using FeatureTuple = std::tuple<Address, int, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t>;
using WeightTuple = std::tuple<Address, int64_t, int64_t, int64_t>;
using CostTuple = std::tuple<Address, int, int64_t, int64_t, int64_t, int64_t>;

void* pointer(Address address) {
  return reinterpret_cast<void*>(address);
}

// (address, dtype, H, W, stride_b, stride_g, stride_c, stride_h, stride_w)
sfr::FeatureView features(const FeatureTuple& t) {
  sfr::FeatureView view;
  int dtype;
  Address address;
  std::tie(address, dtype, view.H, view.W, view.stride_b, view.stride_g, view.stride_c, view.stride_h, view.stride_w) =
      t;
  view.data = pointer(address);
  view.dtype = DType(dtype);
  return view;
}

// (address, stride_b, stride_g, stride_n)
sfr::WeightView weights(const WeightTuple& t) {
  return {pointer(std::get<0>(t)), std::get<1>(t), std::get<2>(t), std::get<3>(t)};
}

// (B, G, C, patch, metric, compute, threads)
void set(sfr::CostParams& p, const std::array<int64_t, 7>& sizes, const FeatureTuple& x, const FeatureTuple& y) {
  p.B = sizes[0], p.G = sizes[1], p.C = sizes[2], p.patch = sizes[3];
  p.metric = sfr::Metric(sizes[4]), p.compute = DType(sizes[5]), p.threads = int(sizes[6]);
  p.x = features(x), p.y = features(y);
}

// (B, G, N, M, compute, threads); (address, dtype, stride_b, stride_g, stride_n, stride_m)
void set(sfr::SinkhornParams& p, const std::array<int64_t, 6>& sizes, const CostTuple& cost) {
  p.B = sizes[0], p.G = sizes[1], p.N = sizes[2], p.M = sizes[3];
  p.compute = DType(sizes[4]), p.threads = int(sizes[5]);
  Address address;
  int dtype;
  std::tie(address, dtype, p.stride_b, p.stride_g, p.stride_n, p.stride_m) = cost;
  p.cost = pointer(address), p.cost_dtype = DType(dtype);
}

// eps, relative, tol, max_iter, reach_a, reach_b, symmetric, method, eps_given
using Options = std::tuple<double, bool, double, int64_t, double, double, bool, int, Address>;
// transport, entropic, f, g, eps, mean, n_iter, error
using Outputs = std::array<Address, 8>;
// f, g, eps, mean, grad_transport, grad_entropic, grad_eps, grad_a, grad_b, grad_eps_given
using Backward = std::array<Address, 10>;

void set(sfr::Solve& s, const Options& options, const WeightTuple& a, const WeightTuple& b) {
  int method;
  Address eps_given;
  sfr::SolverOptions& o = s.options;
  std::tie(o.eps, o.relative, o.tol, o.max_iter, o.reach_a, o.reach_b, o.symmetric, method, eps_given) = options;
  o.method = sfr::Method(method);
  s.eps_given = pointer(eps_given);
  s.a = weights(a), s.b = weights(b);
}

void set(sfr::Solve& s, Address init_g, const Outputs& out) {
  s.init_g = pointer(init_g);
  s.transport = pointer(out[0]), s.entropic = pointer(out[1]), s.f = pointer(out[2]), s.g = pointer(out[3]);
  s.eps = pointer(out[4]), s.mean = pointer(out[5]), s.n_iter = static_cast<int64_t*>(pointer(out[6]));
  s.error = pointer(out[7]);
}

void set(sfr::SolveGrad& s, const Backward& in) {
  s.f = pointer(in[0]), s.g = pointer(in[1]), s.eps = pointer(in[2]), s.mean = pointer(in[3]);
  s.grad_transport = pointer(in[4]), s.grad_entropic = pointer(in[5]);
  s.grad_eps = pointer(in[6]), s.grad_a = pointer(in[7]), s.grad_b = pointer(in[8]);
  s.grad_eps_given = pointer(in[9]);
}

sfr::CostForwardParams cost_forward_params(const std::array<int64_t, 7>& sizes, const FeatureTuple& x,
                                           const FeatureTuple& y, Address cost) {
  sfr::CostForwardParams p;
  set(p, sizes, x, y);
  p.cost = pointer(cost);
  return p;
}

sfr::CostBackwardParams cost_backward_params(const std::array<int64_t, 7>& sizes, const FeatureTuple& x,
                                             const FeatureTuple& y, Address cost, Address grad_cost,
                                             const FeatureTuple& grad_x, const FeatureTuple& grad_y) {
  sfr::CostBackwardParams p;
  set(p, sizes, x, y);
  p.cost = pointer(cost), p.grad_cost = pointer(grad_cost);
  p.grad_x = features(grad_x), p.grad_y = features(grad_y);
  return p;
}

sfr::SinkhornForwardParams sinkhorn_forward_params(const std::array<int64_t, 6>& sizes, const CostTuple& cost,
                                                   const WeightTuple& a, const WeightTuple& b, const Options& options,
                                                   Address init_g, const Outputs& out) {
  sfr::SinkhornForwardParams p;
  set(p, sizes, cost);
  set(p.solve, options, a, b);
  set(p.solve, init_g, out);
  return p;
}

sfr::SinkhornBackwardParams sinkhorn_backward_params(const std::array<int64_t, 6>& sizes, const CostTuple& cost,
                                                     const WeightTuple& a, const WeightTuple& b, const Options& options,
                                                     const Backward& in, Address grad_cost) {
  sfr::SinkhornBackwardParams p;
  set(p, sizes, cost);
  set(p.solve, options, a, b);
  set(p.solve, in);
  p.grad_cost = pointer(grad_cost);
  return p;
}

sfr::EmdForwardParams emd_forward_params(const std::array<int64_t, 7>& sizes, const FeatureTuple& x,
                                         const FeatureTuple& y, const WeightTuple& a, const WeightTuple& b,
                                         const Options& options, Address init_g, const Outputs& out) {
  sfr::EmdForwardParams p;
  set(p, sizes, x, y);
  set(p.solve, options, a, b);
  set(p.solve, init_g, out);
  return p;
}

sfr::EmdBackwardParams emd_backward_params(const std::array<int64_t, 7>& sizes, const FeatureTuple& x,
                                           const FeatureTuple& y, const WeightTuple& a, const WeightTuple& b,
                                           const Options& options, const Backward& in, const FeatureTuple& grad_x,
                                           const FeatureTuple& grad_y) {
  sfr::EmdBackwardParams p;
  set(p, sizes, x, y);
  set(p.solve, options, a, b);
  set(p.solve, in);
  p.grad_x = features(grad_x), p.grad_y = features(grad_y);
  return p;
}

// (B, G, N, M, compute, threads)
void set(sfr::ExactParams& p, const std::array<int64_t, 6>& sizes, const WeightTuple& a, const WeightTuple& b) {
  p.B = sizes[0], p.G = sizes[1], p.N = sizes[2], p.M = sizes[3];
  p.compute = DType(sizes[4]), p.threads = int(sizes[5]);
  p.a = weights(a), p.b = weights(b);
}

// out: value, f, g, rows, columns, mass, n_iter, gap, error
sfr::ExactForwardParams exact_forward_params(const std::array<int64_t, 6>& sizes, const CostTuple& cost,
                                             const WeightTuple& a, const WeightTuple& b,
                                             const std::array<Address, 9>& out) {
  sfr::ExactForwardParams p;
  set(p, sizes, a, b);
  Address address;
  int dtype;
  std::tie(address, dtype, p.stride_b, p.stride_g, p.stride_n, p.stride_m) = cost;
  p.cost = pointer(address), p.cost_dtype = DType(dtype);
  p.value = pointer(out[0]), p.f = pointer(out[1]), p.g = pointer(out[2]);
  p.rows = static_cast<int32_t*>(pointer(out[3])), p.columns = static_cast<int32_t*>(pointer(out[4]));
  p.mass = pointer(out[5]), p.n_iter = static_cast<int64_t*>(pointer(out[6]));
  p.gap = pointer(out[7]), p.error = pointer(out[8]);
  return p;
}

// in: f, g, rows, columns, mass, grad_value; out: grad_cost, grad_a, grad_b
sfr::ExactBackwardParams exact_backward_params(const std::array<int64_t, 6>& sizes, const WeightTuple& a,
                                               const WeightTuple& b, const std::array<Address, 6>& in,
                                               const std::array<Address, 3>& out) {
  sfr::ExactBackwardParams p;
  set(p, sizes, a, b);
  p.f = pointer(in[0]), p.g = pointer(in[1]);
  p.rows = static_cast<const int32_t*>(pointer(in[2])), p.columns = static_cast<const int32_t*>(pointer(in[3]));
  p.mass = pointer(in[4]), p.grad_value = pointer(in[5]);
  p.grad_cost = pointer(out[0]), p.grad_a = pointer(out[1]), p.grad_b = pointer(out[2]);
  return p;
}

// name(...) on the CPU: the arguments of `params`, to a status.
template <class Params, class... Arguments>
void on_cpu(py::module_& m, const char* name, Params (*params)(Arguments...), sfr::Status (*run)(const Params&)) {
  m.def(name, [params, run](const std::decay_t<Arguments>&... arguments) {
    const Params p = params(arguments...);
    py::gil_scoped_release release;
    return int(run(p));
  });
}

#ifdef SFR_CUDA
// device, stream, strategy, scratch, bytes of scratch
using Place = std::tuple<int, Address, int, Address, int64_t>;

// name(..., place) on a GPU: launches, or returns the bytes of scratch that are missing.
template <class Params, class... Arguments>
void on_gpu(py::module_& m, const char* name, Params (*params)(Arguments...),
            int64_t (*in_float)(const Params&, const sfr::cuda::Where&),
            int64_t (*in_double)(const Params&, const sfr::cuda::Where&)) {
  m.def(name, [params, in_float, in_double](const std::decay_t<Arguments>&... arguments, const Place& place) {
    const Params p = params(arguments...);
    const sfr::cuda::Where where{std::get<0>(place), pointer(std::get<1>(place)),
                                 sfr::cuda::Strategy(std::get<2>(place)), pointer(std::get<3>(place)),
                                 std::get<4>(place)};
    py::gil_scoped_release release;
    return (p.compute == DType::float64 ? in_double : in_float)(p, where);
  });
}
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Kernels of sfr_ext; the contracts are csrc/contracts/*.h.";
  on_cpu(m, "cost_forward", cost_forward_params, sfr::cpu::cost_forward);
  on_cpu(m, "cost_backward", cost_backward_params, sfr::cpu::cost_backward);
  on_cpu(m, "sinkhorn_forward", sinkhorn_forward_params, sfr::cpu::sinkhorn_forward);
  on_cpu(m, "sinkhorn_backward", sinkhorn_backward_params, sfr::cpu::sinkhorn_backward);
  on_cpu(m, "emd_forward", emd_forward_params, sfr::cpu::emd_forward);
  on_cpu(m, "emd_backward", emd_backward_params, sfr::cpu::emd_backward);
  on_cpu(m, "exact_forward", exact_forward_params, sfr::cpu::exact_forward);
  on_cpu(m, "exact_backward", exact_backward_params, sfr::cpu::exact_backward);
  m.def("cpu_isa", sfr::cpu::isa);
  m.def("cpu_isas", sfr::cpu::usable_isas);
#ifdef SFR_CUDA
  py::module_ gpu = m.def_submodule("cuda", "The same on a GPU.");
  on_gpu(gpu, "cost_forward", cost_forward_params, sfr::cuda::cost_forward<float>, sfr::cuda::cost_forward<double>);
  on_gpu(gpu, "cost_backward", cost_backward_params, sfr::cuda::cost_backward<float>, sfr::cuda::cost_backward<double>);
  on_gpu(gpu, "sinkhorn_forward", sinkhorn_forward_params, sfr::cuda::sinkhorn_forward<float>,
         sfr::cuda::sinkhorn_forward<double>);
  on_gpu(gpu, "sinkhorn_backward", sinkhorn_backward_params, sfr::cuda::sinkhorn_backward<float>,
         sfr::cuda::sinkhorn_backward<double>);
  on_gpu(gpu, "emd_forward", emd_forward_params, sfr::cuda::emd_forward<float>, sfr::cuda::emd_forward<double>);
  on_gpu(gpu, "emd_backward", emd_backward_params, sfr::cuda::emd_backward<float>, sfr::cuda::emd_backward<double>);
  on_gpu(gpu, "exact_forward", exact_forward_params, sfr::cuda::exact_forward<float>, sfr::cuda::exact_forward<double>);
  on_gpu(gpu, "exact_backward", exact_backward_params, sfr::cuda::exact_backward<float>,
         sfr::cuda::exact_backward<double>);
  gpu.def("why_unusable", sfr::cuda::why_unusable);
  gpu.def("why_unusable_on", sfr::cuda::why_unusable_on);
#endif
}

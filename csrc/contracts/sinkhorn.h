// Entropic optimal transport between two weighted sets of patches, one problem per cost matrix.
//
//     P_ij = a_i b_j exp((f_i + g_j - C_ij) / eps),    P 1 = a,    P^T 1 = b
//
// or, for a side with a reach, a marginal that may bend: P 1 = a exp(-f / reach), which minimises
//
//     <P, C> + eps KL(P | a b^T) + reach_a KL(P 1 | a) + reach_b KL(P^T 1 | b),    KL(p | q) = sum p ln(p/q) - p + q
//
//   cost      [B, G, N, M]   any strides, float16 | bfloat16 | float32 | float64
//   a         [B, G, N]      weights of the student's side, normalised here to sum to 1 unless the side has a reach;
//                            0 removes the patch
//   b         [B, G, M]      weights of the teacher's side
//   eps_given [B, G]         regularisation of each problem, in units of the cost (optional, instead of eps)
//   init_g    [B, G, M]      potential to start from (optional); f follows from g in half an iteration
//   transport [B, G]         out: <P, C>
//   entropic  [B, G]         out: the minimum, <P, C> + eps KL(P | a b^T) = <a, f> + <b, g>, taken from the dual side,
//                            where an error of the potentials enters squared; <a, f> is reach <a, 1 - exp(-f / reach)>
//                            on a side with a reach, and eps (|a| |b| - |P|) is added
//   f, g      [B, G, N], [B, G, M]   out: potentials *of the centred cost C - mean*; 0 at removed patches
//   eps       [B, G]         out: regularisation used, in units of the cost
//   mean      [B, G]         out: mean of the cost under a (x) b; public potentials are f + mean/2, g + mean/2
//   n_iter    [B, G]         out: iterations that this problem took: updates of both potentials, or steps of the
//                            conjugate gradients inside a Newton step, which cost as much
//   error     [B, G]         out: |P 1 - a|_1 + |P^T 1 - b|_1 of the plan of the returned potentials; with a reach,
//                            the bent marginals stand for a and b, and the sum is in units of the plan's mass
//
// Centring: costs of unit vectors lie near 1.41 with a spread of 0.03, and float32 would round C/eps there by
// 1e-4; the centred cost loses nothing.
//
// Saved for backward: f, g, eps, mean. The plan is recomputed: B (N + M) numbers instead of B N M.
// Backward, transport value V = <P, C> (the plan moves too): with k = P / (a b^T), solve
//     (1 + s_a) diag(P 1) alpha + P beta = -(P * ln k) 1 - diag(P 1) f / reach_a,    s_a = eps / reach_a,
//     P^T alpha + (1 + s_b) diag(P^T 1) beta = -(P * ln k)^T 1 - diag(P^T 1) g / reach_b
// by conjugate gradients on the Schur complement; then
//     dV/dC = P * (1 + ln k + alpha + beta),    dV/da = (1 + s_a) exp(-f / reach_a) (f + eps alpha),   likewise b,
//     dV/deps = <dV/dC - P, ln k>.
// Entropic value: dE/dC = P, dE/deps = <P, ln k> - |P| + |a| |b|, dE/da = f, or with a reach
//     dE/da = reach_a (1 - exp(-f / reach_a)) - eps exp(-f / reach_a) + eps |b|.
// With a relative eps both get the terms through eps = s std(C).
// std = 0 (all costs equal): P = a b^T, eps = 0, and no eps term; with a reach s |mean| stands for eps, or s reach
// where all costs are 0.
//
// A symmetric problem, that of a set of patches with itself (C = C^T, a = b), has f = g, and takes the mean of f and
// its update: where the kernel exp(-C / eps) is positive, which it is for all our metrics, that halves the error.
//
// A problem with a NaN or Inf in it has NaN everywhere, and error NaN; no other problem notices.
// Sums in float32 (float64 for float64), in an order fixed by the problem's own shape: same input, same bits,
// whatever the batch and the number of threads.
#pragma once

#include "types.h"

namespace sfr {

// How a problem is iterated on, numbered as in sfr_ext/ops. What is not automatic is there to be measured against.
enum class Method : int32_t {
  automatic = 0,  // over-relaxed iterations, then Newton steps
  relaxed = 1,    // over-relaxed iterations
  plain = 2,      // Sinkhorn's own
};

struct SolverOptions {
  double eps = 0.05;
  bool relative = true;  // eps in units of the standard deviation of the cost under a (x) b
  double tol = 1e-3;
  int64_t max_iter = 1000;
  double reach_a = 0, reach_b = 0;  // in units of the cost; 0: the marginal is met
  bool symmetric = false;
  Method method = Method::automatic;
};

// What a solve takes beside its costs, and what it returns; all outputs contiguous, in the accumulator type.
struct Solve {
  SolverOptions options;
  WeightView a, b;
  const void* eps_given = nullptr;  // contiguous
  const void* init_g = nullptr;     // contiguous, of the cost itself, not centred
  void *transport = nullptr, *entropic = nullptr, *f = nullptr, *g = nullptr;
  void *eps = nullptr, *mean = nullptr, *error = nullptr;
  int64_t* n_iter = nullptr;
};

// The same for backward: f, g, eps, mean of Solve are read, not written.
struct SolveGrad : Solve {
  const void *grad_transport = nullptr, *grad_entropic = nullptr;  // [B, G]; absent: 0
  const void* grad_eps = nullptr;             // [B, G] of the relative eps that was used; absent: 0
  void *grad_a = nullptr, *grad_b = nullptr;  // [B, G, N], [B, G, M] out; absent: not wanted
  void* grad_eps_given = nullptr;             // [B, G] out; absent: not wanted
};

struct SinkhornParams {
  int64_t B = 0, G = 0, N = 0, M = 0;
  DType compute = DType::float32;
  const void* cost = nullptr;
  DType cost_dtype = DType::float32;
  int64_t stride_b = 0, stride_g = 0, stride_n = 0, stride_m = 0;
  int threads = 1;
};

struct SinkhornForwardParams : SinkhornParams {
  Solve solve;
};

struct SinkhornBackwardParams : SinkhornParams {
  SolveGrad solve;
  void* grad_cost = nullptr;  // [B, G, N, M] out, contiguous, of the accumulator type; absent: not wanted
};

namespace cpu {
Status sinkhorn_forward(const SinkhornForwardParams&);
Status sinkhorn_backward(const SinkhornBackwardParams&);
}  // namespace cpu

}  // namespace sfr

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
//   transport [B, G]         out: <P, C>; without a reach over the plan's mass, which is 1 at convergence
//   entropic  [B, G]         out: the minimum, <P, C> + eps KL(P | a b^T) = <a, f> + <b, g>, taken from the dual side,
//                            where an error of the potentials enters squared; <a, f> is reach <a, 1 - exp(-f / reach)>
//                            on a side with a reach, and eps (|a| |b| - |P|) is added
//   f, g      [B, G, N], [B, G, M]   out: potentials *of the cost C - centre*; 0 at removed patches
//   eps       [B, G]         out: regularisation used, in units of the cost. Larger than asked for where the type does
//                            not hold the potentials of a smaller one, or where max_iter ended before
//   centre    [B, G]         out: the least cost between patches that are kept
//   shift     [B, G]         out: public potentials are f + centre/2 + shift, g + centre/2 - shift. 0 without a reach;
//                            with one it grows with the reach where the masses differ, and would round the potentials
//                            away
//   excess    [B, G]         out: |P| - |a| |b| of the plan of the returned potentials: with f and g it makes an
//   entropic
//                            value of more digits than the type has
//   n_iter    [B, G]         out: iterations that this problem took: updates of both potentials, or steps of the
//                            conjugate gradients inside a Newton step, which cost as much
//   error     [B, G]         out: |P 1 - a|_1 + |P^T 1 - b|_1 of the plan of the returned potentials; with a reach,
//                            the bent marginals stand for a and b, and the sum is in units of the plan's mass
//
// Centring: costs of unit vectors lie near 1.41 with a spread of 0.03, and float32 would round C/eps there by
// 1e-4; the centred cost loses nothing. The centre is the least cost, which no large one moves.
//
// Saved for backward: f, g, eps, centre, shift. The plan is recomputed: B (N + M) numbers instead of B N M.
// Backward, transport value V = <P, C> (the plan moves too): with k = P / (a b^T), solve
//     (1 + s_a) diag(P 1) alpha + P beta = -(P * ln k) 1 - diag(P 1) f / reach_a,    s_a = eps / reach_a,
//     P^T alpha + (1 + s_b) diag(P^T 1) beta = -(P * ln k)^T 1 - diag(P^T 1) g / reach_b
// by conjugate gradients on the Schur complement; then
//     dV/dC = P * (1 + ln k + alpha + beta),    dV/da = (1 + s_a) exp(-f / reach_a) (f + eps alpha),   likewise b,
//     dV/deps = <dV/dC - P, ln k>.
// Entropic value: dE/dC = P, dE/deps = <P, ln k> - |P| + |a| |b|, dE/da = f, or with a reach
//     dE/da = reach_a (1 - exp(-f / reach_a)) - eps exp(-f / reach_a) + eps |b|.
// With a relative eps both get the terms through eps = s std(C).
// std = 0 (all costs equal): P = a b^T, eps = 0, and no eps term; with a reach or forbidden pairs s |mean| stands for
// eps, with its term, or s reach where all costs are 0.
//
// A cost of +inf forbids a pair: P_ij = 0, and mean and std are taken over the others, with a_i b_j normalised there.
// Where that leaves a patch without a pair that may not be left behind, both values and the error are inf, all else is
// 0, and so are the gradients; centre inf marks it. Costs of features are finite, or the problem is broken.
//
// A symmetric problem, that of a set of patches with itself (C = C^T, a = b), has f = g, and takes the mean of f and
// its update: where the kernel exp(-C / eps) is positive, which it is for all our metrics, that halves the error.
//
// An empty problem, all of whose weights on a side are 0, has 0 everywhere.
// A problem with a NaN or -inf in it has NaN everywhere, and error NaN; no other problem notices.
// Sums in float32 (float64 for float64), in an order fixed by the problem's own shape: same input, same bits,
// whatever the batch and the number of threads.
#pragma once

#include "types.h"

namespace sfr {

// How a problem is iterated on. What is not automatic is there to be measured against.
//   automatic   over-relaxed iterations, then Newton steps
//   relaxed     over-relaxed iterations
//   plain       Sinkhorn's own
#define SFR_METHODS(ONE) ONE(automatic) ONE(relaxed) ONE(plain)
SFR_CHOICES(Method, SFR_METHODS)

//   relative    eps is in units of the standard deviation of the cost under a (x) b
//   reach       in units of the cost; 0: the marginal is met
#define SFR_SOLVER_OPTIONS(FIELD) \
  FIELD(double, eps, 0.05)        \
  FIELD(bool, relative, true)     \
  FIELD(double, reach_a, 0)       \
  FIELD(double, reach_b, 0)       \
  FIELD(double, tol, 1e-4)        \
  FIELD(int64_t, max_iter, 1000)  \
  FIELD(bool, symmetric, false)   \
  FIELD(Method, method, Method::automatic)
struct SolverOptions {
  SFR_FIELDS(SolverOptions, SFR_SOLVER_OPTIONS)
};

// All contiguous, in the accumulator type. Backward reads f, g, eps, centre and shift again, and is given no others.
#define SFR_SOLVED(FIELD)          \
  FIELD(void*, transport, nullptr) \
  FIELD(void*, entropic, nullptr)  \
  FIELD(void*, f, nullptr)         \
  FIELD(void*, g, nullptr)         \
  FIELD(void*, eps, nullptr)       \
  FIELD(void*, centre, nullptr)    \
  FIELD(void*, shift, nullptr)     \
  FIELD(void*, excess, nullptr)    \
  FIELD(int64_t*, n_iter, nullptr) \
  FIELD(void*, error, nullptr)
struct Solved {
  SFR_FIELDS(Solved, SFR_SOLVED)
};

// What a solve takes beside its costs, and what it returns. eps_given and init_g (of the cost itself, not centred) are
// contiguous.
#define SFR_SOLVE(FIELD, BASE)           \
  BASE(Solved, solved)                   \
  FIELD(SolverOptions, options, {})      \
  FIELD(WeightView, a, {})               \
  FIELD(WeightView, b, {})               \
  FIELD(const void*, eps_given, nullptr) \
  FIELD(const void*, init_g, nullptr)
struct Solve : Solved {
  SFR_DERIVED_FIELDS(Solve, SFR_SOLVE)
};

// The same for backward. Upstream gradients [B, G], 0 where they are absent: of both values, and of the relative eps
// that was used. Out, where wanted: grad_a [B, G, N], grad_b [B, G, M], grad_eps_given [B, G].
#define SFR_SOLVE_GRAD(FIELD, BASE)           \
  BASE(Solve, solve)                          \
  FIELD(const void*, grad_transport, nullptr) \
  FIELD(const void*, grad_entropic, nullptr)  \
  FIELD(const void*, grad_eps, nullptr)       \
  FIELD(void*, grad_a, nullptr)               \
  FIELD(void*, grad_b, nullptr)               \
  FIELD(void*, grad_eps_given, nullptr)
struct SolveGrad : Solve {
  SFR_DERIVED_FIELDS(SolveGrad, SFR_SOLVE_GRAD)
};

#define SFR_SINKHORN_PARAMS(FIELD)      \
  FIELD(int64_t, B, 0)                  \
  FIELD(int64_t, G, 0)                  \
  FIELD(int64_t, N, 0)                  \
  FIELD(int64_t, M, 0)                  \
  FIELD(DType, compute, DType::float32) \
  FIELD(CostView, cost, {})             \
  FIELD(int, threads, 1)
struct SinkhornParams {
  SFR_FIELDS(SinkhornParams, SFR_SINKHORN_PARAMS)
};

#define SFR_SINKHORN_FORWARD(FIELD, BASE) BASE(SinkhornParams, problem) FIELD(Solve, solve, {})
struct SinkhornForwardParams : SinkhornParams {
  SFR_DERIVED_FIELDS(SinkhornForwardParams, SFR_SINKHORN_FORWARD)
};

// grad_cost: [B, G, N, M] out, contiguous, of the accumulator type; absent: not wanted.
#define SFR_SINKHORN_BACKWARD(FIELD, BASE) \
  BASE(SinkhornParams, problem)            \
  FIELD(SolveGrad, solve, {})              \
  FIELD(void*, grad_cost, nullptr)
struct SinkhornBackwardParams : SinkhornParams {
  SFR_DERIVED_FIELDS(SinkhornBackwardParams, SFR_SINKHORN_BACKWARD)
};

}  // namespace sfr

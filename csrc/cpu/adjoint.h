// Backward of one solved problem: from the gradients of its two values to those of its costs and weights.
#pragma once

#include "system.h"

namespace sfr::cpu::SFR_ISA {

// ln P_ij / (a_i b_j) = ln2 (F_i - log2 a_i + G_j - log2 b_j - S_ij) is read off the potentials; these are the
// potentials without the marginals, with 0 in the padding.
template <class T>
struct Adjoint {
  PlanSystem<T>* system = nullptr;
  Plan<T>* plan = nullptr;
  T *phi = nullptr, *gamma = nullptr;  // [rows.size], [ld] (F - log2 a) ln2, (G - log2 b) ln2

  void reserve(Arena& arena, PlanSystem<T>& of, int64_t n, int64_t m) {
    system = &of;
    plan = of.plan;
    phi = arena.take<T>(whole_vectors<T>(n));
    gamma = arena.take<T>(padded<T>(m));
  }

  void set() {
    const auto bare = [](const Margin<T>& side, T* out) {
      for (int64_t i = 0; i < side.size; ++i)
        out[i] = i < side.count ? (side.log[i] - side.log_weight[i]) * T(ln2) : T(0);
    };
    bare(plan->rows, phi);
    bare(plan->columns, gamma);
  }

  // ln P / (a b) at row i, columns j ...
  SFR_INLINE Vec<T> log_ratio(int64_t i, int64_t j) const {
    const Vec<T> centred = load(plan->cost + i * plan->ld + j) - plan->mean;
    return phi[i] + load(gamma + j) - centred * (plan->factor * T(ln2));
  }
};

// Gradients of one problem's values, and the sums that the weights' gradients need.
template <class T>
struct Upstream {
  T transport = 0, entropic = 0;
};

// d/dC into plan.P, and d/da, d/db (before normalisation of the weights) into grad_a, grad_b. `relative`: eps is
// `options_eps` standard deviations of the cost.
template <class T>
void adjoint_backward(const Team& team, Adjoint<T>& adjoint, Upstream<T> up, T eps, bool relative, T options_eps,
                      T* grad_a, T* grad_b) {
  constexpr int L = lanes<T>;
  Plan<T>& plan = *adjoint.plan;
  const Evaluation<T> evaluation = evaluate<From::potentials>(team, plan);
  if (team.rank == 0) adjoint.set();
  team.barrier();
  PlanSystem<T>& system = *adjoint.system;
  if (up.transport != 0) {
    // The plan moves: h = -(P * ln k) 1, k = -(P * ln k)^T 1.
    gather(
        team, plan, [&](int64_t i, int64_t j, Vec<T> p) { return p > 0 ? -p * adjoint.log_ratio(i, j) : Vec<T>{}; },
        system.h, system.k);
    solve_system(team, system, sizeof(T) == 4 ? T(1e-6) : T(1e-13), 4 * plan.columns.count + 20);
  } else if (team.rank == 0) {
    std::memset(system.alpha, 0, sizeof(T) * plan.rows.size);
    std::memset(system.beta, 0, sizeof(T) * plan.ld);
  }
  team.barrier();

  // G = P (transport (1 + ln k + alpha + beta) + entropic), and <G, C - mean>.
  team.blocks(plan.blocks(), [&](int64_t b) {
    Vec<T> moment{};
    for (int64_t i = b * plan.block(); i < plan.block_end(b) && i < plan.rows.count; ++i)
      for (int64_t j = 0; j < plan.ld; j += L) {
        const Vec<T> p = load(plan.P + i * plan.ld + j);
        const Vec<T> slope = 1 + adjoint.log_ratio(i, j) + system.alpha[i] + load(system.beta + j);
        const Vec<T> g = p > 0 ? p * (up.transport * slope + up.entropic) : Vec<T>{};
        moment += g * (load(plan.cost + i * plan.ld + j) - plan.mean);
        store(plan.P + i * plan.ld + j, g);
      }
    plan.row_part[b] = sum_lanes<T>(moment);
  });
  team.barrier();
  if (team.rank == 0) {
    for (int64_t i = 0; i < plan.rows.count; ++i)
      grad_a[i] = eps * ((up.transport + up.entropic) * adjoint.phi[i] + up.transport * system.alpha[i]);
    for (int64_t j = 0; j < plan.columns.count; ++j)
      grad_b[j] = eps * ((up.transport + up.entropic) * adjoint.gamma[j] + up.transport * system.beta[j]);
  }
  if (!relative || eps == 0) {
    team.barrier();
    return;
  }

  // Through eps = s std(C): d./deps by homogeneity, then deps/dC = s a_i b_j (C_ij - mean) / std,
  // deps/da_i = s sum_j b_j (C_ij - mean)^2 / (2 std), with s / std = s^2 / eps.
  T entropic = 0;
  for (int64_t i = 0; i < plan.rows.count; ++i) entropic += plan.rows.weight[i] * adjoint.phi[i];
  for (int64_t j = 0; j < plan.columns.count; ++j) entropic += plan.columns.weight[j] * adjoint.gamma[j];
  const T slope =
      (up.transport * evaluation.centred + up.entropic * entropic * eps - sum_parts(plan.row_part, plan.blocks())) /
      eps;
  const T pull = slope * options_eps * options_eps / eps;
  team.barrier();
  team.blocks(plan.blocks(), [&](int64_t b) {
    T* partial = plan.partial + b * plan.ld;
    for (int64_t j = 0; j < plan.ld; j += L) store(partial + j, Vec<T>{});
    for (int64_t i = b * plan.block(); i < plan.block_end(b) && i < plan.rows.count; ++i) {
      const T a = plan.rows.weight[i];
      Vec<T> row{};
      for (int64_t j = 0; j < plan.ld; j += L) {
        T* P = plan.P + i * plan.ld + j;
        const Vec<T> centred = load(plan.cost + i * plan.ld + j) - plan.mean;
        const Vec<T> weight = load(plan.columns.weight + j) - load(plan.columns.bias + j);
        store(P, load(P) + pull * a * weight * centred);
        row += weight * centred * centred;
        store(partial + j, load(partial + j) + a * centred * centred);
      }
      grad_a[i] += pull / 2 * sum_lanes<T>(row);
    }
  });
  team.barrier();
  team.blocks(plan.column_blocks(), [&](int64_t b) {
    for_columns(plan, b, [&](int64_t j) {
      const Vec<T> sum = column_sum(plan, j);
      for (int k = 0; k < L && j + k < plan.columns.count; ++k) grad_b[j + k] += pull / 2 * sum[k];
    });
  });
  team.barrier();
}

}  // namespace sfr::cpu::SFR_ISA

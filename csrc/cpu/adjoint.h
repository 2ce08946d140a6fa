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

// Gradients of what one problem returned.
template <class T>
struct Upstream {
  T transport = 0, entropic = 0, eps = 0;
};

// d/da of the two values, before normalisation of the weights; `other` is the sum of the other side's weights.
template <class T>
void weight_gradient(const Margin<T>& side, const T* phi, const T* alpha, Upstream<T> up, T eps, T mean, T other,
                     T* out) {
  for (int64_t i = 0; i < side.count; ++i) {
    if (side.soft == 0) {
      out[i] = eps * ((up.transport + up.entropic) * phi[i] + up.transport * alpha[i]);
      continue;
    }
    const T f = eps * phi[i] + mean / 2, reach = eps / side.soft, kept = exponential(-f / reach);
    out[i] = up.transport * side.gain() * kept * (f + eps * alpha[i]) +
             up.entropic * (reach * -exponential_minus_1(-f / reach) - eps * (kept - other));
  }
}

// Through eps = s std(C): deps/dC = s a_i b_j (C_ij - mean) / std, deps/da_i = s sum_j b_j (C_ij - mean)^2 / (2 std),
// with normalised weights; `pull` is d/deps times s / std. Added to plan.P, grad_a and grad_b.
template <class T>
void spread_backward(const Team& team, Adjoint<T>& adjoint, T pull, T* grad_a, T* grad_b) {
  constexpr int L = lanes<T>;
  Plan<T>& plan = *adjoint.plan;
  T *rows = adjoint.system->h, *columns = adjoint.system->k;  // no longer needed
  const T unit = 1 / (plan.rows.total * plan.columns.total);
  team.blocks(plan.blocks(), [&](int64_t b) {
    T* partial = plan.partial + b * plan.ld;
    for (int64_t j = 0; j < plan.ld; j += L) store(partial + j, Vec<T>{});
    for (int64_t i = b * plan.block(); i < plan.block_end(b) && i < plan.rows.count; ++i) {
      const T a = plan.rows.weight[i] * unit;
      Vec<T> row{};
      for (int64_t j = 0; j < plan.ld; j += L) {
        T* P = plan.P + i * plan.ld + j;
        const Vec<T> centred = load(plan.cost + i * plan.ld + j) - plan.mean;
        const Vec<T> weight = load(plan.columns.weight + j) - load(plan.columns.bias + j);
        store(P, load(P) + pull * a * weight * centred);
        row += weight * centred * centred;
        store(partial + j, load(partial + j) + a * centred * centred);
      }
      rows[i] = pull / 2 * sum_lanes<T>(row) / plan.columns.total;
    }
  });
  team.barrier();
  team.blocks(plan.column_blocks(), [&](int64_t b) {
    for_columns(plan, b, [&](int64_t j) {
      store(columns + j, pull / 2 * plan.columns.total * (column_sum(plan, j) - load(plan.columns.bias + j)));
    });
  });
  team.barrier();
  // The sum of weights that are not normalised does not matter to std.
  const auto add = [](const Margin<T>& side, const T* slope, T* grad) {
    T along = 0;
    for (int64_t i = 0; side.soft > 0 && i < side.count; ++i) along += side.weight[i] / side.total * slope[i];
    for (int64_t i = 0; i < side.count; ++i) grad[i] += (slope[i] - along) / side.total;
  };
  if (team.rank == 0) {
    add(plan.rows, rows, grad_a);
    add(plan.columns, columns, grad_b);
  }
  team.barrier();
}

// d/dC into plan.P, and d/da, d/db (before normalisation of the weights) into grad_a, grad_b. `relative`: eps is
// `options_eps` standard deviations of the cost. Returns d/deps, without what comes from upstream.
template <class T>
T adjoint_backward(const Team& team, Adjoint<T>& adjoint, Upstream<T> up, T eps, bool relative, T options_eps,
                   T* grad_a, T* grad_b) {
  constexpr int L = lanes<T>;
  Plan<T>& plan = *adjoint.plan;
  const Evaluation<T> evaluation = evaluate<From::potentials>(team, plan);
  if (team.rank == 0) adjoint.set();
  team.barrier();
  PlanSystem<T>& system = *adjoint.system;
  if (up.transport != 0) {
    // The plan moves: h = -(P * ln k) 1, k = -(P * ln k)^T 1, and less on a side whose marginal gives way.
    gather(
        team, plan, [&](int64_t i, int64_t j, Vec<T> p) { return p > 0 ? -p * adjoint.log_ratio(i, j) : Vec<T>{}; },
        system.h, system.k);
    const auto give_way = [&](const Margin<T>& side, const T* phi, T* h) {
      const T centre = side.offset * T(ln2);
      for (int64_t i = 0; side.soft > 0 && i < side.count; ++i) h[i] -= side.sum[i] * (side.soft * phi[i] + centre);
    };
    if (team.rank == 0) {
      give_way(plan.rows, adjoint.phi, system.h);
      give_way(plan.columns, adjoint.gamma, system.k);
    }
    team.barrier();
    solve_system(team, system, sizeof(T) == 4 ? T(1e-6) : T(1e-13), 4 * plan.columns.count + 20);
  } else if (team.rank == 0) {
    std::memset(system.alpha, 0, sizeof(T) * plan.rows.size);
    std::memset(system.beta, 0, sizeof(T) * plan.ld);
  }
  team.barrier();

  // G = P (transport (1 + ln k + alpha + beta) + entropic), and d/deps = <G - transport P, ln k> + ...
  team.blocks(plan.blocks(), [&](int64_t b) {
    Vec<T> moment{};
    for (int64_t i = b * plan.block(); i < plan.block_end(b) && i < plan.rows.count; ++i)
      for (int64_t j = 0; j < plan.ld; j += L) {
        const Vec<T> p = load(plan.P + i * plan.ld + j);
        const Vec<T> log = adjoint.log_ratio(i, j), slope = log + system.alpha[i] + load(system.beta + j);
        const Vec<T> moved = up.transport * slope + up.entropic;
        moment += p > 0 ? p * moved * log : Vec<T>{};
        store(plan.P + i * plan.ld + j, p > 0 ? p * (up.transport + moved) : Vec<T>{});
      }
    plan.row_part[b] = sum_lanes<T>(moment);
  });
  team.barrier();
  const T masses = plan.rows.total * plan.columns.total;
  const T slope = sum_parts(plan.row_part, plan.blocks()) + up.entropic * (masses - evaluation.mass);
  if (team.rank == 0) {
    weight_gradient(plan.rows, adjoint.phi, system.alpha, up, eps, plan.mean, plan.columns.total, grad_a);
    weight_gradient(plan.columns, adjoint.gamma, system.beta, up, eps, plan.mean, plan.rows.total, grad_b);
  }
  team.barrier();
  if (relative && eps > 0)
    spread_backward(team, adjoint, (slope + up.eps) * options_eps * options_eps / eps, grad_a, grad_b);
  return slope;
}

}  // namespace sfr::cpu::SFR_ISA

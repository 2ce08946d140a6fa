// Backward of one solved problem: from the gradients of its two values to those of its costs and weights.
#pragma once

#include "plan.h"

namespace sfr::cpu::SFR_ISA {

constexpr double ln2 = 0.69314718055994530942;

// ln P_ij / (a_i b_j) = ln2 (F_i - log2 a_i + G_j - log2 b_j - S_ij) is read off the potentials; these are the
// potentials without the marginals, with 0 in the padding.
template <class T>
struct Adjoint {
  Plan<T>* plan = nullptr;
  T *phi = nullptr, *gamma = nullptr;   // [rows.size], [ld] (F - log2 a) ln2, (G - log2 b) ln2
  T *alpha = nullptr, *beta = nullptr;  // the solution, in units of eps
  T *h = nullptr, *k = nullptr;         // right sides
  T *residual = nullptr, *direction = nullptr, *product = nullptr, *diagonal = nullptr, *best = nullptr;  // [ld]

  void reserve(Arena& arena, Plan<T>& of, int64_t n, int64_t m) {
    plan = &of;
    for (T** v : {&phi, &alpha, &h}) *v = arena.take<T>(whole_vectors<T>(n));
    for (T** v : {&gamma, &beta, &k, &residual, &direction, &product, &diagonal, &best})
      *v = arena.take<T>(padded<T>(m));
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

// h = -(P * ln k) 1, k = -(P * ln k)^T 1, and the diagonal of the Schur complement
// diag(P^T 1) - P^T diag(1 / (P 1)) P.
template <class T>
void right_sides(const Team& team, Adjoint<T>& adjoint) {
  constexpr int L = lanes<T>;
  Plan<T>& plan = *adjoint.plan;
  // The partial sums of two column vectors: the second goes through the workspace of the first in a second pass.
  const auto gather = [&](auto term, T* rows_out, T* columns_out) {
    team.blocks(plan.blocks(), [&](int64_t b) {
      T* partial = plan.partial + b * plan.ld;
      for (int64_t j = 0; j < plan.ld; j += L) store(partial + j, Vec<T>{});
      for (int64_t i = b * plan.block(); i < plan.block_end(b); i += L) {
        Vec<T> sums[L] = {};
        for (int64_t r = 0; r < L && i + r < plan.rows.count; ++r) {
          Vec<T> sum{};
          for (int64_t j = 0; j < plan.ld; j += L) {
            const Vec<T> x = term(i + r, j, load(plan.P + (i + r) * plan.ld + j));
            sum += x;
            store(partial + j, load(partial + j) + x);
          }
          sums[r] = sum;
        }
        if (rows_out) store(rows_out + i, sum_rows<T>(sums));
      }
    });
    team.barrier();
    team.blocks(plan.column_blocks(), [&](int64_t b) {
      for_columns(plan, b,
                  [&](int64_t j) { store(columns_out + j, column_sum(plan, j) - load(plan.columns.bias + j)); });
    });
    team.barrier();
  };
  gather([&](int64_t i, int64_t j, Vec<T> p) { return p > 0 ? -p * adjoint.log_ratio(i, j) : Vec<T>{}; }, adjoint.h,
         adjoint.k);
  gather([&](int64_t i, int64_t, Vec<T> p) { return p * p * (1 / plan.rows.sum[i]); }, static_cast<T*>(nullptr),
         adjoint.diagonal);
}

// alpha = (h - P beta) / (P 1), and P^T alpha in the plan's partial sums. No h: 0.
template <class T>
void eliminate(const Team& team, Adjoint<T>& adjoint, const T* beta, const T* h, T* alpha) {
  Plan<T>& plan = *adjoint.plan;
  team.blocks(plan.blocks(), [&](int64_t b) {
    product_pair(plan, b, beta, [&](int64_t i, Vec<T> s) {
      s -= load(plan.rows.bias + i);
      const Vec<T> a = ((h ? load(h + i) : Vec<T>{}) - s) / load(plan.rows.sum + i);
      if (alpha) store(alpha + i, a);
      return a;
    });
  });
  team.barrier();
}

// Solves for beta by conjugate gradients on the Schur complement, preconditioned by its diagonal, from 0, with the
// constant mode projected out. Stops at a relative residual, or when float32 has no more to give; keeps the best.
// Vectors over the columns are short: rank 0 does them.
template <class T>
void solve_adjoint(const Team& team, Adjoint<T>& adjoint) {
  Plan<T>& plan = *adjoint.plan;
  const int64_t m = plan.columns.count, ld = plan.ld;
  constexpr int L = lanes<T>;
  const T goal = sizeof(T) == 4 ? T(1e-6) : T(1e-13);
  constexpr int patience = 12;
  const int64_t limit = 4 * m + 20;
  T *r = adjoint.residual, *p = adjoint.direction, *q = adjoint.product, *d = adjoint.diagonal;

  const auto dot = [&](const T* x, const T* y) {
    Vec<T> sum{};
    for (int64_t j = 0; j < ld; j += L) sum += load(x + j) * load(y + j);
    return sum_lanes<T>(sum);
  };
  const auto project = [&](T* x) {
    Vec<T> sum{};
    for (int64_t j = 0; j < ld; j += L) sum += load(x + j);
    const T mean = sum_lanes<T>(sum) / T(m);
    for (int64_t j = 0; j < m; ++j) x[j] -= mean;
  };
  const auto preconditioned = [&](const T* x) {  // x . D^-1 x
    Vec<T> sum{};
    for (int64_t j = 0; j < ld; j += L) sum += load(x + j) * load(x + j) * load(d + j);
    return sum_lanes<T>(sum);
  };

  right_sides(team, adjoint);
  for (int64_t j = 0; team.rank == 0 && j < ld; ++j) adjoint.beta[j] = 0;
  team.barrier();
  eliminate(team, adjoint, adjoint.beta, adjoint.h, adjoint.alpha);
  T* control = plan.row_part;  // rank 0 tells the others whether to go on
  T energy = 0, first = 0, least = 0;
  int64_t stale = 0;
  if (team.rank == 0) {
    for (int64_t j = 0; j < ld; j += L) {
      const Vec<T> pad = load(plan.columns.bias + j), sum = load(plan.columns.sum + j);
      store(r + j, load(adjoint.k + j) - (column_sum(plan, j) - pad));
      const Vec<T> diagonal = sum - load(d + j), floor = sum * T(1e-6);
      store(d + j, 1 / (diagonal > floor ? diagonal : floor));
      store(adjoint.best + j, Vec<T>{});
    }
    project(r);
    for (int64_t j = 0; j < ld; j += L) store(p + j, load(r + j) * load(d + j));
    energy = first = least = preconditioned(r);
    control[0] = first > 0 ? T(1) : T(0);
  }
  team.barrier();
  for (int64_t step = 0; control[0] > 0; ++step) {
    eliminate(team, adjoint, p, static_cast<const T*>(nullptr), static_cast<T*>(nullptr));
    if (team.rank == 0) {
      // eliminate left -P^T diag(1 / P 1) P p in the partial sums.
      for (int64_t j = 0; j < ld; j += L) {
        const Vec<T> pad = load(plan.columns.bias + j);
        store(q + j, (load(plan.columns.sum + j) * load(p + j) + column_sum(plan, j) - pad) * (1 - pad));
      }
      const T curvature = dot(p, q), length = energy / curvature;
      T next = 0;
      const bool sound = curvature > 0 && length > 0;
      if (sound) {
        for (int64_t j = 0; j < ld; j += L) {
          store(adjoint.beta + j, load(adjoint.beta + j) + length * load(p + j));
          store(r + j, load(r + j) - length * load(q + j));
        }
        project(r);
        next = preconditioned(r);
        if (next < least) {
          stale = next < least * T(0.9) ? 0 : stale + 1;
          least = next;
          std::memcpy(adjoint.best, adjoint.beta, sizeof(T) * ld);
        } else {
          ++stale;
        }
        const T ratio = next / energy;
        for (int64_t j = 0; j < ld; j += L) store(p + j, load(r + j) * load(d + j) + ratio * load(p + j));
        energy = next;
      }
      control[0] = sound && next > goal * goal * first && stale < patience && step < limit ? T(1) : T(0);
    }
    team.barrier();
  }
  team.barrier();
  if (team.rank == 0) std::memcpy(adjoint.beta, adjoint.best, sizeof(T) * ld);
  team.barrier();
  eliminate(team, adjoint, adjoint.beta, adjoint.h, adjoint.alpha);
}

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
  const Evaluation<T> evaluation = evaluate(team, plan);
  if (team.rank == 0) adjoint.set();
  team.barrier();
  if (up.transport != 0) {
    solve_adjoint(team, adjoint);
  } else if (team.rank == 0) {
    std::memset(adjoint.alpha, 0, sizeof(T) * plan.rows.size);
    std::memset(adjoint.beta, 0, sizeof(T) * plan.ld);
  }
  team.barrier();

  // G = P (transport (1 + ln k + alpha + beta) + entropic), and <G, C - mean>.
  team.blocks(plan.blocks(), [&](int64_t b) {
    Vec<T> moment{};
    for (int64_t i = b * plan.block(); i < plan.block_end(b) && i < plan.rows.count; ++i)
      for (int64_t j = 0; j < plan.ld; j += L) {
        const Vec<T> p = load(plan.P + i * plan.ld + j);
        const Vec<T> slope = 1 + adjoint.log_ratio(i, j) + adjoint.alpha[i] + load(adjoint.beta + j);
        const Vec<T> g = p > 0 ? p * (up.transport * slope + up.entropic) : Vec<T>{};
        moment += g * (load(plan.cost + i * plan.ld + j) - plan.mean);
        store(plan.P + i * plan.ld + j, g);
      }
    plan.row_part[b] = sum_lanes<T>(moment);
  });
  team.barrier();
  if (team.rank == 0) {
    for (int64_t i = 0; i < plan.rows.count; ++i)
      grad_a[i] = eps * ((up.transport + up.entropic) * adjoint.phi[i] + up.transport * adjoint.alpha[i]);
    for (int64_t j = 0; j < plan.columns.count; ++j)
      grad_b[j] = eps * ((up.transport + up.entropic) * adjoint.gamma[j] + up.transport * adjoint.beta[j]);
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

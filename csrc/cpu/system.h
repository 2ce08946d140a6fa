// The linear system of one plan, which is solved forward (Newton steps) and backward (the plan's own motion):
//
//     diag(P 1) alpha + P beta = h,    P^T alpha + diag(P^T 1) beta = k
//
// Symmetric and positive semi-definite; its null space is the shift (1, -1) of the potentials. A side with a reach has
// its diagonal times 1 + eps / reach, and then there is no null space. alpha is eliminated;
// what is left, diag(P^T 1) - P^T diag(1 / (P 1)) P, is solved by conjugate gradients with a diagonal preconditioner:
// one pair of matrix-vector products a step, as much as an iteration of Sinkhorn's.
#pragma once

#include "plan.h"

namespace sfr::cpu::SFR_ISA {

template <class T>
struct PlanSystem {
  Plan<T>* plan = nullptr;
  T *h = nullptr, *k = nullptr;         // [rows.size], [ld] right sides, 0 in the padding
  T *alpha = nullptr, *beta = nullptr;  // the solution, likewise
  T *residual = nullptr, *direction = nullptr, *product = nullptr, *diagonal = nullptr, *best = nullptr;  // [ld]

  void reserve(Arena& arena, Plan<T>& of, int64_t n, int64_t m) {
    plan = &of;
    for (T** v : {&alpha, &h}) *v = arena.take<T>(whole_vectors<T>(n));
    for (T** v : {&beta, &k, &residual, &direction, &product, &diagonal, &best}) *v = arena.take<T>(padded<T>(m));
  }
};

// Sums over rows and columns of a function of (row, column vector, P there); 0 in the padding.
template <class T, class Term>
void gather(const Team& team, Plan<T>& plan, Term&& term, T* rows_out, T* columns_out) {
  constexpr int L = lanes<T>;
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
    for_columns(plan, b, [&](int64_t j) { store(columns_out + j, column_sum(plan, j) - load(plan.columns.bias + j)); });
  });
  team.barrier();
}

// alpha = (h - P beta) / (P 1), and P^T alpha in the plan's partial sums. No h: 0.
template <class T>
void eliminate(const Team& team, PlanSystem<T>& system, const T* beta, const T* h, T* alpha) {
  Plan<T>& plan = *system.plan;
  team.blocks(plan.blocks(), [&](int64_t b) {
    product_pair(plan, b, beta, [&](int64_t i, Vec<T> s) {
      s -= load(plan.rows.bias + i);
      const Vec<T> a = ((h ? load(h + i) : Vec<T>{}) - s) / (plan.rows.gain() * load(plan.rows.sum + i));
      if (alpha) store(alpha + i, a);
      return a;
    });
  });
  team.barrier();
}

// Solves from 0, with the constant mode projected out, until the residual has fallen by `goal`, or float32 has no more
// to give, or after `limit` steps; keeps the best. Returns the number of steps. Vectors over the columns are short:
// rank 0 does them.
template <class T>
int64_t solve_system(const Team& team, PlanSystem<T>& system, T goal, int64_t limit) {
  Plan<T>& plan = *system.plan;
  const int64_t m = plan.columns.count, ld = plan.ld;
  constexpr int L = lanes<T>;
  constexpr int64_t patience = sizeof(T) == 4 ? 25 : 200;  // steps without progress; float32 soon has no more to give
  T *r = system.residual, *p = system.direction, *q = system.product, *d = system.diagonal;

  const auto dot = [&](const T* x, const T* y) {
    Vec<T> sum{};
    for (int64_t j = 0; j < ld; j += L) sum += load(x + j) * load(y + j);
    return sum_lanes<T>(sum);
  };
  const auto project = [&](T* x) {
    if (plan.soft()) return;
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

  gather(
      team, plan, [&](int64_t i, int64_t, Vec<T> p) { return p * p * (1 / (plan.rows.gain() * plan.rows.sum[i])); },
      static_cast<T*>(nullptr), system.diagonal);
  for (int64_t j = 0; team.rank == 0 && j < ld; ++j) system.beta[j] = 0;
  team.barrier();
  eliminate(team, system, system.beta, system.h, system.alpha);
  T* control = plan.row_part;  // rank 0 tells the others whether to go on
  T energy = 0, first = 0, least = 0;
  int64_t stale = 0;
  if (team.rank == 0) {
    for (int64_t j = 0; j < ld; j += L) {
      const Vec<T> pad = load(plan.columns.bias + j), sum = plan.columns.gain() * load(plan.columns.sum + j);
      store(r + j, load(system.k + j) - (column_sum(plan, j) - pad));
      const Vec<T> diagonal = sum - load(d + j), floor = sum * T(1e-6);
      store(d + j, 1 / (diagonal > floor ? diagonal : floor));
      store(system.best + j, Vec<T>{});
    }
    project(r);
    for (int64_t j = 0; j < ld; j += L) store(p + j, load(r + j) * load(d + j));
    energy = first = least = preconditioned(r);
    control[0] = first > 0 && limit > 0 ? T(1) : T(0);
  }
  team.barrier();
  int64_t step = 0;
  for (; control[0] > 0; ++step) {
    eliminate(team, system, p, static_cast<const T*>(nullptr), static_cast<T*>(nullptr));
    if (team.rank == 0) {
      // eliminate left -P^T diag(1 / P 1) P p in the partial sums.
      for (int64_t j = 0; j < ld; j += L) {
        const Vec<T> pad = load(plan.columns.bias + j);
        const Vec<T> sum = plan.columns.gain() * load(plan.columns.sum + j);
        store(q + j, (sum * load(p + j) + column_sum(plan, j) - pad) * (1 - pad));
      }
      const T curvature = dot(p, q), length = energy / curvature;
      T next = 0;
      const bool sound = curvature > 0 && length > 0;
      if (sound) {
        for (int64_t j = 0; j < ld; j += L) {
          store(system.beta + j, load(system.beta + j) + length * load(p + j));
          store(r + j, load(r + j) - length * load(q + j));
        }
        project(r);
        next = preconditioned(r);
        if (next < least) {
          stale = next < least * T(0.9) ? 0 : stale + 1;
          least = next;
          std::memcpy(system.best, system.beta, sizeof(T) * ld);
        } else {
          ++stale;
        }
        const T ratio = next / energy;
        for (int64_t j = 0; j < ld; j += L) store(p + j, load(r + j) * load(d + j) + ratio * load(p + j));
        energy = next;
      }
      control[0] = sound && next > goal * goal * first && stale < patience && step + 1 < limit ? T(1) : T(0);
    }
    team.barrier();
  }
  team.barrier();
  if (team.rank == 0) std::memcpy(system.beta, system.best, sizeof(T) * ld);
  team.barrier();
  eliminate(team, system, system.beta, system.h, system.alpha);
  return step;
}

}  // namespace sfr::cpu::SFR_ISA

// The passes over the plan of one problem that the solver is made of (../solver/passes.h), in vectors.
#pragma once

#include "../solver/iterations.h"
#include "products.h"

namespace sfr::cpu::SFR_ISA {

// Adds up what the blocks left.
template <class Op = Sum, class T, int K>
void add_parts(const T* parts, int64_t blocks, T (&out)[K]) {
  for (int k = 0; k < K; ++k) out[k] = parts[k];
  for (int64_t b = 1; b < blocks; ++b)
    for (int k = 0; k < K; ++k) out[k] = Op::both(out[k], parts[b * most_parts + k]);
}

template <class Op = Sum, class T, int K>
SFR_INLINE void put_parts(T* parts, int64_t block, const Vec<T> (&sums)[K]) {
  static_assert(K <= most_parts);
  for (int k = 0; k < K; ++k) parts[block * most_parts + k] = Op::template over_lanes<T>(sums[k]);
}

// Exact update of F in the log domain: F_i = log2 a_i - log2 sum_j 2^(G_j - S_ij). `keep`: the exponentials stay in P,
// and what is missing to F in the rows' scalings.
template <class T>
template <bool keep>
void Plan<T>::update_rows() {
  constexpr int L = lanes<T>;
  team.blocks(blocks(), [&](int64_t b) {
    for (int64_t i = b * block(); i < block_end(b); i += L) {
      Vec<T> sums[L] = {};
      T most[L] = {};
      for (int64_t r = 0; r < L; ++r) {
        if (i + r >= rows.count) {
          sums[r][0] = 1;
          continue;
        }
        Vec<T> top = splat<T>(Number<T>::lowest);
        const auto exponent = [&](int64_t j) { return load(columns.log() + j) - centred(i + r, j) * factor; };
        for (int64_t j = 0; j < ld; j += L) top = vmax<T>(top, exponent(j));
        most[r] = max_lanes<T>(top);
        for (int64_t j = 0; j < ld; j += L) {
          const Vec<T> p = exp2<T>(exponent(j) - most[r]);
          if constexpr (keep) store(at(i + r, j), p);
          sums[r] += p;
        }
      }
      if constexpr (keep) {
        store(rows.log() + i, rows.held(-load(most)));
        const Vec<T> sum = sum_rows<T>(sums);
        store(rows.scale() + i, sum > 0 ? load(rows.weight + i) / sum : splat<T>(1));
      } else {
        store(rows.log() + i, rows.updated(log_weight(rows, i), load(most), sum_rows<T>(sums)));
      }
    }
  });
  team.barrier();
}

// Exact update of G: G_j = log2 b_j - log2 sum_i 2^(F_i - S_ij).
template <class T>
void Plan<T>::update_columns() {
  team.blocks(column_blocks(), [&](int64_t b) {
    for_columns(b, [&](int64_t j) {
      const auto exponent = [&](int64_t i) { return rows.log()[i] - centred(i, j) * factor; };
      Vec<T> most = splat<T>(Number<T>::lowest), sum{};
      for (int64_t i = 0; i < rows.count; ++i) most = vmax<T>(most, exponent(i));
      for (int64_t i = 0; i < rows.count; ++i) sum += exp2<T>(exponent(i) - most);
      const Vec<T> start = log_weight(columns, j);
      store(columns.log() + j, bias(columns, j) > 0 ? start : columns.updated(start, most, sum));
    });
  });
  team.barrier();
}

// Both potentials of a symmetric problem become the mean of the rows' and the columns'.
template <class T>
void Plan<T>::average() {
  each_patch_of_rows([&](int64_t i) { rows.log()[i] = columns.log()[i] = (rows.log()[i] + columns.log()[i]) / 2; });
  team.barrier();
}

// L rows of P from row i on, as columns of what is transposed.
template <class T>
void transpose_rows(const Plan<T>& plan, int64_t i) {
  constexpr int L = lanes<T>;
  for (int64_t j = 0; j < plan.columns.count; j += L) {
    Vec<T> square[L];
    for (int r = 0; r < L; ++r) square[r] = load(plan.at(i + r, j));
    transpose<T>(square);
    for (int r = 0; r < L; ++r) store(plan.transposed + (j + r) * plan.rows.stride + i, square[r]);
  }
}

template <class T>
template <From from>
Evaluation<T> Plan<T>::evaluate_from() {
  constexpr int L = lanes<T>;
  constexpr bool exact = from == From::potentials;
  // What the side's sums should be at the potentials and scalings as they are.
  const auto target_now = [](const Marginal<T>& side, int64_t i) {
    if (side.has_reach()) {
      const Vec<T> log = load(side.log() + i) + (exact ? Vec<T>{} : log2<T>(load(side.scale() + i)));
      store(side.reach_target + i, bias(side, i) > 0 ? splat<T>(1) : side.target_under_reach(log_weight(side, i), log));
    }
    return load(side.target() + i);
  };
  // Error, relative error, underflow.
  const auto judge = [](const Marginal<T>& side, Vec<T> sum, Vec<T> target, Vec<T>* found) {
    const T least = side.has_reach() ? Rules<T>::least_mass : T(0);
    const Vec<T> apart = vabs<T>(sum - target);
    const auto matters = (sum > side.nothing()) | (target > side.nothing());
    const auto under = ((sum < target * Rules<T>::least_mass) | (target < sum * least)) & matters;
    found[0] += apart;
    found[1] += matters ? apart / target : Vec<T>{};
    found[2] += under ? splat<T>(1) : Vec<T>{};
  };
  team.blocks(blocks(), [&](int64_t b) {
    T* of_block = partial + b * ld;
    Vec<T> found[5] = {};  // value, mass, and what is judged
    const int64_t begin = b * block(), end = block_end(b);
    for (int64_t j = 0; j < ld; j += L) store(of_block + j, Vec<T>{});
    for (int64_t i = begin; i < end; i += L) {
      Vec<T> sums[L] = {};
      for (int64_t r = 0; r < L && i + r < rows.count; ++r) {
        T* entries = at(i + r, 0);
        const T log = rows.log()[i + r], u = rows.scale()[i + r];
        Vec<T> sum{};
        for (int64_t j = 0; j < ld; j += L) {
          Vec<T> p;
          if constexpr (exact) {
            const Vec<T> c = cost_at(i + r, j);
            p = exp2<T>(log + load(columns.log() + j) - (c - centre) * factor);
            found[0] += p > 0 ? p * c : Vec<T>{};
          } else {
            p = load(entries + j) * (u * load(columns.scale() + j));
          }
          store(entries + j, p);
          sum += p;
          store(of_block + j, load(of_block + j) + p);
        }
        sums[r] = sum;
        found[1] += sum;
      }
      if (small()) transpose_rows(*this, i);
      const Vec<T> s = sum_rows<T>(sums) + bias(rows, i), target = target_now(rows, i);
      store(rows.sum() + i, s);
      judge(rows, s, target, found + 2);
    }
    put_parts(row_parts, b, found);
  });
  team.barrier();
  team.alone().blocks(column_blocks(), [&](int64_t b) {
    Vec<T> found[3] = {};
    for_columns(b, [&](int64_t j) {
      const Vec<T> t = column_sum(j), target = target_now(columns, j);
      store(columns.sum() + j, t);
      judge(columns, t, target, found);
    });
    put_parts(column_parts, b, found);
  });
  team.barrier();
  T of_rows[5], of_columns[3];
  add_parts(row_parts, blocks(), of_rows);
  add_parts(column_parts, column_blocks(), of_columns);
  Evaluation<T> result;
  result.mass = of_rows[1];
  result.value = of_rows[0] / (has_reach() ? T(1) : result.mass);
  result.error = error_of_both(rows, columns, of_rows[2], of_columns[0], result.mass);
  result.relative = of_rows[3] / (T(kept_rows) * rows.gain()) + of_columns[1] / (T(kept_columns) * columns.gain());
  result.underflow = of_rows[4] + of_columns[2] > 0;
  result.exact = exact;
  team.barrier();
  return result;
}

template <class T>
Evaluation<T> Plan<T>::evaluate(From from) {
  // The rows' update has most of the plan already, up to its scalings.
  const bool keep = from == From::columns && !has_reach();
  if (keep)
    update_rows<true>();
  else if (from == From::columns || from == From::halfway)
    update_rows<false>();
  if (from == From::halfway) average();
  if (!keep && from != From::scalings) return evaluate_from<From::potentials>();
  const Evaluation<T> out = evaluate_from<From::scalings>();
  absorb();
  return out;
}

template <class T>
void Plan<T>::absorb() {
  for (const Marginal<T>* side : {&rows, &columns})
    team.alone().blocks((side->stride + block_columns - 1) / block_columns, [&](int64_t b) {
      const int64_t end = least((b + 1) * block_columns, side->stride);
      for (int64_t i = b * block_columns; i < end; i += lanes<T>) {
        store(side->log() + i, load(side->log() + i) + log2<T>(load(side->scale() + i)));
        store(side->scale() + i, splat<T>(1));
      }
    });
  team.barrier();
}

// The rows' half of an iteration, and the columns' sums.
template <bool sample, class T>
ErrorSample<T> scale_rows_of(Plan<T>& plan, T omega) {
  const Marginal<T> rows = plan.rows;
  plan.team.blocks(plan.blocks(), [&](int64_t b) {
    Vec<T> found[3] = {};  // error, mass, at the edge
    product_pair(plan, b, plan.columns.scale(), [&](int64_t i, Vec<T> s) {
      const Vec<T> u = load(rows.scale() + i), a = rows.target_at(i, u), next = relaxed<T>(rows, u, s, a, omega);
      if constexpr (sample) {
        found[0] += vabs<T>(u * s - a);
        found[1] += u * s - bias(rows, i);
        found[2] += is_at_edge<T>(next);
      }
      store(rows.scale() + i, next);
      return next;
    });
    if constexpr (sample) put_parts(plan.row_parts, b, found);
  });
  plan.team.barrier();
  if constexpr (!sample) return {};
  T found[3];
  add_parts(plan.row_parts, plan.blocks(), found);
  return {found[0], found[1], found[2] > 0};
}

template <class T>
ErrorSample<T> Plan<T>::scale_rows(bool sample, T omega) {
  return sample ? scale_rows_of<true>(*this, omega) : scale_rows_of<false>(*this, omega);
}

template <bool sample, class T>
ErrorSample<T> scale_columns_of(Plan<T>& plan, T omega) {
  const Marginal<T> columns = plan.columns;
  plan.team.alone().blocks(plan.column_blocks(), [&](int64_t b) {
    Vec<T> found[2] = {};  // error left, at the edge
    plan.for_columns(b, [&](int64_t j) {
      const Vec<T> v = load(columns.scale() + j), w = columns.target_at(j, v), t = plan.column_sum(j);
      const Vec<T> next = relaxed<T>(columns, v, t, w, omega);
      if constexpr (sample) {
        found[0] += vabs<T>(next * t - columns.target_at(j, next));
        found[1] += is_at_edge<T>(next);
      }
      store(columns.scale() + j, next);
    });
    if constexpr (sample) put_parts(plan.column_parts, b, found);
  });
  plan.team.barrier();
  if constexpr (!sample) return {};
  T found[2];
  add_parts(plan.column_parts, plan.column_blocks(), found);
  return {found[0], T(0), found[1] > 0};
}

template <class T>
ErrorSample<T> Plan<T>::scale_columns(bool sample, T omega) {
  return sample ? scale_columns_of<true>(*this, omega) : scale_columns_of<false>(*this, omega);
}

template <class T>
ErrorSample<T> Plan<T>::scale_halfway(bool sample) {
  team.blocks(blocks(), [&](int64_t b) {
    Vec<T> found[3] = {};  // error, mass, at the edge
    for (int64_t i = b * block(); i < block_end(b); i += lanes<T>) {
      const Vec<T> pad = bias(rows, i), s = row_products<lanes<T>>(at(i, 0), ld, columns.scale()) + pad;
      const Vec<T> v = load(rows.scale() + i), w = rows.target_at(i, v), next = relaxed<T>(rows, v, s, w, T(1));
      found[0] += vabs<T>(v * s - w);
      found[1] += v * s - pad;
      found[2] += is_at_edge<T>(next);
      store(rows.scale() + i, vsqrt<T>(v * next));
    }
    put_parts(row_parts, b, found);
  });
  team.barrier();
  T found[3] = {};
  if (sample) add_parts(row_parts, blocks(), found);
  each_patch_of_rows([&](int64_t i) { columns.scale()[i] = rows.scale()[i]; });
  team.barrier();
  return {found[0], found[1], found[2] > 0};
}

// The rows' step, and P^T of it in the partial sums.
template <class T>
void Plan<T>::eliminate(const T* v, const T* right) {
  team.blocks(blocks(), [&](int64_t b) {
    product_pair(*this, b, v, [&](int64_t i, Vec<T> s) {
      s -= bias(rows, i);
      const Vec<T> sum = load(rows.sum() + i), left = (right ? load(right + i) : Vec<T>{}) - s;
      const Vec<T> step = sum > Rules<T>::nothing ? left / (rows.gain() * sum) : Vec<T>{};
      store(rows.step() + i, step);
      return step;
    });
  });
  team.barrier();
}

template <class T>
template <class RowTerm, class ColumnTerm>
void Plan<T>::gather(RowTerm&& row_term, ColumnTerm&& column_term, T* of_rows, T* of_columns) {
  constexpr int L = lanes<T>;
  team.blocks(blocks(), [&](int64_t b) {
    T* of_block = partial + b * ld;
    for (int64_t j = 0; j < ld; j += L) store(of_block + j, Vec<T>{});
    for (int64_t i = b * block(); i < block_end(b); i += L) {
      Vec<T> sums[L] = {};
      for (int64_t r = 0; r < L && i + r < rows.count; ++r)
        for (int64_t j = 0; j < ld; j += L) {
          const Vec<T> p = load(at(i + r, j));
          sums[r] += row_term(i + r, j, p);
          store(of_block + j, load(of_block + j) + column_term(i + r, j, p));
        }
      if (of_rows) store(of_rows + i, sum_rows<T>(sums));
    }
  });
  team.barrier();
  team.alone().blocks(column_blocks(), [&](int64_t b) {
    for_columns(b, [&](int64_t j) { store(of_columns + j, column_sum(j) - bias(columns, j)); });
  });
  team.barrier();
}

template <class T>
template <class Term>
void Plan<T>::gather_columns(Term&& term, T* of_columns) {
  gather([](int64_t, int64_t, Vec<T>) { return Vec<T>{}; }, term, static_cast<T*>(nullptr), of_columns);
}

template <class T>
template <class Op, int K, class F>
void Plan<T>::reduce_entries(T (&out)[K], F&& f) {
  team.blocks(blocks(), [&](int64_t b) {
    Vec<T> sums[K];
    for (int k = 0; k < K; ++k) sums[k] = Op::template nothing<T>();
    for (int64_t i = b * block(); i < kept_end(b); ++i) {
      Vec<T> row[K];
      for (int k = 0; k < K; ++k) row[k] = Op::template nothing<T>();
      for (int64_t j = 0; j < ld; j += lanes<T>) f(i, j, row);
      for (int k = 0; k < K; ++k) sums[k] = Op::both(sums[k], row[k]);
    }
    put_parts<Op>(row_parts, b, sums);
  });
  team.barrier();
  add_parts<Op>(row_parts, blocks(), out);
  team.barrier();
}

}  // namespace sfr::cpu::SFR_ISA

// The linear system of one plan, which is solved forward (Newton steps) and backward (the plan's own motion):
//
//     diag(P 1) alpha + P beta = h,    P^T alpha + diag(P^T 1) beta = k
//
// Symmetric and positive semi-definite; its null space is the shift (1, -1) of the potentials. A side with a reach has
// its diagonal times 1 + eps / reach, and then there is no null space. alpha is eliminated;
// what is left, diag(P^T 1) - P^T diag(1 / (P 1)) P, is solved by conjugate gradients with a diagonal preconditioner:
// one pair of matrix-vector products a step, as much as an iteration of Sinkhorn's. Where they take much longer than
// factorising it would, it is factorised. h and k are right() of the rows and of the columns, alpha
// and beta their step().
//
// The plan may hold its rows and columns in units of their own: of Q with P_ij = n_i n_j Q_ij it is the same system in
// n_i alpha_i and n_j beta_j, with P 1 / n^2 on the diagonal and h / n on the right (adjoint.h). A patch whose sum is
// next to nothing stays where it is.
#pragma once

#include "passes.h"
#include "strategy.h"

namespace SFR_TARGET {

// x where the plan's sum is one that counts; 0 elsewhere.
template <class T>
SFR_INLINE Vec<T> counted(const Marginal<T>& side, Index i, Vec<T> x) {
  return load(side.sum() + i) > Rules<T>::nothing ? kept(side, i, x) : Vec<T>{};
}

// What solving a system took, in iterations, and whether it was factorised.
struct SystemSteps {
  int64_t taken = 0;
  bool factorised = false;
};

// How far the conjugate gradients have come: the residual's square, weighed, and what it was to fall to.
template <class T>
struct Approach {
  T least = 0, wanted = 0;
  int64_t taken = 0;
};

// From 0, with the constant mode projected out, until the residual has fallen by `goal`, or the type has no more to
// give, or after `limit` steps; leaves the best in best(), and its residual in right(). unit(columns, j): n_j.
template <class T, template <class> class Plan, class Unit>
SFR_FN Approach<T> conjugate_gradients(Plan<T>& plan, T goal, int64_t limit, Unit&& unit) {
  const Marginal<T>&rows = plan.rows, &columns = plan.columns;
  T *r = columns.residual(), *p = columns.direction(), *q = columns.product(), *d = columns.inverse_diagonal();
  T *beta = columns.step(), *best = columns.best();
  T* k = columns.right();  // from the first residual on: that of the best solution
  const T *sum = columns.sum(), row_gain = rows.gain(), gain = columns.gain();

  plan.gather_columns(
      [&](Index i, Index, Vec<T> x) {
        const T whole = row_gain * rows.sum()[i];
        return x > 0 ? x * (x / whole) : Vec<T>{};
      },
      d);
  plan.each_column([&](Index j) { store(beta + j, Vec<T>{}); });
  plan.sync();
  plan.eliminate(beta, rows.right());
  T total[2];  // along the null vector, (1 / n, -1 / n) times the diagonal: the residual, and the vector itself
  plan.template reduce_column_products<Sum>(total, [&](Index j, Vec<T> s, Vec<T>(&sums)[2]) {
    const Vec<T> whole = gain * load(sum + j), diagonal = whole - load(d + j), floor = whole * T(1e-6);
    store(d + j, counted(columns, j, 1 / (diagonal > floor ? diagonal : floor)));
    const Vec<T> residual = kept(columns, j, load(k + j) - s), n = unit(columns, j);
    store(r + j, residual);
    store(best + j, Vec<T>{});
    sums[0] += n * residual;
    sums[1] += kept(columns, j, n * n * load(sum + j));
  });
  const T modes = plan.has_reach() ? Number<T>::infinity : total[1];
  T mean = total[0] / modes, start[1];
  plan.template reduce_columns<Sum>(start, [&](Index j, Vec<T>(&sums)[1]) {
    const Vec<T> residual = kept(columns, j, load(r + j) - mean * (unit(columns, j) * load(sum + j)));
    const Vec<T> first = residual * load(d + j);
    store(r + j, residual);
    store(k + j, residual);
    store(p + j, first);
    sums[0] += residual * first;
  });
  T energy = start[0], least = energy;
  const T wanted = goal * goal * energy;
  int stale = 0;
  int64_t step = 0;
  SFR_ROLLED
  for (bool go = energy > 0 && limit > 0; go; ++step) {
    plan.eliminate(p, static_cast<const T*>(nullptr));
    T dots[3];  // p.q, and the parts of q and r along the null vector
    plan.template reduce_column_products<Sum>(dots, [&](Index j, Vec<T> s, Vec<T>(&sums)[3]) {
      // s is -P^T diag(1 / P 1) P p.
      const Vec<T> direction = load(p + j), product = kept(columns, j, gain * load(sum + j) * direction + s);
      store(q + j, product);
      sums[0] += direction * product;
      sums[1] += unit(columns, j) * product;
      sums[2] += unit(columns, j) * load(r + j);
    });
    const T length = energy / dots[0];
    if (!(dots[0] > 0) || !(length > 0)) {
      ++step;
      break;
    }
    mean = (dots[2] - length * dots[1]) / modes;
    T next[1];
    plan.template reduce_columns<Sum>(next, [&](Index j, Vec<T>(&sums)[1]) {
      const Vec<T> left = load(r + j) - length * load(q + j) - mean * (unit(columns, j) * load(sum + j));
      const Vec<T> residual = kept(columns, j, left);
      store(beta + j, load(beta + j) + length * load(p + j));
      store(r + j, residual);
      sums[0] += residual * residual * load(d + j);
    });
    const bool better = next[0] < least;
    stale = better && next[0] < least * T(0.9) ? 0 : stale + 1;
    if (better) least = next[0];
    const T ratio = next[0] / energy;
    plan.each_column([&](Index j) {
      if (better) {
        store(best + j, load(beta + j));
        store(k + j, load(r + j));
      }
      store(p + j, load(r + j) * load(d + j) + ratio * load(p + j));
    });
    plan.sync();
    energy = next[0];
    go = energy > wanted && stale < Rules<T>::patience && step + 1 < limit;
  }
  return {least, wanted, step};
}

// The residual that is left by its diagonal alone, and the rows from the columns: it is weighed by the columns' sums,
// so small columns hardly enter it. This makes each as exact as the rows are, whatever its weight.
template <class T, template <class> class Plan>
SFR_FN void settle(Plan<T>& plan) {
  const Marginal<T>& columns = plan.columns;
  T* beta = columns.step();
  const T *best = columns.best(), *k = columns.right(), *sum = columns.sum(), gain = columns.gain();
  plan.each_column(
      [&](Index j) { store(beta + j, load(best + j) + counted(columns, j, load(k + j) / (gain * load(sum + j)))); });
  plan.sync();
  plan.eliminate_rows(beta, plan.rows.right());
}

// Adds to best() what the residual in right() asks for, by the factorised system, and once more for what rounding left,
// but of patches that go where they want to (`loose`), which leave theirs.
template <class T, template <class> class Plan, class Unit>
SFR_FN void factorised_solution(Plan<T>& plan, Approach<T> found, bool loose, Unit&& unit) {
  const Marginal<T>& columns = plan.columns;
  T *p = columns.direction(), *q = columns.product(), *best = columns.best(), *k = columns.right();
  const T *d = columns.inverse_diagonal(), *sum = columns.sum(), gain = columns.gain();
  T least = found.least;
  plan.each_column([&](Index j) { store(q + j, unit(columns, j)); });
  plan.sync();
  plan.factorise(q, loose);
  const T* no_right = nullptr;
  SFR_ROLLED
  for (int turn = 0; turn < (loose ? 1 : 2) && least > found.wanted; ++turn) {
    plan.solve_factorised(k, p);
    plan.eliminate(p, no_right);
    T left[1];
    plan.template reduce_column_products<Sum>(left, [&](Index j, Vec<T> s, Vec<T>(&sums)[1]) {
      const Vec<T> product = kept(columns, j, gain * load(sum + j) * load(p + j) + s);
      const Vec<T> residual = load(k + j) - product;
      store(q + j, residual);
      sums[0] += residual * residual * load(d + j);
    });
    if (!loose && !(left[0] < least)) break;
    least = left[0];
    plan.each_column([&](Index j) {
      store(best + j, load(best + j) + load(p + j));
      store(k + j, load(q + j));
    });
    plan.sync();
  }
}

// Solves the system by conjugate gradients, or, where `patience` steps of them were not enough and `limit` allows it,
// by factorising it; `loose`: see factorise().
template <class T, template <class> class Plan, class Unit>
SFR_FN SystemSteps solve_system(Plan<T>& plan, T goal, int64_t limit, int64_t patience, bool loose, Unit&& unit) {
  const int64_t price = patience + plan.factorising_takes() > limit ? 0 : plan.factorising_takes();
  if (price > 0) limit = patience;
  struct Found {
    Approach<T> approach;
    bool enough;
  };
  const bool alone = price == 0;
  const Found found = plan.with_products([goal, limit, alone, &unit](auto& products) SFR_INLINED {
    const Approach<T> approach = conjugate_gradients(products, goal, limit, unit);
    // Those that no longer got on are left at what rounding allows, if that is near the goal.
    const T near = approach.taken >= limit ? approach.wanted : T(1e4) * approach.wanted;
    const bool enough = alone || !(approach.least > near);
    if (enough) settle(products);
    return Found{approach, enough};
  });
  if (found.enough) return {found.approach.taken, false};
  factorised_solution(plan, found.approach, loose, unit);
  settle(plan);
  return {found.approach.taken + price, true};
}

// One Newton step on both potentials, left in the scalings: the plan's system with the errors of its marginals as right
// sides. The potentials before it stay in right(). A step of the conjugate gradients counts as an iteration.
//
// No potential goes further than step.longest: the others need not wait for it. Of a system that was factorised, whose
// solution is right to the last patch, all take the same part of their way.
template <class T, template <class> class Plan>
SFR_FN Stepped newton_step(Plan<T>& plan, const Step<T>& step, int64_t& n_iter) {
  const auto missing = [](const Marginal<T>& side, Index i) {
    store(side.right() + i, kept(side, i, load(side.target() + i) - load(side.sum() + i)));
  };
  plan.each_row([&](Index i) { missing(plan.rows, i); });
  plan.each_column([&](Index j) { missing(plan.columns, j); });
  const int64_t limit = step.limit - n_iter - 1;
  const auto one = [](const Marginal<T>&, Index) { return splat<T>(1); };
  const SystemSteps system = solve_system(plan, step.precision, limit, step.patience, true, one);
  n_iter += 1 + system.taken;
  const auto take = [&step](const Marginal<T>& side, Index i, Vec<T>(&longest)[1]) {
    const Vec<T> most = splat<T>(step.longest), x = kept(side, i, load(side.step() + i));
    longest[0] = vmax<T>(longest[0], vabs<T>(x));
    store(side.right() + i, load(side.log() + i));
    store(side.scale() + i, exp2<T>(T(1 / ln2) * vmax<T>(-most, -vmax<T>(-most, -x))));
  };
  T of_rows[1], of_columns[1];
  plan.template reduce_rows<Max>(of_rows, [&](Index i, Vec<T>(&longest)[1]) { take(plan.rows, i, longest); });
  plan.template reduce_columns<Max>(of_columns, [&](Index j, Vec<T>(&longest)[1]) { take(plan.columns, j, longest); });
  const bool cut = of_rows[0] > step.longest || of_columns[0] > step.longest;
  if (system.factorised && cut) {
    const T share = step.longest / (of_rows[0] > of_columns[0] ? of_rows[0] : of_columns[0]);
    const auto part = [share](const Marginal<T>& side, Index i) {
      store(side.scale() + i, exp2<T>(T(1 / ln2) * share * kept(side, i, load(side.step() + i))));
    };
    plan.each_row([&](Index i) { part(plan.rows, i); });
    plan.each_column([&](Index j) { part(plan.columns, j); });
    plan.sync();
  }
  return {cut, system.factorised};
}

template <class T, template <class> class Plan>
SFR_FN void undo_step(Plan<T>& plan) {
  const auto back = [](const Marginal<T>& side, Index i) { store(side.log() + i, load(side.right() + i)); };
  plan.each_row([&](Index i) { back(plan.rows, i); });
  plan.each_column([&](Index j) { back(plan.columns, j); });
  plan.sync();
}

// What rounding of the potentials leaves of an error. Patches of less than a millionth of the mass count for less.
template <class T, template <class> class Plan>
SFR_FN T rounding(Plan<T>& plan) {
  const auto size = [](const Marginal<T>& side, Index i, Vec<T>(&most)[1]) {
    const Vec<T> log = vabs<T>(kept(side, i, load(side.log() + i)));
    const Vec<T> share = load(side.sum() + i) * (T(1e6) / side.total);
    most[0] = vmax<T>(most[0], share > 0 ? (share < 1 ? share * log : log) : Vec<T>{});
  };
  T of_rows[1], of_columns[1];
  plan.template reduce_rows<Max>(of_rows, [&](Index i, Vec<T>(&most)[1]) { size(plan.rows, i, most); });
  plan.template reduce_columns<Max>(of_columns, [&](Index j, Vec<T>(&most)[1]) { size(plan.columns, j, most); });
  return (of_rows[0] + of_columns[0]) * Number<T>::epsilon;
}

}  // namespace SFR_TARGET

// What to do next with a problem, from the last evaluation of its plan: every "when" of the solver and every constant.
// No memory, no threads, no vectors: the same decisions on every device.
//
// Larger eps first: at a small one, iterations move mass a little at a time; at a larger one they cross the same
// distance at once, and its potentials, found roughly, are a good start. Then over-relaxed iterations, until the error
// is below `newton_below`, where Newton steps take over. Where a step's model did not hold, mass is off in a few
// places, which a few iterations put right. A step that fails nevertheless is undone and, unless it was cut, taken
// again from a more precise solution of its system (what is left then is mass between parts of the plan that hardly
// touch, the system's smallest eigenvalues); after that, iterations follow, twice as many after each failure. Between
// steps the plan is scaled; the one that is judged is that of the potentials, and where their rounding keeps it from
// tol, solving ends. A symmetric problem takes the mean of both potentials instead, which halves its error.
//
// Where conjugate gradients take too long, a step failed or threw mass about, or iterations have had their share of
// max_iter at one eps, every step from there on is factorised, but in large problems: such steps find their way from
// anywhere, if they are short at first.
//
// Before a smaller eps, patches of little weight are brought near their marginals. Annealing begins without the costs
// that seem to mean "never", and anew with them where the error does not fall. The last larger eps that was solved for
// is what solving goes back to where max_iter leaves the next one unsolved.
//
// Where eps is small, mass moves as slowly from a start that is a little off as from none. Such a start is taken at the
// least of the larger eps at which its error is small, and at the next where it does not lead on from there.
#pragma once

#include "../contracts/sinkhorn.h"
#include "relaxation.h"

namespace SFR_TARGET {

// What one wants to know of a plan.
template <class T>
struct Evaluation {
  T value = 0;             // <P, C> / sum(P): what rounding does to the mass does nothing to it; with a reach <P, C>
  T mass = 0;              // sum(P)
  T error = 0;             // L1 error of both marginals, with a reach in units of the mass
  T relative = 0;          // mean error of a patch in units of its own marginal, both sides summed: with equal weights
                           // the same, and else what small ones have
  bool underflow = false;  // some patch holds so little of its mass that scaling could not bring it back, or, where
                           // there is a reach, so much
  bool exact = false;      // of the potentials, to the last bit; else up to rounding, and without the value
};

// What one half of an iteration finds of a side.
template <class T>
struct ErrorSample {
  T error = 0, mass = 0;
  bool at_edge = false;
};

// What a plan is made of.
enum class From {
  columns,     // the columns' potentials; the rows' follow from them
  halfway,     // the same, and both become the mean of the two: a symmetric problem
  potentials,  // P = 2^(F + G - S): what the potentials mean
  scalings,    // P <- u P v: the same up to rounding, without exponentials; the scalings are absorbed
};

// Why iterations stopped.
enum class Stop {
  reached,  // the scalings' error is within what was asked for
  at_edge,  // the scalings are at the edge of their range
  ended,    // iterations are used up, or something else is better from here on
};

enum class Action {
  finish,
  evaluate,  // nothing but that
  restart,   // forget the start, which is a bad one
  anneal,    // on to the next smaller eps
  retreat,   // back to the last eps that was solved for
  update,    // both potentials in the log domain, where scalings would underflow
  iterate,
  newton,
  undo,  // the last Newton step
};

template <class T>
struct Step {
  Action action;
  // iterate: to this error, or this iteration, or below `gate` where Newton steps are faster from there on
  T error = 0, gate = 0;
  int64_t limit = 0;
  bool plain = false;  // without over-relaxation
  // newton: what the residual of its system is to fall by, and how far a potential may go, in units of eps; steps of
  // the conjugate gradients after which the system is factorised instead
  T precision = 0, longest = 0;
  int64_t patience = 0;
};

// What became of a Newton step.
struct Stepped {
  bool cut = false;         // some potential was to go further
  bool factorised = false;  // its system was
};

// The constants that passes and rules share.
template <class T>
struct Rules {
  static constexpr int sampled_every = 4;   // iterations: looking at the error takes a good part of one
  static constexpr T anneal_by = 2;         // ratio of one eps to the next
  static constexpr T least_mass = T(1e-6);  // share of its marginal below which a patch underflows
  // A share of a side's mass that nobody else notices; below it, entries of the plan soon underflow. 2^-70, 2^-700.
  static constexpr T nothing = is_single<T> ? T(8.470329e-22) : T(1.9010815379079637e-211);
  // No potential goes further than e^4 in a Newton step of which nothing is known: the linear model does not reach that
  // far. Those that want to are of parts of the plan that hardly touch others, which need not wait for them.
  static constexpr T longest_step = 4;
  // Scalings stay within this and its inverse: 2^30, about 2^240.
  static constexpr T most_scale = is_single<T> ? T(1073741824) : T(1.7e72);
  // Conjugate gradients: steps without progress; float32 soon has no more to give. Precision of backward's.
  static constexpr int patience = is_single<T> ? 25 : 200;
  // Steps that are worth trying for each iteration that factorising has the multiplications of: those are slower.
  static constexpr int worth = 8;
  // Factorised, in float64: a pivot below which patches hardly touch the others.
  static constexpr double least_pivot = is_single<T> ? 1e-6 : 1e-13;
  static constexpr T adjoint_precision = is_single<T> ? T(1e-6) : T(1e-13);
};

// What is known of a problem before it is solved.
template <class T>
struct CostRange {
  T near = 0;   // how far costs are apart, without those that are so large that they seem to mean "never"
  T far = 0;    // with them: there may be mass that has to pay them
  T moved = 1;  // share of the mass that is not bound to the heaviest patch of both sides
};

// Iterations that have as many multiplications as factorising the system of a plan, over the side with fewer patches;
// 0: those are too many.
constexpr int most_factorised = 256;
SFR_BOTH int64_t iterations_of_factorising(Index rows, Index columns) {
  const int64_t fewer = rows < columns ? rows : columns, more = rows < columns ? columns : rows;
  return fewer == 0 || fewer > most_factorised ? 0 : 4 + fewer / 4 + fewer * fewer / (12 * more);
}

// Would iterations bring this error below tol as soon as Newton steps, each of which squares it and costs twenty?
// `last` is the error `sampled_every` iterations ago.
template <class T>
SFR_FN bool iterations_are_as_fast(T error, T last, T tol) {
  const T fall = error / last;
  T iterated = error;
  SFR_ROLLED
  for (T squared = error; squared > tol; squared *= squared) iterated *= fall * fall * fall * fall * fall;
  return iterated <= tol;
}

// Near the solution every step of a symmetric problem halves the error: one that does not has met rounding.
template <class T>
SFR_FN bool stalls(T error, T last) {
  return error < T(1e-3) && !(error < last * T(0.95));
}

template <class T>
class SolverStrategy {
 public:
  int64_t n_iter = 0;   // counted by whoever iterates
  const int64_t price;  // iterations that factorising takes; 0: it is not to be had
  Relaxation<T> relaxation;

  // `apart`: over eps. `warm`: there is a start, and none is sought unless it is a bad one. `fixed`: eps is to be that
  // of the problem, whatever becomes of it.
  SFR_FN SolverStrategy(const SolverOptions& options, CostRange<T> apart, bool warm, bool fixed, int64_t price = 0)
      : price(price),
        relaxation(options.method != Method::plain),
        tol_(T(options.tol)),
        max_iter_(options.max_iter),
        last_(options.max_iter),
        symmetric_(options.symmetric),
        newton_(options.method == Method::automatic && !options.symmetric),
        warm_(warm && newton_),
        fixed_(fixed),
        holds_(!fixed && options.reach_a == 0 && options.reach_b == 0),
        spread_(apart.near),
        most_spread_(apart.far) {
    // An error of a part of the mass that may move at all, as far as tol and the type go.
    const T finer = 4 * apart.moved * rough > finest ? 4 * apart.moved * rough : finest;
    if (finer < rough) rough_ = finer > tol_ ? finer : tol_ < rough ? tol_ : rough;
    if (!warm_ && max_iter_ > 0) begin_annealing();
  }

  // The eps to solve for at first, in units of the problem's own; what it is in the end, once that has been found.
  SFR_FN T annealed_eps() const { return annealed_eps_; }
  // The last one that was solved for, whose solution is to be held; 0: none.
  SFR_FN T held_eps() const { return held_eps_; }
  SFR_FN From start() const { return symmetric_ ? From::halfway : From::columns; }

  // `rounding()`: the error that rounding of the potentials leaves.
  template <class Rounding>
  SFR_FN Step<T> next(const Evaluation<T>& now, Rounding&& rounding) {
    const T error = now.error;
    if (tried_ && n_iter >= until_ && n_iter < max_iter_) {
      tried_ = false;
      warm_ = error > 2 * tolerance() && error > 4 * rounding();
      if (warm_ && climb()) return {Action::anneal};
    }
    if (warm_) {
      const bool bad = now.underflow || !(error < bad_start) || rounding() > most_rounding;
      if (spread_ > far && (bad || error > good_start) && finite(error) && n_iter < max_iter_) {
        // One update mends what is off between neighbours, which says little.
        updated_ = !updated_;
        if (updated_) {
          ++n_iter;
          return {Action::update};
        }
        if (!bad && climb()) return {Action::anneal};
      }
      warm_ = false;
      if (bad) {
        begin_annealing();
        return {Action::restart};
      }
      begin_eps(try_for);
      tried_ = spread_ > far;
    }
    if (error < smallest_) smallest_ = error;
    if (doubtful() && n_iter >= doubt_at_) {
      // Mass that gets no nearer to where it is missing has to pay what seemed to be too much.
      if (smallest_ > rough_ && smallest_ > seen_ * T(0.95) && n_iter < max_iter_) {
        spread_ = most_spread_;
        annealed_eps_ = 1;
        begin_annealing();
        return {Action::restart};
      }
      seen_ = smallest_;
      doubt_at_ = n_iter + doubted_for;
    }
    uneven_ = now.relative > 4 * error;
    if (reached_) {
      if (error > missed_ * T(0.9) && error < 4 * rounding()) last_ = n_iter;
      missed_ = error;
      reached_ = false;
    }
    correcting_ = stepped_ && !correcting_ && !hard_ && error > before_ / 2 && n_iter < max_iter_;
    hard_ = hard_ || (correcting_ && price > 0 && !(error < thrown_about));
    if (correcting_) return iterate(before_ / 2, at_most(n_iter + corrections), T(0), true);
    if (stepped_) {
      stepped_ = false;
      // A cut step moves mass along a path that only opens up on the way: the error may wait.
      const bool good = cut_ ? error < before_ * T(1.2) && error < lowest_ * T(1.5) : error < before_ * T(0.7);
      if (error < lowest_) lowest_ = error;
      if (factorised_ && cut_ && error > newton_below && n_iter + 1 + price <= last()) {
        // The direction is right, wherever it leads at first: on, and in longer steps while nothing gets worse.
        const bool worse = error > before_ * T(1.05), longer = longest_ > shortest;
        if (!worse && longest_ < farthest) longest_ *= 2;
        if (worse && !longer) ++worsened_;
        const bool circles = worse && worsened_ > most_worsened && longest_ > least_step;
        if (worse) longest_ = circles && !longer ? longest_ / 4 : shortest;
        if (worse && (longer || circles)) return {Action::undo};
        lowest_ = Number<T>::infinity;
      } else if (good) {
        if (cut_ && longest_ < farthest) longest_ *= 2;
      } else {
        if (cut_ && longest_ > shortest) {
          longest_ = shortest;
        } else if (precision_ > finest && !cut_ && !hard_) {
          precision_ *= T(1e-2);
        } else if (hard_ && longest_ > least_step && spread_ < nearby && n_iter + 5 * (1 + price) <= max_iter_) {
          longest_ /= 4;
        } else {
          if (rest_ > 64 && before_ < 4 * rounding()) last_ = n_iter;
          resume_ = n_iter + rest_;
          rest_ *= 2;
        }
        hard_ = hard_ || (price > 0 && before_ > 16 * rounding());
        return {Action::undo};
      }
    }
    if (!(error > tolerance()) || n_iter >= last()) {
      // At the next eps parts would no longer touch that patches of little weight have to come from.
      if (annealing_ && now.relative > few && updates_ < most_updates && n_iter < last()) {
        ++updates_;
        ++n_iter;
        before_ = Number<T>::infinity;
        return {Action::update};
      }
      if (annealing_ && anneal(rounding, error)) return {Action::anneal};
      if (!(error > tol_) || n_iter >= last_) {
        if (!(error <= rough_ || error <= 10 * tol_) && held_is_better(error, rounding)) {
          annealed_eps_ = held_eps_;
          held_eps_ = 0;
          last_ = n_iter;
          return {Action::retreat};
        }
        if (now.exact) return {Action::finish};
        reached_ = true;
        return {Action::evaluate};
      }
    }
    if (now.underflow) {
      ++n_iter;
      before_ = Number<T>::infinity;
      return {Action::update};
    }
    if (symmetric_) {
      if (stalls(error, before_)) return {Action::finish};
      before_ = error;
      return iterate(tol_, max_iter_, T(0), true);
    }
    const T gate = newton_ ? newton_below : T(0);
    if (error > gate && !given_up(gate)) return iterate(tolerance(), patience(), gate, false);
    if (n_iter < resume_) return iterate(tolerance(), resume_ < last() ? resume_ : last(), T(0), false);
    before_ = error;
    stepped_ = true;
    Step<T> step{Action::newton};
    step.precision = precision_;
    step.longest = longest_;
    step.limit = annealing_ || tried_ ? until_ : max_iter_;
    step.patience = hard_ ? 0 : Rules<T>::worth * price;
    return step;
  }

  // How the plan follows after an action ...
  SFR_FN From after(const Step<T>& step) const {
    switch (step.action) {
      case Action::anneal:
      case Action::retreat:
      case Action::restart:
        return From::columns;
      case Action::update:
        return start();
      default:
        return From::potentials;
    }
  }
  // ... after iterations ...
  template <class Rounding>
  SFR_FN From iterated(Stop stop, Rounding&& rounding) {
    if (symmetric_) return From::potentials;
    if (correcting_) return scaled();
    if (annealing_ && !uneven_ && (stop == Stop::reached || (stop == Stop::ended && n_iter >= until_ && !tried_)))
      return anneal(rounding, stop == Stop::reached ? rough_ : Number<T>::infinity) ? From::columns : From::potentials;
    reached_ = stop == Stop::reached && !annealing_;
    return stop == Stop::ended ? scaled() : From::potentials;
  }
  // ... and after a Newton step. One that was cut goes where entries that have underflowed may matter.
  SFR_FN From stepped(Stepped taken) {
    cut_ = taken.cut;
    factorised_ = taken.factorised;
    hard_ = hard_ || factorised_;
    if (factorised_) return From::columns;
    return taken.cut ? From::potentials : scaled();
  }

 private:
  static constexpr T newton_below = T(1e-2);
  static constexpr T rough = T(0.003);                // error that is enough at a larger eps, of all mass
  static constexpr int64_t anneal_for = 1000;         // iterations at most, at each of them
  static constexpr T most_rounding = T(0.02);         // no smaller eps where it would leave this
  static constexpr T bad_start = T(0.5);              // error of a start that is worse than none
  static constexpr T far = 128, good_start = T(0.1);  // ... of one to begin at, where spread is above `far`
  static constexpr int64_t try_for = 100;             // iterations that one has there to lead on
  static constexpr T few = T(0.03);           // mean error of a patch in units of its own marginal, at a larger eps
  static constexpr int most_updates = 4;      // ... that are made for it
  static constexpr int64_t doubted_for = 64;  // iterations in which the error is to fall where large costs are left out
  static constexpr T thrown_about = 1;       // error after a step that was cut patch by patch, and should not have been
  static constexpr int64_t corrections = 8;  // iterations after a Newton step
  static constexpr T finest = is_single<T> ? T(1e-5) : T(1e-10);  // precision of a Newton step
  // ... and how far one may go where such parts are far from others, and, factorised, where the shortest goes too far.
  static constexpr T shortest = Rules<T>::longest_step, farthest = 64, least_step = T(0.25);
  static constexpr T nearby = 16384;       // spread above which such short steps lead nowhere
  static constexpr int most_worsened = 4;  // short steps that may raise the error at one eps: more lead in circles
  static constexpr int most_scaled = 8;    // plans in a row that are scaled ones

  SFR_FN T tolerance() const { return annealing_ ? rough_ : tol_; }
  SFR_FN int64_t last() const { return annealing_ || (tried_ && until_ < last_) ? until_ : last_; }
  // Where iterations do not lead to where Newton steps hold, those that are factorised find the way themselves.
  SFR_FN bool given_up(T gate) {
    hard_ = hard_ || (price > 0 && gate > 0 && n_iter >= given_up_);
    return hard_ && n_iter >= resume_;
  }
  // Whether the last eps that was solved for is worth more than an error at the present one: if it is the next larger
  // one, and if mass that is off may be further off, since costs are that far apart.
  template <class Rounding>
  SFR_FN bool held_is_better(T error, Rounding&& rounding) const {
    if (held_eps_ == annealed_eps_ * Rules<T>::anneal_by && !(error <= 16 * rounding())) return true;
    return held_eps_ > 0 && !(error * spread_ <= 2 * held_eps_ || error <= 4 * rounding());
  }
  SFR_FN bool doubtful() const { return most_spread_ > spread_ && finite(most_spread_); }
  SFR_FN int64_t patience() const {
    int64_t all = last();
    if (doubtful() && n_iter < doubt_at_ && doubt_at_ < all) all = doubt_at_;
    return price > 0 && newton_ && n_iter < given_up_ && given_up_ < all ? given_up_ : all;
  }
  // Iterations that are tried at the present eps: its share of those that are left, within reason.
  SFR_FN int64_t tried_for() const {
    int64_t levels = 1;
    SFR_ROLLED
    for (T eps = annealed_eps_; eps > 1; eps /= Rules<T>::anneal_by) ++levels;
    const int64_t share = (max_iter_ - n_iter) / levels, least = 2 * (1 + price), most = 128 + least;
    return share < least ? least : share > most ? most : share;
  }
  SFR_FN int64_t at_most(int64_t n) const { return n < max_iter_ ? n : max_iter_; }

  SFR_FN Step<T> iterate(T error, int64_t limit, T gate, bool plain) const {
    return {Action::iterate, error, gate, limit, plain, T(0)};
  }

  // Where to start from: an eps at which patches reach most others. Where the deviation of the costs is up to 22 times
  // eps, iterations at eps itself are as fast.
  SFR_FN void begin_annealing() {
    held_eps_ = 0;
    while (newton_ && larger()) annealed_eps_ *= Rules<T>::anneal_by;
    begin_eps(anneal_for);
  }
  SFR_FN bool larger() const {
    constexpr T enough = T(0.09);
    return annealed_eps_ * Rules<T>::anneal_by < enough * spread_;
  }

  // Back to a larger eps with the potentials at hand, up to that at which annealing would begin.
  SFR_FN bool climb() {
    if (!larger()) return false;
    annealed_eps_ *= Rules<T>::anneal_by;
    return true;
  }

  // On to the next smaller eps, with the error that is left at this one, unless it is the last that the type or
  // max_iter can do with.
  template <class Rounding>
  SFR_FN bool anneal(Rounding&& rounding, T error) {
    annealing_ = tried_ = false;
    most_spread_ = spread_;
    const int64_t needed = hard_ ? 10 * (1 + price) : 1;
    if (!fixed_ && (n_iter + needed > max_iter_ || rounding() * Rules<T>::anneal_by > most_rounding)) return false;
    if (holds_ && error <= rough_) held_eps_ = annealed_eps_;
    annealed_eps_ /= Rules<T>::anneal_by;
    begin_eps(anneal_for);
    return true;
  }

  // At `annealed_eps_`, for as many iterations at most.
  SFR_FN void begin_eps(int64_t iterations) {
    annealing_ = annealed_eps_ > 1;
    last_ = max_iter_;
    given_up_ = n_iter + tried_for();
    until_ = at_most(n_iter + iterations);
    if (newton_) relaxation = Relaxation<T>(true);
    precision_ = T(1e-2);
    longest_ = shortest;
    rest_ = 16;
    before_ = lowest_ = Number<T>::infinity;
    updates_ = worsened_ = 0;
    reached_ = stepped_ = correcting_ = false;
  }

  // A scaled plan forgets what has underflowed.
  SFR_FN From scaled() {
    scaled_ = scaled_ < most_scaled ? scaled_ + 1 : 0;
    return scaled_ > 0 ? From::scalings : From::potentials;
  }

  T tol_, rough_ = rough;    // errors that are enough: at the problem's own eps, and at larger ones
  int64_t max_iter_, last_;  // no iteration after `last_`: rounding has been met
  bool symmetric_, newton_;
  bool warm_;             // the plan is of a start that was given, and is to be judged
  bool updated_ = false;  // ... after an update
  bool tried_ = false;    // the start is to have led to the error wanted by iteration `until_`
  bool fixed_;
  bool holds_;  // what is solved for; under a reach the error is one of the mass, of which there may be next to none
  T spread_, annealed_eps_ = 1;     // above 1: at eps times this
  T held_eps_ = 0;                  // the same of the last eps that was solved for
  T most_spread_;                   // where some costs were left out of it, the same with them
  int64_t doubt_at_ = doubted_for;  // iteration at which the error is to have fallen, where they were
  T seen_ = Number<T>::infinity;    // ... below this, which is the smallest then
  T smallest_ = Number<T>::infinity;
  bool annealing_ = false;          // a smaller eps is to follow
  bool uneven_ = false;             // small patches are further from their marginals than others
  int updates_ = 0;                 // in the log domain for them, at the present eps
  bool hard_ = false;               // conjugate gradients take too long, or iterations: systems are factorised
  int64_t given_up_ = 0;            // iteration at which they are at the present eps
  int64_t until_ = 0;               // iteration at which the present eps is left
  T precision_ = T(1e-2);           // of the next Newton step
  T longest_ = shortest;            // ... and how far it may go
  int worsened_ = 0;                // such steps that raised the error, and were kept
  int64_t rest_ = 16, resume_ = 0;  // no Newton step before iteration `resume_`
  T before_ = Number<T>::infinity;  // error before the last Newton step, or the last symmetric iterations
  T lowest_ = Number<T>::infinity;  // error after the best of them
  T missed_ = Number<T>::infinity;  // error of the potentials, the last time that scalings were within tol
  bool reached_ = false;            // scalings are within tol; the potentials are looked at next
  int scaled_ = 0;                  // plans since the last one of the potentials
  bool stepped_ = false, correcting_ = false;  // a Newton step is to be judged
  bool cut_ = false, factorised_ = false;      // ... and what became of it
};

}  // namespace SFR_TARGET

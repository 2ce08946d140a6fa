// What is left to do once a problem is solved: to bring patches of little weight to their marginals.
//
// Within tol they may still be far from them: what they lack is little, but the gradients of their weights are their
// potentials. Patches that weigh so little that the plan does not show them have stayed where they were, and those that
// hold next to nothing of their weight are far from it: the log domain shows them, and they follow the others. What is
// left is mostly mass between small patches, and takes a few Newton steps, or a symmetric problem some halvings; with
// equal weights nothing is left. No memory, no threads, no vectors.
#pragma once

#include "strategy.h"

namespace SFR_TARGET {

template <class T>
class Refinement {
 public:
  // `light`: some patch weighs next to nothing.
  SFR_FN Refinement(const SolverOptions& options, bool light)
      : tol_(T(options.tol)),
        max_iter_(options.max_iter),
        symmetric_(options.symmetric),
        newton_(options.method == Method::automatic),
        unseen_(light && max_iter_ > 0) {}

  SFR_FN bool begun() const { return begun_; }

  // `now` is of the potentials at first, as is that which is to be reported.
  SFR_FN Step<T> next(const Evaluation<T>& now, int64_t& n_iter) {
    const bool lost = now.underflow && n_iter < max_iter_;
    if (!begun_ && (unseen_ || lost)) updates_ = symmetric_ ? 16 : 2;
    begun_ = true;
    if (updates_ > 0) {
      --updates_;
      if (n_iter < max_iter_) ++n_iter;
      return {Action::update};
    }
    if (stepped_ && !now.exact) return plain(n_iter, corrections_);
    if (!now.exact) return {Action::evaluate};
    if (!(most_ > 0)) most_ = tol_ > now.error ? tol_ : now.error * T(1.5);  // where rounding has kept it from tol
    if (stepped_ && !(now.error <= most_)) {
      // The step has cost the others something, which a few iterations may put right.
      if (corrections_ < most_corrections) return plain(n_iter, corrections_ *= 4);
      stepped_ = false;
      steps_ = most_steps;
      return {Action::undo};
    }
    stepped_ = false;
    if (n_iter >= max_iter_) return {Action::finish};
    if (symmetric_) {
      if (!(now.relative > 10 * most_ && now.relative < before_ / 2)) return {Action::finish};
      before_ = now.relative;
      return plain(n_iter, 8);
    }
    // On a long way the error grows at first, as steps are cut.
    if (!newton_ || steps_ >= most_steps || !(now.relative > 10 * most_)) return {Action::finish};
    ++steps_;
    stepped_ = true;
    corrections_ = 1;
    Step<T> step{Action::newton};
    step.precision = T(1e-4);
    step.longest = Rules<T>::longest_step;
    step.limit = max_iter_;
    return step;
  }

  // How the plan follows.
  SFR_FN From after(const Step<T>& step) const {
    if (step.action == Action::update) return symmetric_ ? From::halfway : From::columns;
    return step.action == Action::newton ? From::scalings : From::potentials;
  }

 private:
  static constexpr int most_steps = 12, most_corrections = 16;

  // Iterations without over-relaxation, as far as they last.
  SFR_FN Step<T> plain(int64_t n_iter, int64_t count) const {
    if (n_iter >= max_iter_) return {Action::evaluate};
    const int64_t limit = n_iter + count < max_iter_ ? n_iter + count : max_iter_;
    return {Action::iterate, T(0), T(0), limit, true, T(0)};
  }

  T tol_;
  int64_t max_iter_;
  bool symmetric_, newton_;
  bool unseen_;      // there are patches that the plan does not show
  int updates_ = 0;  // in the log domain, that are still to come
  bool begun_ = false;
  int steps_ = 0, corrections_ = 1;
  bool stepped_ = false;            // a Newton step is to be judged
  T most_ = 0;                      // error that it may leave
  T before_ = Number<T>::infinity;  // relative error before the last halvings
};

}  // namespace SFR_TARGET

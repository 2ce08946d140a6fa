// The solver's strategy on the host, without any kernel, for tests/test_strategy.py.
#include "solver/strategy.h"

namespace {
using Strategy = sfr::host::SolverStrategy<double>;
using sfr::host::Evaluation;
using sfr::host::Step;
}  // namespace

struct Driven {
  Strategy strategy;
  Step<double> step{};
};

extern "C" {

Driven* strategy_new(double tol, int64_t max_iter, int method, int symmetric, double spread, double most, double moved,
                     int warm, int fixed, int64_t price) {
  sfr::SolverOptions options;
  options.tol = tol;
  options.max_iter = max_iter;
  options.method = sfr::Method(method);
  options.symmetric = symmetric != 0;
  return new Driven{Strategy(options, {spread, most, moved}, warm != 0, fixed != 0, price)};
}
void strategy_free(Driven* driven) {
  delete driven;
}

// The action; numbers: error, gate, limit, plain, precision, longest, patience.
int strategy_next(Driven* driven, double error, double relative, int underflow, int exact, double rounding,
                  double* numbers) {
  Evaluation<double> now;
  now.error = error;
  now.relative = relative;
  now.underflow = underflow != 0;
  now.exact = exact != 0;
  driven->step = driven->strategy.next(now, [&] { return rounding; });
  const Step<double>& step = driven->step;
  const double all[] = {step.error,     step.gate,    double(step.limit),   double(step.plain),
                        step.precision, step.longest, double(step.patience)};
  for (int k = 0; k < 7; ++k) numbers[k] = all[k];
  return int(step.action);
}
int strategy_start(const Driven* driven) {
  return int(driven->strategy.start());
}
int strategy_after(const Driven* driven) {
  return int(driven->strategy.after(driven->step));
}
int strategy_iterated(Driven* driven, int stop, double rounding) {
  return int(driven->strategy.iterated(sfr::host::Stop(stop), [&] { return rounding; }));
}
int strategy_stepped(Driven* driven, int cut, int factorised) {
  return int(driven->strategy.stepped({cut != 0, factorised != 0}));
}
double strategy_held_eps(const Driven* driven) {
  return driven->strategy.held_eps();
}
double strategy_annealed_eps(const Driven* driven) {
  return driven->strategy.annealed_eps();
}
int64_t* strategy_n_iter(Driven* driven) {
  return &driven->strategy.n_iter;
}
// The factor after an error was observed.
double strategy_observe(Driven* driven, double error) {
  driven->strategy.relaxation.observe(error);
  return driven->strategy.relaxation.factor();
}
}

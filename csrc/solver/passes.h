// What a device supplies: Plan<T>, the plan of one problem as one thread sees it, and the passes over it. The rules in
// this folder are made of these and know no threads, vectors or memory.
//
//   state      rows, columns: Marginal<T>      centre, factor: S = (C - centre) factor    shift      has_reach()
//              kept_rows, kept_columns         empty()    light: some kept patch weighs next to nothing
//              of_features: costs are those of features
//   whole      evaluate(From)                  the plan, its sums over rows and columns, and its evaluation
//              update_columns()                the columns' potentials from the rows', in the log domain
//              absorb()                        scalings move into the potentials
//              scale_rows(sample, omega)       half an iteration, with a sample of the error before it ...
//              scale_columns(sample, omega)    ... and the other half, with the error that it leaves
//              scale_halfway(sample)           both at once, for a symmetric problem
//   system     eliminate(v, right)             step = (right - P v) / (gain sum) over the rows, and P^T step
//              eliminate_rows(v, right)        ... without the latter
//              factorising_takes()             what factorising it takes, in iterations; 0: it is not to be had
//              factorise(null, loose), solve_factorised(right, out)   the null vector, which a plan with a reach does
//                                              not have; whether patches that hardly touch others may go far
//              with_products(f)                f(plan), or f of one that is the same and whose products are faster to
//                                              take again and again
//   entries    gather(term, term, rows, columns)  sums of one term(i, j, P_ij) over rows, and of another over columns
//              gather_columns(term, columns)
//              reduce_entries<Op>(out, f)         f(i, j, sums) over all entries,
//              reduce_costs<Op>(out, f)           ... and f(i, j, cost, sums)
//   vectors    each_row(f), each_column(f)     f(i), for lanes<T> entries at once
//              reduce_rows<Op>(out, f), reduce_columns<Op>(out, f)
//              reduce_column_products<Op>(out, f) f(j, (P^T step)_j, sums), after eliminate()
//   patches    each_patch_of_rows(f), ...      f(i), one patch after the other, kept patches alone
//              sum_patches_of_rows(f), ...     their sum
//              row_index(i), ...               of a patch among all, those that are removed included
//              clear_removed_rows(out), ...    0 there;  fill_rows(out, x), ...
//   whole      clear()                         an empty plan's entries become 0, where there are any
//   threads    sync()
//              reports()                       one of all;  has_columns(): one of each copy of the columns' results
//
// each_... end without a barrier, everything else with one. An entry of a vector is always the same thread's, so a loop
// over a vector needs none before another over the same one; a pass over the plan, which reads whole vectors, does.
// Kept patches are those whose weight is above 0; `kept(side, i, x)` is x there and 0 elsewhere.
#pragma once

#if defined(SFR_ISA)
#include "../cpu/passes.h"
#else
#include "../cuda/passes.cuh"
#endif

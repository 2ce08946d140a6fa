// How problems are laid out on a device: csrc/cuda/layout.h on the host, for tools/gpu_model/layout.py.
#define SFR_SIMT
#include "cuda/layout.h"

namespace {

using namespace sfr::cuda;

template <class T>
void fill_out(const Operation& task, Strategy strategy, const DeviceLimits& device, int64_t* out) {
  const ProblemLayout s = choose<T>(task, strategy, device);
  const Cover cover = s.cover();
  const int edge = tile_edge<T>(s.compare_x, s.compare_y);
  const Tiling tiling(s.compare_x, s.compare_y, edge, task.C > 0 ? s.pair_slices : 1);
  const MatrixTiling units(s.compare_x, s.compare_y, s.matrix_slices);
  const int64_t values[] = {s.threads,
                            s.solvers,
                            s.teams,
                            s.blocks,
                            s.slab,
                            s.resident,
                            s.cost_near,
                            s.in_registers,
                            s.held,
                            s.ld,
                            s.panel_channels,
                            s.compare_x,
                            s.compare_y,
                            s.pull_channels,
                            s.pull_x,
                            s.pull_y,
                            s.shared_bytes,
                            s.near_bytes,
                            s.far_bytes,
                            cover.lanes,
                            cover.width,
                            cover.slices,
                            cover.slice_rows,
                            edge,
                            tiling.tiles(),
                            tiling.slices,
                            s.by_matrix ? units.passes(s.threads / warp_threads) : tiling.passes(s.threads),
                            s.by_matrix,
                            units.units(),
                            units.slices,
                            s.pull_by_matrix};
  std::copy(std::begin(values), std::end(values), out);
}

}  // namespace

// in: N, M, x_pixels, y_pixels, C, G, windows, norms, products, solved, backward, reach, float64; processors, shared,
// together, strategy, matrix. False, and the reason: it does not fit.
extern "C" bool choose_layout(const int64_t* in, int64_t* out, char* why, int length) {
  Operation task;
  task.N = in[0], task.M = in[1], task.x_pixels = in[2], task.y_pixels = in[3], task.C = in[4], task.G = in[5];
  task.windows = in[6], task.norms = in[7], task.products = in[8], task.solved = in[9], task.backward = in[10];
  task.reach = in[11];
  const DeviceLimits device{int(in[13]), size_t(in[14]), in[15] != 0, in[17] != 0};
  const auto strategy = Strategy(in[16]);
  try {
    in[12] ? fill_out<double>(task, strategy, device, out) : fill_out<float>(task, strategy, device, out);
    return true;
  } catch (const std::exception& error) {
    std::snprintf(why, size_t(length), "%s", error.what());
    return false;
  }
}

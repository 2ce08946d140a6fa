// Each function of device.cuh that the emulator stands in for, in a kernel of its own: tests/gpu_model/test_ptx.py runs
// their PTX.
#include "cuda/device.cuh"

using namespace sfr::cuda;

#define KERNEL(name) extern "C" __global__ void name

KERNEL(shuffle_float)(float* x, int lane) {
  x[threadIdx.x] = shuffle(x[threadIdx.x], lane);
}
KERNEL(shuffle_double)(double* x, int lane) {
  x[threadIdx.x] = shuffle(x[threadIdx.x], lane);
}
KERNEL(shuffle_xor_float)(float* x, int mask) {
  x[threadIdx.x] = shuffle_xor(x[threadIdx.x], mask);
}
KERNEL(shuffle_xor_double)(double* x, int mask) {
  x[threadIdx.x] = shuffle_xor(x[threadIdx.x], mask);
}
KERNEL(shuffle_xor_int)(int* x, int mask) {
  x[threadIdx.x] = shuffle_xor(x[threadIdx.x], mask);
}

// Each thread reads what another of its group has written: threads [0, count) meet at barrier 1, the others at 2.
KERNEL(meet_some)(int* out, int count) {
  int* shared = reinterpret_cast<int*>(shared_memory());
  const int t = int(threadIdx.x);
  shared[t] = t * t;
  if (t < count) {
    sync_threads(1, count);
    out[t] = shared[(t + 33) % count];
  } else {
    const int others = int(blockDim.x) - count;
    sync_threads(2, others);
    out[t] = shared[count + (t - count + 33) % others];
  }
}
KERNEL(meet_block)(int* out) {
  int* shared = reinterpret_cast<int*>(shared_memory());
  shared[threadIdx.x] = int(threadIdx.x) * 3;
  sync_block();
  out[threadIdx.x] = shared[(threadIdx.x + 33) % blockDim.x];
}
KERNEL(meet_warp)(int* out) {
  int* shared = reinterpret_cast<int*>(shared_memory());
  shared[threadIdx.x] = int(threadIdx.x) * 5;
  sync_warp();
  out[threadIdx.x] = shared[threadIdx.x ^ 9];
}

// Blocks write, meet and read each other's, twice.
KERNEL(meet_blocks)(unsigned* counter, int* x, int* out) {
  const unsigned blocks = gridDim.x, b = blockIdx.x;
  for (unsigned round = 1; round <= 2; ++round) {
    if (threadIdx.x == 1) x[b] = int(100 * round + b);
    sync_block();
    if (threadIdx.x == 0) arrive_and_wait(counter, (2 * round - 1) * blocks);
    sync_block();
    if (threadIdx.x == 2) out[(round - 1) * blocks + b] = x[(b + 1) % blocks];
    sync_block();
    if (threadIdx.x == 0) arrive_and_wait(counter, 2 * round * blocks);
    sync_block();
  }
}

// The meeting of blocks alone.
KERNEL(meeting)(unsigned* counter, unsigned target) {
  arrive_and_wait(counter, target);
}

KERNEL(from_half)(const uint16_t* x, float* out) {
  out[threadIdx.x] = half_to_float(x[threadIdx.x]);
}
KERNEL(to_half)(const float* x, uint16_t* out) {
  out[threadIdx.x] = float_to_half(x[threadIdx.x]);
}
KERNEL(to_bfloat)(const float* x, uint16_t* out) {
  Bfloat b;
  from_float(x[threadIdx.x], b);
  out[threadIdx.x] = b.bits;
}
KERNEL(bits_of_float)(const float* x, float* out) {
  out[threadIdx.x] = bits_float(float_bits(x[threadIdx.x]) ^ 0x80000000u);
}
KERNEL(bits_of_double)(const double* x, double* out) {
  out[threadIdx.x] = bits_double(double_bits(x[threadIdx.x]) ^ 0x8000000000000001ull);
}
KERNEL(exponential)(const float* x, float* out) {
  out[threadIdx.x] = exp2_of(x[threadIdx.x]);
}
KERNEL(divide)(const float* x, const float* y, float* out) {
  out[threadIdx.x] = quotient(x[threadIdx.x], y[threadIdx.x]);
}
KERNEL(root)(const float* x, float* out) {
  out[threadIdx.x] = sqrt_of(x[threadIdx.x]);
}
KERNEL(logarithm)(const float* x, float* out) {
  out[threadIdx.x] = log2_of(x[threadIdx.x]);
}
KERNEL(exponential_less_1)(const float* x, float* out) {
  out[threadIdx.x] = expm1_of(x[threadIdx.x]);
}
KERNEL(load_16)(const uint32_t* x, uint32_t* out) {
  const Word16 word = load16(x + 4 * threadIdx.x);
  for (int k = 0; k < 4; ++k) out[4 * threadIdx.x + k] = word.part[3 - k];
}

// Each thread copies 4 bytes, or zeros where its number divides by 3, and 16; then reads what its neighbour copied.
KERNEL(copy_4_and_16)(const uint32_t* x, uint32_t* out) {
#if defined(__CUDA_ARCH__)
  if constexpr (async_copies) {
    uint32_t* shared = reinterpret_cast<uint32_t*>(shared_memory());
    const unsigned t = threadIdx.x, threads = blockDim.x, next = (t + 33) % threads;
    copy_async<4>(shared + t, x + t, t % 3 != 0);
    copy_async<16>(shared + threads + 4 * t, x + threads + 4 * t);
    wait_copies();
    sync_block();
    out[t] = shared[next];
    for (unsigned k = 0; k < 4; ++k) out[threads + 4 * t + k] = shared[threads + 4 * next + k];
  }
#endif
}

// A warp multiplies x [16][8] by y [8][8], and adds what is in out [16][8].
KERNEL(matrix_product)(const float* x, const float* y, float* out) {
  const int group = int(threadIdx.x) / 4, within = int(threadIdx.x) % 4;
  float* own = out + group * 8 + within * 2;
  float d[4] = {own[0], own[1], own[64], own[65]};
  const auto x_bits = [&](int row, int column) { return float_bits(x[row * 8 + column]); };
  const auto y_bits = [&](int row, int column) { return float_bits(y[row * 8 + column]); };
  const uint32_t a[4] = {x_bits(group, within), x_bits(group + 8, within), x_bits(group, within + 4),
                         x_bits(group + 8, within + 4)};
  const uint32_t b[2] = {y_bits(within, group), y_bits(within + 4, group)};
  multiply_tf32(d, a, b);
  own[0] = d[0], own[1] = d[1], own[64] = d[2], own[65] = d[3];
}

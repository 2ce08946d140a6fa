// Loops that do the same work, each but the first with a fault that its machine code shows. Compiled, never run.
extern __shared__ float shared[];

__global__ void sound_kernel(float* out, float x, int n) {
  float sum = 0;
#pragma unroll 1
  for (int i = 0; i < n; ++i) sum += shared[i] * x;
  *out = sum;
}

// The address may be of any memory.
__global__ void generic_kernel(float* out, float x, int n, bool near) {
  const float* from = near ? shared : out + 1;
  float sum = 0;
#pragma unroll 1
  for (int i = 0; i < n; ++i) sum += from[i] * x;
  *out = sum;
}

// A division that must round right, four times in a pass.
__global__ void division_kernel(float* out, float x, int n) {
  float sum = 0;
#pragma unroll 4
  for (int i = 0; i < n; ++i) sum += shared[i] / x * x;
  *out = sum;
}

// An array that is indexed by data lies in local memory.
__global__ void local_kernel(float* out, float x, int n) {
  float own[32] = {};
#pragma unroll 1
  for (int i = 0; i < n; ++i) own[int(shared[i]) & 31] += shared[i] * x;
  for (int i = 0; i < 32; ++i) out[i] = own[i];
}

// The choice of one of several ways lies in a table of addresses.
__global__ void switch_kernel(float* out, float x, int n) {
  float sum = 0;
#pragma unroll 1
  for (int i = 0; i < n; ++i) switch (int(shared[i])) {
      case 0:
        sum += shared[i] * x;
        break;
      case 1:
        out[i] = sum;
        break;
      case 2:
        out[i + 1] = x;
        break;
      case 3:
        out[2 * i] = shared[2 * i];
        break;
      case 4:
        out[3 * i] = shared[3 * i];
        break;
      case 5:
        out[5 * i] = shared[5 * i];
        break;
      case 6:
        out[7 * i] = shared[7 * i];
        break;
    }
  *out = sum;
}

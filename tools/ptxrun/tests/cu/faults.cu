// Kernels with a mistake in them, some only when an argument asks for it.
__global__ void racy(const float* x, float* y, int sync) {
  __shared__ float s[128];
  s[threadIdx.x] = x[threadIdx.x];
  if (sync) __syncthreads();
  y[threadIdx.x] = s[127 - threadIdx.x];
}

__global__ void racy_loop(float* y, int iters, int sync2) {
  __shared__ float s[64];
  float a = 0;
  for (int i = 0; i < iters; i++) {
    if (threadIdx.x < 32) s[threadIdx.x] = i;
    __syncthreads();
    a += s[threadIdx.x & 31];
    if (sync2) __syncthreads();
  }
  y[threadIdx.x] = a;
}

__global__ void oob(const float* x, float* y, int off) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  y[i] = x[i + off];
}

__global__ void oobs(float* y, int off) {
  __shared__ float s[64];
  s[threadIdx.x + off] = 1;
  __syncthreads();
  y[threadIdx.x] = s[threadIdx.x];
}

__global__ void misalign(const char* x, float4* y) {
  y[threadIdx.x] = *(const float4*)(x + 16 * threadIdx.x + 4);
}

__global__ void divbar(int* y) {
  if (threadIdx.x < 16) {
    __syncthreads();
    y[0] = 1;
  } else {
    y[1] = 2;
    __syncthreads();
    y[2] = 3;
  }
}

__global__ void deadbar(int* y) {
  if (threadIdx.x < 64) asm volatile("bar.sync 1, 128;");
  y[threadIdx.x] = 1;
}

__global__ void uninit(float* y) {
  __shared__ float s[64];
  if (threadIdx.x != 5) s[threadIdx.x] = 1;
  __syncthreads();
  y[threadIdx.x] = s[threadIdx.x];
}

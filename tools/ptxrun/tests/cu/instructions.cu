// Single instructions and the rarer things that threads do to one another.
#include <cooperative_groups.h>
#include <cooperative_groups/reduce.h>
#include <cooperative_groups/scan.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>
namespace cg = cooperative_groups;

__device__ __forceinline__ uint32_t sa(const void* p) {
  return (uint32_t)__cvta_generic_to_shared(p);
}

// o[k * n + i] = the result of an instruction on x (and y, z).
#define OF_X(k, s)                        \
  do {                                    \
    uint32_t d;                           \
    asm(s " %0, %1;" : "=r"(d) : "r"(x)); \
    o[(k) * n + i] = d;                   \
  } while (0)
#define OF_XY(k, s)                                   \
  do {                                                \
    uint32_t d;                                       \
    asm(s " %0, %1, %2;" : "=r"(d) : "r"(x), "r"(y)); \
    o[(k) * n + i] = d;                               \
  } while (0)
#define OF_XYZ(k, s)                                              \
  do {                                                            \
    uint32_t d;                                                   \
    asm(s " %0, %1, %2, %3;" : "=r"(d) : "r"(x), "r"(y), "r"(z)); \
    o[(k) * n + i] = d;                                           \
  } while (0)

// Bit fields, shifts, permutations and carries, in 32 and 64 bits.
__global__ void bits(const uint32_t* a, const uint32_t* b, const uint32_t* c, uint32_t* o,
                     uint64_t* q, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  uint32_t x = a[i], y = b[i], z = c[i];
  OF_XYZ(0, "bfe.u32");
  OF_XYZ(1, "bfe.s32");
  {
    uint32_t d;
    asm("bfi.b32 %0, %1, %2, %3, %4;" : "=r"(d) : "r"(x), "r"(a[(i + 1) % n]), "r"(y), "r"(z));
    o[2 * n + i] = d;
  }
  OF_XYZ(3, "shf.l.wrap.b32");
  OF_XYZ(4, "shf.r.wrap.b32");
  OF_XYZ(5, "shf.l.clamp.b32");
  OF_XYZ(6, "shf.r.clamp.b32");
  OF_XYZ(7, "prmt.b32");
  OF_X(8, "bfind.u32");
  OF_X(9, "bfind.s32");
  OF_X(10, "bfind.shiftamt.u32");
  OF_X(11, "brev.b32");
  OF_XY(12, "shl.b32");
  OF_XY(13, "shr.u32");
  OF_XY(14, "shr.s32");
  OF_XY(15, "add.sat.s32");
  OF_XY(16, "sub.sat.s32");
  OF_XY(17, "mul.hi.s32");
  OF_XYZ(18, "mad.hi.u32");
  OF_XYZ(19, "sad.s32");
  OF_XYZ(20, "prmt.b32.f4e");
  OF_XYZ(21, "prmt.b32.b4e");
  OF_XYZ(22, "prmt.b32.rc8");
  OF_XYZ(23, "prmt.b32.ecl");
  OF_XYZ(24, "prmt.b32.ecr");
  OF_XYZ(25, "prmt.b32.rc16");
  {
    uint32_t d;
    asm("cvt.sat.u8.s32 %0, %1;" : "=r"(d) : "r"(x));
    o[26 * n + i] = d;
    asm("cvt.sat.s8.s32 %0, %1;" : "=r"(d) : "r"(x));
    o[27 * n + i] = d;
    asm("cvt.s32.s8 %0, %1;" : "=r"(d) : "r"(x));
    o[28 * n + i] = d;
  }
  {
    uint32_t d;
    asm("slct.u32.s32 %0, %1, %2, %3;" : "=r"(d) : "r"(x), "r"(y), "r"(z));
    o[29 * n + i] = d;
    asm("lop3.b32 %0, %1, %2, %3, 0x5b;" : "=r"(d) : "r"(x), "r"(y), "r"(z));
    o[30 * n + i] = d;
  }
  {
    uint32_t d;
    asm("{ .reg .pred p, q; setp.lt.and.s32 p|q, %1, %2, 1; selp.u32 %0, 1, 0, p; @q add.u32 %0, "
        "%0, 2; }"
        : "=r"(d)
        : "r"(x), "r"(y));
    o[31 * n + i] = d;
  }
  {
    uint32_t d;
    asm("dp2a.lo.s32.u32 %0, %1, %2, %3;" : "=r"(d) : "r"(x), "r"(y), "r"(z));
    o[32 * n + i] = d;
    asm("set.gt.u32.s32 %0, %1, %2;" : "=r"(d) : "r"(x), "r"(y));
    o[33 * n + i] = d;
  }
  uint64_t X = ((uint64_t)x << 32) | y, Y = ((uint64_t)z << 32) | x, d;
  asm("bfe.u64 %0, %1, %2, %3;" : "=l"(d) : "l"(X), "r"(y & 127), "r"(z & 127));
  q[i] = d;
  asm("bfe.s64 %0, %1, %2, %3;" : "=l"(d) : "l"(X), "r"(y & 127), "r"(z & 127));
  q[n + i] = d;
  asm("bfi.b64 %0, %1, %2, %3, %4;" : "=l"(d) : "l"(X), "l"(Y), "r"(y & 127), "r"(z & 127));
  q[2 * n + i] = d;
  unsigned __int128 U = (unsigned __int128)X * Y + X;
  U = U - (((unsigned __int128)Y << 64) | Y);
  q[3 * n + i] = (uint64_t)U;
  q[4 * n + i] = (uint64_t)(U >> 64);
  asm("{ .reg .u32 a, b, c, e; mov.b64 {a, b}, %1; mov.b64 {c, e}, %2; add.cc.u32 a, a, c; "
      "addc.u32 b, b, e; mov.b64 %0, {a, b}; }"
      : "=l"(d)
      : "l"(X), "l"(Y));
  q[5 * n + i] = d;
  asm("{ .reg .u32 a, b, c, e; mov.b64 {a, b}, %1; mov.b64 {c, e}, %2; sub.cc.u32 a, a, c; "
      "subc.u32 b, b, e; mov.b64 %0, {a, b}; }"
      : "=l"(d)
      : "l"(X), "l"(Y));
  q[6 * n + i] = d;
  asm("shr.s64 %0, %1, %2;" : "=l"(d) : "l"(X), "r"(y & 127));
  q[7 * n + i] = d;
  asm("shl.b64 %0, %1, %2;" : "=l"(d) : "l"(X), "r"(y & 127));
  q[8 * n + i] = d;
}

// Every shuffle in segments of W lanes.
template <int W>
__global__ void shuf(const int* x, int* o, int n) {
  int i = threadIdx.x, v = x[i], k = 0;
  for (int d = 1; d < 40; d += 6) {
    o[(k++) * n + i] = __shfl_up_sync(~0u, v, d, W);
    o[(k++) * n + i] = __shfl_down_sync(~0u, v, d, W);
    o[(k++) * n + i] = __shfl_xor_sync(~0u, v, d & 31, W);
    o[(k++) * n + i] = __shfl_sync(~0u, v, i * d, W);
  }
}

template __global__ void shuf<32>(const int*, int*, int);
template __global__ void shuf<8>(const int*, int*, int);

// Two half warps in different branches, each with collectives of its own.
__global__ void halfmask(int* o) {
  int l = threadIdx.x & 31, v = threadIdx.x;
  if (l < 16) {
    for (int k = 0; k < l % 3; k++) v += 100;
    v += __shfl_xor_sync(0xffff, v, 1);
    v = __reduce_add_sync(0xffff, v);
  } else {
    v = __shfl_sync(0xffff0000u, v, 31);
    if (l & 1) v += __popc(__ballot_sync(0xaaaa0000u, l > 20));
    __syncwarp(0xffff0000u);
  }
  o[threadIdx.x] = v;
}

// Cooperative groups: tiles of a warp and coalesced threads.
__global__ void coop(const int* x, int* o) {
  auto b = cg::this_thread_block();
  auto t = cg::tiled_partition<8>(b);
  int v = x[b.thread_rank()];
  int s = cg::reduce(t, v, cg::plus<int>()), m = cg::reduce(t, v, cg::greater<int>());
  int e = cg::exclusive_scan(t, v);
  o[3 * b.thread_rank()] = s;
  o[3 * b.thread_rank() + 1] = m;
  o[3 * b.thread_rank() + 2] = e;
  if (v & 1) {
    auto a = cg::coalesced_threads();
    o[3 * blockDim.x + b.thread_rank()] = a.thread_rank() * 100 + a.size();
  }
  b.sync();
}

__device__ __noinline__ void addto(float* p, float v) { *p += v; }

// Generic pointers to global, shared or local memory, chosen at run time.
__global__ void generic(float* g, int n) {
  __shared__ float s[64];
  float l[2] = {1.f, 2.f};
  int t = threadIdx.x;
  s[t] = 3.f;
  __syncthreads();
  float* p = t % 3 == 0 ? &g[t] : t % 3 == 1 ? &s[t] : &l[t & 1];
  addto(p, 10.f);
  if (t % 3 == 1) atomicAdd(p, 1.f);
  __syncthreads();
  g[64 + t] = s[t];
  g[128 + t] = l[0] + 100 * l[1];
  g[192 + t] = __isShared(p) + 2 * __isLocal(p) + 4 * __isGlobal(p);
}

// cp.async of every size, and a group that is waited for later.
__global__ void cpa(const char* x, char* y, const int* sizes) {
  __shared__ __align__(16) char s[32 * 16 + 32 * 8 + 32 * 4];
  int t = threadIdx.x;
  asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;" ::"r"(sa(s + 16 * t)),
               "l"(x + 16 * t), "r"(sizes[t]));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(sa(s + 512 + 8 * t)),
               "l"(x + 8 * t));
  asm volatile("cp.async.commit_group;");
  if (t & 1)
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(sa(s + 768 + 4 * t)),
                 "l"(x + 4 * t));
  asm volatile("cp.async.commit_group;");
  asm volatile("cp.async.wait_group 1;");
  __syncthreads();
  for (int i = 0; i < 24; i++) y[t * 24 + i] = s[t * 24 + i];
  for (int i = 0; i < 4; i++) y[768 + t * 4 + i] = s[768 + t * 4 + i];
  asm volatile("cp.async.wait_all;");
  __syncthreads();
  for (int i = 0; i < 4; i++) y[896 + t * 4 + i] = s[768 + t * 4 + i];
}

// 8- and 16-bit integers and doubles over a grid and blocks of three dimensions.
__global__ void small(const int8_t* a, const uint8_t* b, const int16_t* c, int8_t* o, int16_t* p,
                      double2* d, int n) {
  int i = threadIdx.x + threadIdx.y * blockDim.x + threadIdx.z * blockDim.x * blockDim.y +
          (blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z)) * blockDim.x *
              blockDim.y * blockDim.z;
  if (i >= n) return;
  int8_t x = a[i];
  uint8_t y = b[i];
  int16_t z = c[i];
  o[i] = x * y + z;
  p[i] = (int16_t)(x * z) >> 3;
  double2 v = d[i];
  v.x = v.x * v.y + x;
  v.y = -v.y / (y + 1.0);
  d[i] = v;
}

// Atomics of f16x2, bf16x2 and f16.
__global__ void halfatom(__half2* h, __nv_bfloat162* b, __half* s, int n) {
  int i = threadIdx.x;
  atomicAdd(&h[i & 1], __halves2half2(__float2half(1.f), __float2half(0.5f)));
  atomicAdd(&b[0], __floats2bfloat162_rn(1.f, 2.f));
  atomicAdd(s, __float2half(0.25f));
}

// Compiled with -use_fast_math too.
__global__ void fastm(const float* a, float* o, int n) {
  int i = threadIdx.x;
  float x = a[i];
  o[i] = __expf(x) / (1.f + x * x);
  o[n + i] = sinf(x) * rsqrtf(fabsf(x));
  o[2 * n + i] = tanhf(x);
  o[3 * n + i] = sqrtf(fabsf(x)) + __fdividef(x, 3.f);
  o[4 * n + i] = x * 1e-38f * 0.1f;
  o[5 * n + i] = __frcp_rn(x) + log2f(fabsf(x));
}

// A persistent loop that takes its work from a queue.
__global__ void queue(int* ctr, int* out, int n) {
  __shared__ int item;
  while (true) {
    if (threadIdx.x == 0) item = atomicAdd(ctr, 1);
    __syncthreads();
    int it = item;
    __syncthreads();
    if (it >= n) return;
    for (int k = threadIdx.x; k < it; k += blockDim.x) atomicAdd(&out[it], k);
  }
}

// A warp spins on a flag that another one sets.
__device__ volatile int flag;

__global__ void flags(int* o) {
  if (threadIdx.x < 32) {
    while (flag == 0) {
    }
    o[threadIdx.x] = flag;
  } else {
    int s = 0;
    for (int i = 0; i < 50; i++) s += o[64 + (i ^ s & 1)];
    if (threadIdx.x == 40) {
      __threadfence();
      flag = 7 + 0 * s;
    }
  }
}

__device__ int fib(int n) {
  int a = 0, b = 1;
  while (n-- > 0) {
    int c = a + b;
    a = b;
    b = c;
  }
  return a;
}

// break, continue and early ends of nested divergent loops, and a shuffle after them.
__global__ void deep(const int* x, int* o, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  int acc = 0;
  for (int a = 0; a < x[i]; a++) {
    for (int b = 0; b < a; b++) {
      if ((a * b + i) % 7 == 3) break;
      if ((a ^ b) & 1) continue;
      acc += fib(b % 9);
    }
    if (acc > 500) break;
  }
  acc += __shfl_xor_sync(~0u, acc, 16);
  o[i] = acc;
}

// Lanes of a warp exchange values with and without __syncwarp.
__global__ void warprace(const int* x, int* y, int sync) {
  __shared__ int s[64];
  s[threadIdx.x] = x[threadIdx.x];
  if (sync & 1) __syncwarp();
  int v = s[threadIdx.x ^ 1];
  if (sync & 2) __syncwarp();
  s[threadIdx.x] = v + 1;
  y[threadIdx.x] = v + s[threadIdx.x];
}

// Warp 0 produces and warps 1 to 3 consume, through named barriers.
__global__ void wspec(const float* x, float* y, int iters) {
  __shared__ float buf[2][96];
  int w = threadIdx.x >> 5, l = threadIdx.x & 31;
  if (w == 0) {
    for (int it = 0; it < iters; it++) {
      if (it >= 2) asm volatile("bar.sync %0, 128;" ::"r"(3 + (it & 1)) : "memory");
      for (int k = 0; k < 3; k++) buf[it & 1][k * 32 + l] = x[it * 96 + k * 32 + l];
      asm volatile("bar.arrive %0, 128;" ::"r"(1 + (it & 1)) : "memory");
    }
  } else {
    float a = 0;
    for (int it = 0; it < iters; it++) {
      asm volatile("bar.sync %0, 128;" ::"r"(1 + (it & 1)) : "memory");
      float v = buf[it & 1][(w - 1) * 32 + l];
      for (int o = 16; o; o >>= 1) v += __shfl_xor_sync(~0u, v, o);
      a = a * 0.5f + v;
      if (it + 2 < iters) asm volatile("bar.arrive %0, 128;" ::"r"(3 + (it & 1)) : "memory");
    }
    if (l == 0) y[blockIdx.x * 3 + w - 1] = a;
  }
}

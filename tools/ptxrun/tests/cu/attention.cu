// Flash attention, forward.
#include <cuda_bf16.h>
#include <stdint.h>

__device__ __forceinline__ uint32_t sa(const void* p) {
  return (uint32_t)__cvta_generic_to_shared(p);
}

__device__ __forceinline__ void mma(float* c, const uint32_t* a, uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void ldm4(uint32_t* r, uint32_t p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(p));
}

__device__ __forceinline__ void ldm4t(uint32_t* r, uint32_t p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(p));
}

__device__ __forceinline__ float ex2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ uint32_t pk(float lo, float hi) {
  uint32_t d;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(hi), "f"(lo));
  return d;
}

struct AttnArgs {
  const __nv_bfloat16 *q, *k, *v;
  __nv_bfloat16* o;
  float* lse;
  int S;
  float scale;
  int causal;
};

// A block takes 64 queries of one head with 4 warps. Tiles of 64 rows x 64 dimensions are swizzled
// in shared memory; K and V are double-buffered.
__global__ void __launch_bounds__(128) attn(const AttnArgs a) {
  extern __shared__ __align__(128) uint4 smem[];  // Q 8 KB, then 2 x (K 8 KB, V 8 KB)
  const int t = threadIdx.x, w = t >> 5, l = t & 31, g = l >> 2, c2 = (l & 3) * 2,
            q0 = blockIdx.x * 64;
  const size_t h = (size_t)blockIdx.y * a.S * 64;
  auto load = [&](uint4* dst, const __nv_bfloat16* src, int r0) {
    for (int i = t; i < 512; i += 128) {
      int r = i >> 3, q = i & 7;
      bool ok = r0 + r < a.S;
      asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(
                       sa(dst + r * 8 + (q ^ (r & 7)))),
                   "l"(src + h + (size_t)(ok ? r0 + r : 0) * 64 + q * 8), "r"(ok ? 16 : 0));
    }
  };
  load(smem, a.q, q0);
  int nt = a.causal ? (min(q0 + 64, a.S) + 63) / 64 : (a.S + 63) / 64;
  load(smem + 512, a.k, 0);
  load(smem + 1024, a.v, 0);
  asm volatile("cp.async.commit_group;");
  float o[8][4] = {}, m[2] = {-INFINITY, -INFINITY}, s[2] = {0, 0};
  uint32_t qf[4][4];
  const float sc = a.scale * 1.44269504f;
  for (int it = 0; it < nt; it++) {
    uint4 *K = smem + 512 + (it & 1) * 1024, *V = K + 512;
    if (it + 1 < nt) {
      uint4* N = smem + 512 + ((it + 1) & 1) * 1024;
      load(N, a.k, (it + 1) * 64);
      load(N + 512, a.v, (it + 1) * 64);
    }
    asm volatile("cp.async.commit_group;\ncp.async.wait_group 1;");
    __syncthreads();
    if (it == 0)
      for (int kk = 0; kk < 4; kk++) {
        int r = w * 16 + (l & 15), q = kk * 2 + (l >> 4);
        ldm4(qf[kk], sa(smem + r * 8 + (q ^ (r & 7))));
      }
    float p[8][4] = {};
    for (int j = 0; j < 8; j += 2)
      for (int kk = 0; kk < 4; kk++) {
        uint32_t b[4];
        int r = j * 8 + (l & 7) + ((l >> 4) << 3), q = kk * 2 + ((l >> 3) & 1);
        ldm4(b, sa(K + r * 8 + (q ^ (r & 7))));
        mma(p[j], qf[kk], b[0], b[1]);
        mma(p[j + 1], qf[kk], b[2], b[3]);
      }
    for (int hh = 0; hh < 2; hh++) {
      float mx = m[hh];
      int row = q0 + w * 16 + g + 8 * hh;
      for (int j = 0; j < 8; j++)
        for (int e = 0; e < 2; e++) {
          int col = it * 64 + j * 8 + c2 + e;
          float& x = p[j][2 * hh + e];
          x = (col < a.S && (!a.causal || col <= row)) ? x * sc : -INFINITY;
          mx = fmaxf(mx, x);
        }
      mx = fmaxf(mx, __shfl_xor_sync(~0u, mx, 1));
      mx = fmaxf(mx, __shfl_xor_sync(~0u, mx, 2));
      float f = mx == -INFINITY ? 1.f : ex2(m[hh] - mx), u = mx == -INFINITY ? 0.f : mx, sum = 0;
      for (int j = 0; j < 8; j++)
        for (int e = 0; e < 2; e++) {
          float& x = p[j][2 * hh + e];
          x = ex2(x - u);
          sum += x;
        }
      s[hh] = s[hh] * f + sum;
      m[hh] = mx;
      for (int j = 0; j < 8; j++) {
        o[j][2 * hh] *= f;
        o[j][2 * hh + 1] *= f;
      }
    }
    for (int kk = 0; kk < 4; kk++) {
      uint32_t pa[4] = {pk(p[2 * kk][0], p[2 * kk][1]), pk(p[2 * kk][2], p[2 * kk][3]),
                        pk(p[2 * kk + 1][0], p[2 * kk + 1][1]),
                        pk(p[2 * kk + 1][2], p[2 * kk + 1][3])};
      for (int j = 0; j < 8; j += 2) {
        uint32_t b[4];
        int r = kk * 16 + (l & 15), q = j + (l >> 4);
        ldm4t(b, sa(V + r * 8 + (q ^ (r & 7))));
        mma(o[j], pa, b[0], b[1]);
        mma(o[j + 1], pa, b[2], b[3]);
      }
    }
    __syncthreads();
  }
  for (int hh = 0; hh < 2; hh++) {
    s[hh] += __shfl_xor_sync(~0u, s[hh], 1);
    s[hh] += __shfl_xor_sync(~0u, s[hh], 2);
    int row = q0 + w * 16 + g + 8 * hh;
    if (row >= a.S) continue;
    float r = 1.f / s[hh];
    for (int j = 0; j < 8; j++)
      *(uint32_t*)&a.o[h + (size_t)row * 64 + j * 8 + c2] =
          pk(o[j][2 * hh] * r, o[j][2 * hh + 1] * r);
    if (c2 == 0) a.lse[(size_t)blockIdx.y * a.S + row] = m[hh] * 0.69314718f + logf(s[hh]);
  }
}

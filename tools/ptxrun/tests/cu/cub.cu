// Library code: CUB sorts, scans and reduces.
#include <cub/cub.cuh>

__global__ void sortk(const int* x, int* y, int* z) {
  using S = cub::BlockRadixSort<int, 128, 4>;
  using C = cub::BlockScan<int, 128>;
  using R = cub::BlockReduce<float, 128>;
  __shared__ typename S::TempStorage ts;
  __shared__ typename C::TempStorage tc;
  __shared__ typename R::TempStorage tr;
  int k[4];
  for (int i = 0; i < 4; i++) k[i] = x[blockIdx.x * 512 + threadIdx.x * 4 + i];
  S(ts).Sort(k);
  for (int i = 0; i < 4; i++) y[blockIdx.x * 512 + threadIdx.x * 4 + i] = k[i];
  int s;
  C(tc).InclusiveSum(threadIdx.x + 1, s);
  z[blockIdx.x * 128 + threadIdx.x] = s;
  float f = R(tr).Sum(float(threadIdx.x));
  if (threadIdx.x == 0) z[gridDim.x * 128 + blockIdx.x] = f;
}

__global__ void wsort(const int* x, int* y) {
  using W = cub::WarpMergeSort<int, 2, 32>;
  __shared__ typename W::TempStorage t[2];
  int w = threadIdx.x / 32;
  int k[2];
  for (int i = 0; i < 2; i++) k[i] = x[threadIdx.x * 2 + i];
  W(t[w]).Sort(k, [](int a, int b) { return a < b; });
  for (int i = 0; i < 2; i++) y[threadIdx.x * 2 + i] = k[i];
}

// PTX instructions without a C++ name.
#pragma once

#include <stdint.h>

namespace tokendance::cuda {

// Address of shared memory as instructions on shared memory take it.
__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Reads 16 bytes of shared memory in one access, even if only some of them are used.
__device__ __forceinline__ int4 load_shared_16(const void* shared) {
  int4 words;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
               : "r"(shared_address(shared))
               : "memory");
  return words;
}

// Writes 16 bytes of global memory in one access.
__device__ __forceinline__ void store_global_16(void* global, const int4& words) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(global), "r"(words.x), "r"(words.y),
               "r"(words.z), "r"(words.w)
               : "memory");
}

// Copies 16 bytes from global to shared memory past the registers and L1, asynchronously: they are
// there after the wait for their group, for other threads after a barrier behind that wait.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)),
               "l"(global)
               : "memory");
}

// The same of 4 or 8 bytes, which only go by way of L1.
template <int kBytes>
__device__ __forceinline__ void cp_async_through_l1(void* shared, const void* global) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(shared_address(shared)),
               "l"(global), "n"(kBytes)
               : "memory");
}

// As cp_async_16, but writes zeros without reading where `read` is false.
__device__ __forceinline__ void cp_async_16_or_zero(void* shared, const void* global, bool read) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(global), "r"(read ? 16 : 0)
               : "memory");
}

// Closes the group of this thread's copies since the last commit.
__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most the `kPending` newest groups of this thread are under way.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Waits until the launch before this one in its stream has ended, and what it wrote is there. Only
// a kernel that is launched to begin earlier has anything to wait for (KernelLaunch::waits); what
// it reads before must not be what that launch writes, nor be read through the read-only cache
// later.
__device__ __forceinline__ void wait_for_launch_before() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets a launch that waits for this one begin where there is room for its blocks. It sees what this
// one writes nevertheless.
__device__ __forceinline__ void let_next_launch_begin() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// The same value, which is below kBound, unknown to the compiler: addresses that are made of it are
// made where they are used, instead of occupying registers from before the loop around them on.
template <uint32_t kBound>
__device__ __forceinline__ uint32_t recomputed(uint32_t value) {
  asm volatile("" : "+r"(value));
  return value % kBound;
}

// 2^x, to two units in the last place; 0 for -inf, and for results below 2^-126.
__device__ __forceinline__ float fast_exp2(float x) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
}

}  // namespace tokendance::cuda

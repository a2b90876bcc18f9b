// csrc/cuda/launch.cuh with a runtime that keeps what it is told and refuses what CUDA would: the
// argument names the case. tests/test_launcher.py builds and runs it.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <map>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "cuda/launch.cuh"

#define CHECK(condition)                                                      \
  do {                                                                        \
    if (!(condition)) {                                                       \
      fprintf(stderr, "%s:%d: failed: %s\n", __FILE__, __LINE__, #condition); \
      exit(1);                                                                \
    }                                                                         \
  } while (0)

namespace {

constexpr size_t kStaticBytes = 1000;
constexpr int kUnasked = 48 * 1024;

thread_local int current_device = 0;
std::mutex mutex;
std::map<std::pair<const void*, int>, int> allowed;  // of a kernel and a device
int times_set = 0, launches = 0, early_launches = 0;
int ptx_version = 80;
cudaError_t refusal = cudaSuccess;

struct Params {
  int value;
};
void first_kernel(Params, tokendance::Tile) {}
void second_kernel(Params, tokendance::Tile) {}
constexpr void (*kKernels[])(Params, tokendance::Tile) = {first_kernel, second_kernel};

tokendance::LaunchPlan plan_of(int kernel, int64_t shared_bytes, bool waits = false) {
  tokendance::LaunchPlan plan = {};
  tokendance::add_launch(&plan, "kernel", kernel, 3, 2, 1, 64, shared_bytes, {5, 0, 0, 0});
  plan.launches[0].waits = waits;
  return plan;
}

int run(const tokendance::LaunchPlan& plan) {
  return tokendance::cuda::launch(plan, kKernels, Params{7}, nullptr);
}

// Two threads that need different amounts of one kernel, at once and again and again.
void test_threads() {
  auto many = [](int64_t bytes) {
    for (int i = 0; i < 2000; ++i) CHECK(run(plan_of(0, bytes)) == cudaSuccess);
  };
  std::thread small(many, 50 * 1024), large(many, 90 * 1024);
  small.join();
  large.join();
  CHECK(launches == 4000);
  CHECK(times_set >= 1 && times_set <= 2);  // once by each thread at most
}

void test_devices() {
  for (int device : {0, 1, 0, 63, 64, 64, 1}) {
    current_device = device;
    CHECK(run(plan_of(0, 90 * 1024)) == cudaSuccess);
  }
  CHECK(times_set == 3 + 2);  // a device beyond those that are remembered is asked again
  CHECK(run(plan_of(1, 90 * 1024)) == cudaSuccess);
  CHECK(times_set == 6);
  CHECK(allowed[std::make_pair(reinterpret_cast<const void*>(first_kernel), 0)] ==
        static_cast<int>(tokendance::kMaxSharedBytes - kStaticBytes));
}

void test_little_shared_memory() {
  CHECK(run(plan_of(0, kUnasked)) == cudaSuccess);
  CHECK(times_set == 0 && launches == 1 && early_launches == 0);
}

// Only what was compiled with the wait may begin early.
void test_waits() {
  CHECK(run(plan_of(0, 0, true)) == cudaSuccess);
  CHECK(launches == 1 && early_launches == 0);
  ptx_version = 90;
  CHECK(run(plan_of(1, 0, true)) == cudaSuccess);
  CHECK(launches == 2 && early_launches == 1);
  CHECK(run(plan_of(1, 0, false)) == cudaSuccess);
  CHECK(launches == 3 && early_launches == 1);
}

// A kernel that could not be made ready is tried again.
void test_refusals() {
  refusal = cudaErrorInvalidValue;
  CHECK(run(plan_of(0, 90 * 1024)) == cudaErrorInvalidValue);
  CHECK(launches == 0);
  refusal = cudaSuccess;
  CHECK(run(plan_of(0, 90 * 1024)) == cudaSuccess);
  CHECK(launches == 1 && times_set == 1);
  CHECK(run(plan_of(0, 100 * 1024)) == cudaErrorInvalidValue);  // more than any plan asks for
}

// Every number around multiples of what may be divided by, up to the last of 32 bits.
void test_divisors() {
  for (int64_t value = 1; value < 3000; value += value < 300 ? 1 : 97) {
    const tokendance::Divisor by = tokendance::make_divisor(value);
    CHECK(by.value == value);
    const auto divisor = static_cast<uint32_t>(value);
    auto check = [&](uint32_t number) {
      CHECK(tokendance::quotient(number, by) == number / divisor);
    };
    for (uint32_t number = 0; number < 5000; ++number) check(number);
    for (uint32_t number = 0xffffffffu; number > 0xffffe000u; --number) check(number);
    for (uint64_t multiple = divisor; multiple >> 32 == 0; multiple = multiple * 5 / 3 + divisor) {
      const auto whole = static_cast<uint32_t>(multiple / divisor * divisor);
      check(whole - 1);
      check(whole);
    }
  }
}

}  // namespace

cudaError_t cudaGetDevice(int* device) {
  *device = current_device;
  return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  *attributes = {kStaticBytes, ptx_version};
  return refusal;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  CHECK(attribute == cudaFuncAttributeMaxDynamicSharedMemorySize);
  const std::lock_guard<std::mutex> lock(mutex);
  allowed[{kernel, current_device}] = value;
  ++times_set;
  return refusal;
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel,
                                void** arguments) {
  CHECK(config->gridDim.x == 3 && config->gridDim.y == 2 && config->gridDim.z == 1);
  CHECK(config->blockDim.x == 64 && config->blockDim.y == 1 && config->blockDim.z == 1);
  CHECK(static_cast<const Params*>(arguments[0])->value == 7);
  CHECK(static_cast<const tokendance::Tile*>(arguments[1])->rows == 5);
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = allowed.find({kernel, current_device});
  const int most = found == allowed.end() ? kUnasked : found->second;
  if (config->dynamicSmemBytes > static_cast<size_t>(most)) return cudaErrorInvalidValue;
  ++launches;
  if (config->numAttrs == 1) {
    CHECK(config->attrs[0].id == cudaLaunchAttributeProgrammaticStreamSerialization);
    CHECK(config->attrs[0].val.programmaticStreamSerializationAllowed == 1);
    ++early_launches;
  }
  return cudaSuccess;
}

int main(int, char** arguments) {
  const std::map<std::string, void (*)()> cases = {
      {"threads", test_threads},
      {"devices", test_devices},
      {"little_shared_memory", test_little_shared_memory},
      {"waits", test_waits},
      {"refusals", test_refusals},
      {"divisors", test_divisors},
  };
  cases.at(arguments[1])();
  return 0;
}

// How this binary was built, for bug reports: read by tokendance.cli.info through ctypes, so that
// it can be asked even where torch cannot run an operator.
#include <exception>
#include <string>

#include "tokendance/launch.h"
#include "tokendance/round.h"

#define TOKENDANCE_EXPORT extern "C" __attribute__((visibility("default")))

// "name: value" lines. CMakeLists.txt defines the values.
TOKENDANCE_EXPORT const char* tokendance_build_options() {
  return "version: " TOKENDANCE_VERSION
         "\n"
         "build type: " TOKENDANCE_BUILD_TYPE
         "\n"
         "compiler: " TOKENDANCE_COMPILER
         "\n"
         "target: " TOKENDANCE_TARGET
         "\n"
         "built against torch: " TOKENDANCE_BUILD_TORCH
         "\n"
         "CUDA compiler: " TOKENDANCE_BUILD_CUDA
         "\n"
         "CPU instruction sets: " TOKENDANCE_BUILD_ISAS;
}

// The instruction set in use, or the error text that every CPU operator would raise.
TOKENDANCE_EXPORT const char* tokendance_cpu_isa() {
  try {
    return tokendance::cpu_isa();
  } catch (const std::exception& error) {
    static std::string message;
    message = error.what();
    return message.c_str();
  }
}

// Of the rounds that the operators and kernels read.
TOKENDANCE_EXPORT int32_t tokendance_round_version() { return tokendance::kRoundVersion; }

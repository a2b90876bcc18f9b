// Choice of the instruction set that the CPU launches use.
#pragma once

#include "tokendance/launch.h"

namespace tokendance {

enum class Isa { kPortable, kAvx2, kAvx512 };

// The best instruction set of this machine, or the one that TOKENDANCE_CPU_ISA names; read once.
// Throws std::runtime_error if the variable names one that the machine or this build lacks.
Isa selected_isa();

// Whether the kernels for x86-64 are in this build.
#if defined(__x86_64__) && !defined(TOKENDANCE_PORTABLE)
#define TOKENDANCE_X86 1
#else
#define TOKENDANCE_X86 0
#endif

}  // namespace tokendance

// Defines the launch function cpu_<op>, which calls the <op> that csrc/cpu/kernels/<op>.cpp defines
// once per instruction set in the namespaces portable, avx2 and avx512.
#if TOKENDANCE_X86
#define TOKENDANCE_CPU_LAUNCH(op, Params)                         \
  namespace tokendance {                                          \
  namespace portable {                                            \
  void op(const Params& params, ParallelFor parallel_for);        \
  }                                                               \
  namespace avx2 {                                                \
  void op(const Params& params, ParallelFor parallel_for);        \
  }                                                               \
  namespace avx512 {                                              \
  void op(const Params& params, ParallelFor parallel_for);        \
  }                                                               \
  void cpu_##op(const Params& params, ParallelFor parallel_for) { \
    switch (selected_isa()) {                                     \
      case Isa::kAvx512:                                          \
        return avx512::op(params, parallel_for);                  \
      case Isa::kAvx2:                                            \
        return avx2::op(params, parallel_for);                    \
      case Isa::kPortable:                                        \
        return portable::op(params, parallel_for);                \
    }                                                             \
  }                                                               \
  }
#else
#define TOKENDANCE_CPU_LAUNCH(op, Params)                         \
  namespace tokendance {                                          \
  namespace portable {                                            \
  void op(const Params& params, ParallelFor parallel_for);        \
  }                                                               \
  void cpu_##op(const Params& params, ParallelFor parallel_for) { \
    portable::op(params, parallel_for);                           \
  }                                                               \
  }
#endif

#include "cpu/isa.h"

#include <stdlib.h>

#include <stdexcept>
#include <string>

namespace tokendance {
namespace {

bool machine_has(Isa isa) {
#if TOKENDANCE_X86
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  switch (isa) {
    case Isa::kPortable:
      return true;
    case Isa::kAvx2:
      return avx2;
    case Isa::kAvx512:
      return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  }
  return false;
#else
  return isa == Isa::kPortable;
#endif
}

const char* name_of(Isa isa) {
  switch (isa) {
    case Isa::kPortable:
      return "portable";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kAvx512:
      return "avx512";
  }
  return "";
}

Isa choose_isa() {
  const Isa best_first[] = {Isa::kAvx512, Isa::kAvx2, Isa::kPortable};
  const char* wanted = getenv("TOKENDANCE_CPU_ISA");
  std::string available;
  for (Isa isa : best_first) {
    if (!machine_has(isa)) continue;
    if (!wanted || !*wanted || std::string(wanted) == name_of(isa)) return isa;
    available += (available.empty() ? "" : ", ") + std::string(name_of(isa));
  }
  throw std::runtime_error("TOKENDANCE_CPU_ISA: expected one of " + available + ", got " + wanted);
}

}  // namespace

Isa selected_isa() {
  static const Isa isa = choose_isa();
  return isa;
}

const char* cpu_isa() { return name_of(selected_isa()); }

}  // namespace tokendance

// Calling a ParallelFor with a lambda, and work items of unequal cost.
//
// Include only from csrc/cpu/kernels: everything stands in the namespace TOKENDANCE_ISA.
#pragma once

#include <atomic>

#include "tokendance/launch.h"

namespace tokendance::TOKENDANCE_ISA {

// body(begin, end) on ranges that cover [0, count).
template <typename Body>
inline void parallel_ranges(ParallelFor parallel_for, int64_t count, int64_t grain,
                            const Body& body) {
  parallel_for(
      0, count, grain > 0 ? grain : 1,
      [](int64_t begin, int64_t end, void* context) {
        (*static_cast<const Body*>(context))(begin, end);
      },
      const_cast<Body*>(&body));
}

// body(next) on each thread, where next() gives the items 0 .. count-1, each to one caller, and
// then -1. Threads take items as they get free, whatever ranges the ParallelFor would give them.
template <typename Body>
inline void parallel_items(ParallelFor parallel_for, int64_t count, const Body& body) {
  std::atomic<int64_t> taken{0};
  parallel_ranges(parallel_for, count, 1, [&](int64_t, int64_t) {
    body([&]() -> int64_t {
      const int64_t item = taken.fetch_add(1, std::memory_order_relaxed);
      return item < count ? item : -1;
    });
  });
}

}  // namespace tokendance::TOKENDANCE_ISA

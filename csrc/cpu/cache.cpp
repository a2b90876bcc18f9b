#include "cpu/cache.h"

#include <unistd.h>

namespace tokendance {
namespace {

int64_t read_cache_size() {
#if defined(_SC_LEVEL3_CACHE_SIZE)
  const long size = sysconf(_SC_LEVEL3_CACHE_SIZE);
  if (size > 0) return size;
#endif
  return int64_t{32} << 20;  // where the system does not tell: what a server core complex has
}

}  // namespace

int64_t last_level_cache_bytes() {
  static const int64_t size = read_cache_size();
  return size;
}

}  // namespace tokendance

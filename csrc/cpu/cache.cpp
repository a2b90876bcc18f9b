#include "cpu/cache.h"

#include <stdio.h>

namespace tokendance {
namespace {

// Linux's own account of the caches. sysconf asks the processor instead, and on AMD adds up the
// last level of a whole socket, though a core reaches only its own part.
int64_t read_cache_size() {
  FILE* file = fopen("/sys/devices/system/cpu/cpu0/cache/index3/size", "r");
  int64_t kibibytes = 0;
  if (file) {
    long long value = 0;
    if (fscanf(file, "%lldK", &value) == 1) kibibytes = value;
    fclose(file);
  }
  return (kibibytes > 0 ? kibibytes : int64_t{32} << 10) << 10;
}

}  // namespace

int64_t last_level_cache_bytes() {
  static const int64_t size = read_cache_size();
  return size;
}

}  // namespace tokendance

#pragma once

#include <stdint.h>

namespace tokendance {

// Size of the last cache level, beyond which writes are streamed.
int64_t last_level_cache_bytes();

}  // namespace tokendance

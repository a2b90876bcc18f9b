#include "cpu/isa.h"

TOKENDANCE_CPU_LAUNCH(key_deviation, KeyDeviationParams)

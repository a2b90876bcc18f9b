#include "cpu/isa.h"

TOKENDANCE_CPU_LAUNCH(rope_rotate, RopeRotateParams)

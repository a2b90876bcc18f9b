#include "cpu/isa.h"

TOKENDANCE_CPU_LAUNCH(diff_restore, DiffRestoreParams)

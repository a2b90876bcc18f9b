#include "cpu/isa.h"

TOKENDANCE_CPU_LAUNCH(merge_states, MergeStatesParams)

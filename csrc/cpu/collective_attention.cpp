#include "cpu/isa.h"

TOKENDANCE_CPU_LAUNCH(collective_attention, CollectiveAttentionParams)

#include "tokendance/coded_pages.h"

#include "cpu/isa.h"

TOKENDANCE_CPU_LAUNCH(encode_pages, CodedPagesParams)
TOKENDANCE_CPU_LAUNCH(decode_pages, CodedPagesParams)

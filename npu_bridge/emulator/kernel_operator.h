// What a kernel for Ascend 910B includes, emulated on the host. See README.md.
#pragma once

#include "copy.h"
#include "cube.h"
#include "reduce.h"
#include "sync.h"
#include "tensors.h"
#include "vector.h"

#define __global__
#define __aicore__
#define __gm__
#define __mix__(cube, vector)
#define __schedmode__(mode)
#define GM_ADDR uint8_t*
#define ASCEND_IS_AIC (::AscendC::is_core(::AscendC::emulator::CoreKind::AIC))
#define ASCEND_IS_AIV (::AscendC::is_core(::AscendC::emulator::CoreKind::AIV))
#define KERNEL_TASK_TYPE_DEFAULT(kind)

// What the framework of operator packages gives a kernel's entry.
#pragma once

#include "kernel_operator.h"

#define REGISTER_TILING_DEFAULT(type) using RegisteredTiling = type
#define GET_TILING_DATA(numbers, tiling) \
    const RegisteredTiling numbers = *reinterpret_cast<const RegisteredTiling*>(tiling)

inline GM_ADDR GetUserWorkspace(GM_ADDR workspace) { return workspace; }

#pragma once

#include <vector>

#include "acl/acl.h"

#define ACLRT_LAUNCH_KERNEL(kernel) aclrtlaunch_##kernel

namespace fake {
uint32_t Launch(uint32_t cores, const std::vector<uint8_t*>& arguments);  // in device.cpp
}

template <class... A>
uint32_t aclrtlaunch_pasa_attention(uint32_t cores, aclrtStream, A... arguments) {
    return fake::Launch(cores, {arguments...});
}

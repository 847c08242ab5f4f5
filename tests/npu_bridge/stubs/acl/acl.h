// A device that is the host's own memory. FAKE_ACL_FAIL=NAME in the environment lets that call fail.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>

using aclError = int;
using aclrtStream = void*;
enum aclrtMemMallocPolicy { ACL_MEM_MALLOC_HUGE_FIRST };
enum aclrtMemcpyKind { ACL_MEMCPY_HOST_TO_DEVICE = 1, ACL_MEMCPY_DEVICE_TO_HOST = 2 };
enum aclDeviceInfo { ACL_DEVICE_INFO_AI_CORE_NUM };
enum aclrtDevAttr { ACL_DEV_ATTR_CUBE_CORE_NUM = 102 };

namespace fake {

constexpr aclError FAILED = 507899;
constexpr int64_t CORES = 2;

struct Allocation {
    size_t bytes;
    bool written;  // by the host
};

inline std::map<uint8_t*, Allocation> memory;

inline aclError Result(const char* call) {
    const char* failing = std::getenv("FAKE_ACL_FAIL");
    return failing != nullptr && std::strcmp(failing, call) == 0 ? FAILED : 0;
}

}  // namespace fake

inline aclError aclInit(const char*) { return fake::Result("aclInit"); }
inline aclError aclFinalize() { return fake::memory.empty() ? 0 : fake::FAILED; }
inline aclError aclrtSetDevice(int32_t) { return fake::Result("aclrtSetDevice"); }
inline aclError aclrtResetDevice(int32_t) { return 0; }
inline aclError aclrtCreateStream(aclrtStream*) { return 0; }
inline aclError aclrtDestroyStream(aclrtStream) { return 0; }
inline aclError aclrtSynchronizeStream(aclrtStream) { return fake::Result("aclrtSynchronizeStream"); }
inline aclError aclGetDeviceCapability(uint32_t, aclDeviceInfo, int64_t* value) {
    *value = fake::CORES;
    return 0;
}
inline aclError aclrtGetDeviceInfo(uint32_t, aclrtDevAttr, int64_t* value) {
    *value = fake::CORES;
    return 0;
}
inline aclError aclrtMalloc(void** at, size_t bytes, aclrtMemMallocPolicy) {
    auto* place = new uint8_t[bytes];
    fake::memory[place] = {bytes, false};
    *at = place;
    return fake::Result("aclrtMalloc");
}
inline aclError aclrtFree(void* at) {
    delete[] static_cast<uint8_t*>(at);
    return fake::memory.erase(static_cast<uint8_t*>(at)) == 1 ? 0 : fake::FAILED;
}
inline aclError aclrtMemcpy(void* to, size_t room, const void* from, size_t bytes, aclrtMemcpyKind kind) {
    const bool up = kind == ACL_MEMCPY_HOST_TO_DEVICE;
    auto* place = static_cast<uint8_t*>(up ? to : const_cast<void*>(from));
    const auto found = fake::memory.find(place);
    if (found == fake::memory.end() || bytes > room || bytes > found->second.bytes) return fake::FAILED;
    std::memcpy(to, from, bytes);
    found->second.written |= up;
    return 0;
}

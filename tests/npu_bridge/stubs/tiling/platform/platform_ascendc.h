#pragma once

#include <cstdint>

namespace fe {
class PlatFormInfos;
}

namespace platform_ascendc {
class PlatformAscendC {
public:
    explicit PlatformAscendC(fe::PlatFormInfos* info);
    uint32_t GetCoreNumAic() const;
    uint32_t GetLibApiWorkSpaceSize() const;
};
}  // namespace platform_ascendc

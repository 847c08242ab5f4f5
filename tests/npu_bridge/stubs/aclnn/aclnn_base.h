#pragma once

#include "acl/acl.h"

using aclnnStatus = int;
struct aclTensor;
struct aclOpExecutor;
enum aclFormat { ACL_FORMAT_ND = 2 };
enum aclDataType { ACL_FLOAT = 0, ACL_FLOAT16 = 1, ACL_INT32 = 3, ACL_UINT8 = 4, ACL_BF16 = 27 };

aclTensor* aclCreateTensor(const int64_t* shape, uint64_t axes, aclDataType type, const int64_t* strides,
                           int64_t offset, aclFormat format, const int64_t* storage, uint64_t storageAxes,
                           void* data);
aclnnStatus aclDestroyTensor(const aclTensor* tensor);

// As the framework writes it for a kernel with every input, the shift 'paper' and two outputs; and for
// one of packed sequences with sinks and two outputs.
#pragma once

#include "aclnn/aclnn_base.h"

aclnnStatus aclnnPasaAttentionGetWorkspaceSize(
    const aclTensor* query, const aclTensor* key, const aclTensor* value, const aclTensor* bias,
    const aclTensor* mask, const aclTensor* querySegments, const aclTensor* keySegments,
    const aclTensor* sinks, const aclTensor* lengths, const aclTensor* matrices,
    const aclTensor* weights, double scale,
    const aclTensor* outputOut, const aclTensor* lseOut, uint64_t* workspaceSize, aclOpExecutor** executor);
aclnnStatus aclnnPasaAttentionGetWorkspaceSize(
    const aclTensor* query, const aclTensor* key, const aclTensor* value, const aclTensor* sinks,
    const aclTensor* queryOffsets, const aclTensor* keyOffsets, double scale,
    const aclTensor* outputOut, const aclTensor* lseOut, uint64_t* workspaceSize, aclOpExecutor** executor);
aclnnStatus aclnnPasaAttention(void* workspace, uint64_t size, aclOpExecutor* executor, aclrtStream stream);

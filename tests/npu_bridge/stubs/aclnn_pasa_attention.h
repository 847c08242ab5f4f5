// As the framework writes it for a kernel with every input, the shift 'paper' and two outputs; for one of
// packed sequences with sinks and two outputs; and for one of lists of tiles and functions.
#pragma once

#include "aclnn/aclnn_base.h"

aclnnStatus aclnnPasaAttentionGetWorkspaceSize(
    const aclTensor* query, const aclTensor* key, const aclTensor* value, const aclTensor* bias,
    const aclTensor* mask, const aclTensor* querySegments, const aclTensor* keySegments,
    const aclTensor* sinks, const aclTensor* lengths, const aclTensor* q_data_0,
    const aclTensor* kv_data_0, const aclTensor* kv_data_1, const aclTensor* head_data_0,
    const aclTensor* matrices, const aclTensor* weights, double scale,
    const aclTensor* outputOut, const aclTensor* lseOut, uint64_t* workspaceSize, aclOpExecutor** executor);
aclnnStatus aclnnPasaAttentionGetWorkspaceSize(
    const aclTensor* query, const aclTensor* key, const aclTensor* value, const aclTensor* sinks,
    const aclTensor* queryOffsets, const aclTensor* keyOffsets, double scale,
    const aclTensor* outputOut, const aclTensor* lseOut, uint64_t* workspaceSize, aclOpExecutor** executor);
aclnnStatus aclnnPasaAttentionGetWorkspaceSize(
    const aclTensor* query, const aclTensor* key, const aclTensor* value, const aclTensor* q_data_0,
    const aclTensor* kv_data_0, const aclTensor* kv_data_1, const aclTensor* head_data_0,
    const aclTensor* visits, double scale,
    const aclTensor* outputOut, uint64_t* workspaceSize, aclOpExecutor** executor);
aclnnStatus aclnnPasaAttention(void* workspace, uint64_t size, aclOpExecutor* executor, aclrtStream stream);

#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace fe {
class PlatFormInfos;
}

namespace ge {
using graphStatus = uint32_t;
constexpr graphStatus GRAPH_SUCCESS = 0, GRAPH_FAILED = 0xffffffff;
enum DataType { DT_FLOAT = 0, DT_FLOAT16 = 1, DT_INT32 = 3, DT_UINT8 = 4, DT_BF16 = 27 };
enum Format { FORMAT_ND = 2 };
}  // namespace ge

namespace gert {
class Shape {
public:
    size_t GetDimNum() const;
    int64_t GetDim(size_t axis) const;
    void SetDim(size_t axis, int64_t size);
    void SetDimNum(size_t axes);
};
class StorageShape {
public:
    const Shape& GetOriginShape() const;
};
class RuntimeAttrs {
public:
    template <class T>
    const T* GetAttrPointer(size_t index) const;
};
class TilingContext {
public:
    const StorageShape* GetInputShape(size_t index) const;
    const RuntimeAttrs* GetAttrs() const;
    fe::PlatFormInfos* GetPlatformInfo() const;
    template <class T>
    T* GetTilingData();
    ge::graphStatus SetBlockDim(uint32_t cores);
    ge::graphStatus SetScheduleMode(uint32_t mode);
    ge::graphStatus SetTilingKey(uint64_t key);
    size_t* GetWorkspaceSizes(size_t count);
};
class InferShapeContext {
public:
    const Shape* GetInputShape(size_t index) const;
    Shape* GetOutputShape(size_t index);
};
class InferDataTypeContext {
public:
    ge::graphStatus SetOutputDataType(size_t index, ge::DataType type);
};
}  // namespace gert

namespace ops {
enum Option { REQUIRED, OPTIONAL };
class OpParamDef {
public:
    OpParamDef& ParamType(Option option);
    OpParamDef& DataType(std::vector<ge::DataType> types);
    OpParamDef& Format(std::vector<ge::Format> formats);
};
class OpAttrDef {
public:
    OpAttrDef& AttrType(Option option);
    OpAttrDef& Float(float value);
};
class OpAICoreDef {
public:
    OpAICoreDef& SetTiling(ge::graphStatus (*tiling)(gert::TilingContext*));
    OpAICoreDef& AddConfig(const char* chip);
};
class OpDef {
public:
    explicit OpDef(const char* name);
    OpParamDef& Input(const char* name);
    OpParamDef& Output(const char* name);
    OpAttrDef& Attr(const char* name);
    OpDef& SetInferShape(ge::graphStatus (*infer)(gert::InferShapeContext*));
    OpDef& SetInferDataType(ge::graphStatus (*infer)(gert::InferDataTypeContext*));
    OpAICoreDef& AICore();
};
}  // namespace ops

#define OP_ADD(name) static const ops::name registered##name(#name)

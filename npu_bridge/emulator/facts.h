// What this chip has, as AscendC's headers say. Written by `python -m npu_bridge.facts.cpp` from
// npu_bridge/facts/dav_2201.toml: change that.
#pragma once

#include "numbers.h"

// The events that a flag can join, as X(from, to).
#define ASCENDC_EVENTS(X) \
  X(MTE2, MTE1) \
  X(MTE1, MTE2) \
  X(MTE1, M) \
  X(M, MTE1) \
  X(MTE2, V) \
  X(V, MTE2) \
  X(MTE3, V) \
  X(V, MTE3) \
  X(MTE3, MTE1) \
  X(MTE1, MTE3) \
  X(MTE2, M) \
  X(M, MTE2) \
  X(M, FIX) \
  X(FIX, M) \
  X(MTE3, MTE2) \
  X(MTE2, MTE3) \
  X(S, V) \
  X(V, S) \
  X(S, MTE2) \
  X(MTE2, S) \
  X(S, MTE3) \
  X(MTE3, S) \
  X(MTE2, FIX) \
  X(FIX, MTE2) \
  X(FIX, S) \
  X(M, S) \
  X(FIX, MTE3) \
  X(MTE1, FIX) \
  X(FIX, MTE1)

namespace AscendC::emulator::facts {

struct Limit {
  int64_t low, high;
};

template <class... Mode>
constexpr uint32_t modes(Mode... mode) {
  return ((1u << int(mode)) | ...);
}

// The bytes of UB that are kept for the library, and the cross-core flags that SyncAll takes.
constexpr uint64_t kScratchBegin = 188416, kScratchEnd = 196608;
constexpr int64_t kTakenFlags[] = {11, 12, 13, 14};

// By the types of its tensors, whether the chip has a call, or which modes of it, as bits.
template <class... T> inline constexpr uint32_t Exp = 0;
template <> inline constexpr uint32_t Exp<half> = 1;
template <> inline constexpr uint32_t Exp<float> = 1;
template <class... T> inline constexpr uint32_t Ln = 0;
template <> inline constexpr uint32_t Ln<half> = 1;
template <> inline constexpr uint32_t Ln<float> = 1;
template <class... T> inline constexpr uint32_t Abs = 0;
template <> inline constexpr uint32_t Abs<half> = 1;
template <> inline constexpr uint32_t Abs<float> = 1;
template <class... T> inline constexpr uint32_t Reciprocal = 0;
template <> inline constexpr uint32_t Reciprocal<half> = 1;
template <> inline constexpr uint32_t Reciprocal<float> = 1;
template <class... T> inline constexpr uint32_t Rsqrt = 0;
template <> inline constexpr uint32_t Rsqrt<half> = 1;
template <> inline constexpr uint32_t Rsqrt<float> = 1;
template <class... T> inline constexpr uint32_t Sqrt = 0;
template <> inline constexpr uint32_t Sqrt<half> = 1;
template <> inline constexpr uint32_t Sqrt<float> = 1;
template <class... T> inline constexpr uint32_t Relu = 0;
template <> inline constexpr uint32_t Relu<half> = 1;
template <> inline constexpr uint32_t Relu<float> = 1;
template <> inline constexpr uint32_t Relu<int32_t> = 1;
template <class... T> inline constexpr uint32_t Not = 0;
template <> inline constexpr uint32_t Not<int16_t> = 1;
template <> inline constexpr uint32_t Not<uint16_t> = 1;
template <class... T> inline constexpr uint32_t Add = 0;
template <> inline constexpr uint32_t Add<half> = 1;
template <> inline constexpr uint32_t Add<float> = 1;
template <> inline constexpr uint32_t Add<int16_t> = 1;
template <> inline constexpr uint32_t Add<int32_t> = 1;
template <class... T> inline constexpr uint32_t Sub = 0;
template <> inline constexpr uint32_t Sub<half> = 1;
template <> inline constexpr uint32_t Sub<float> = 1;
template <> inline constexpr uint32_t Sub<int16_t> = 1;
template <> inline constexpr uint32_t Sub<int32_t> = 1;
template <class... T> inline constexpr uint32_t Mul = 0;
template <> inline constexpr uint32_t Mul<half> = 1;
template <> inline constexpr uint32_t Mul<float> = 1;
template <> inline constexpr uint32_t Mul<int16_t> = 1;
template <> inline constexpr uint32_t Mul<int32_t> = 1;
template <class... T> inline constexpr uint32_t Div = 0;
template <> inline constexpr uint32_t Div<half> = 1;
template <> inline constexpr uint32_t Div<float> = 1;
template <class... T> inline constexpr uint32_t Max = 0;
template <> inline constexpr uint32_t Max<half> = 1;
template <> inline constexpr uint32_t Max<float> = 1;
template <> inline constexpr uint32_t Max<int16_t> = 1;
template <> inline constexpr uint32_t Max<int32_t> = 1;
template <class... T> inline constexpr uint32_t Min = 0;
template <> inline constexpr uint32_t Min<half> = 1;
template <> inline constexpr uint32_t Min<float> = 1;
template <> inline constexpr uint32_t Min<int16_t> = 1;
template <> inline constexpr uint32_t Min<int32_t> = 1;
template <class... T> inline constexpr uint32_t And = 0;
template <> inline constexpr uint32_t And<int16_t> = 1;
template <> inline constexpr uint32_t And<uint16_t> = 1;
template <class... T> inline constexpr uint32_t Or = 0;
template <> inline constexpr uint32_t Or<int16_t> = 1;
template <> inline constexpr uint32_t Or<uint16_t> = 1;
template <class... T> inline constexpr uint32_t Adds = 0;
template <> inline constexpr uint32_t Adds<half> = 1;
template <> inline constexpr uint32_t Adds<float> = 1;
template <> inline constexpr uint32_t Adds<int16_t> = 1;
template <> inline constexpr uint32_t Adds<int32_t> = 1;
template <class... T> inline constexpr uint32_t Muls = 0;
template <> inline constexpr uint32_t Muls<half> = 1;
template <> inline constexpr uint32_t Muls<float> = 1;
template <> inline constexpr uint32_t Muls<int16_t> = 1;
template <> inline constexpr uint32_t Muls<int32_t> = 1;
template <class... T> inline constexpr uint32_t Maxs = 0;
template <> inline constexpr uint32_t Maxs<half> = 1;
template <> inline constexpr uint32_t Maxs<float> = 1;
template <> inline constexpr uint32_t Maxs<int16_t> = 1;
template <> inline constexpr uint32_t Maxs<int32_t> = 1;
template <class... T> inline constexpr uint32_t Mins = 0;
template <> inline constexpr uint32_t Mins<half> = 1;
template <> inline constexpr uint32_t Mins<float> = 1;
template <> inline constexpr uint32_t Mins<int16_t> = 1;
template <> inline constexpr uint32_t Mins<int32_t> = 1;
template <class... T> inline constexpr uint32_t Axpy = 0;
template <> inline constexpr uint32_t Axpy<half, half> = 1;
template <> inline constexpr uint32_t Axpy<float, float> = 1;
template <> inline constexpr uint32_t Axpy<float, half> = 1;
template <class... T> inline constexpr uint32_t Duplicate = 0;
template <> inline constexpr uint32_t Duplicate<half> = 1;
template <> inline constexpr uint32_t Duplicate<bfloat16_t> = 1;
template <> inline constexpr uint32_t Duplicate<int16_t> = 1;
template <> inline constexpr uint32_t Duplicate<uint16_t> = 1;
template <> inline constexpr uint32_t Duplicate<int32_t> = 1;
template <> inline constexpr uint32_t Duplicate<uint32_t> = 1;
template <> inline constexpr uint32_t Duplicate<float> = 1;
template <class... T> inline constexpr uint32_t Brcb = 0;
template <> inline constexpr uint32_t Brcb<int16_t> = 1;
template <> inline constexpr uint32_t Brcb<uint16_t> = 1;
template <> inline constexpr uint32_t Brcb<int32_t> = 1;
template <> inline constexpr uint32_t Brcb<uint32_t> = 1;
template <> inline constexpr uint32_t Brcb<half> = 1;
template <> inline constexpr uint32_t Brcb<bfloat16_t> = 1;
template <> inline constexpr uint32_t Brcb<float> = 1;
template <class... T> inline constexpr uint32_t CreateVecIndex = 0;
template <> inline constexpr uint32_t CreateVecIndex<half> = 1;
template <> inline constexpr uint32_t CreateVecIndex<int16_t> = 1;
template <> inline constexpr uint32_t CreateVecIndex<float> = 1;
template <> inline constexpr uint32_t CreateVecIndex<int32_t> = 1;
template <class... T> inline constexpr uint32_t Cast = 0;
template <> inline constexpr uint32_t Cast<half, int8_t> = modes(RoundMode::CAST_NONE);
template <> inline constexpr uint32_t Cast<half, uint8_t> = modes(RoundMode::CAST_NONE);
template <> inline constexpr uint32_t Cast<half, int16_t> = modes(RoundMode::CAST_NONE, RoundMode::CAST_RINT, RoundMode::CAST_FLOOR, RoundMode::CAST_CEIL, RoundMode::CAST_ROUND, RoundMode::CAST_TRUNC);
template <> inline constexpr uint32_t Cast<half, float> = modes(RoundMode::CAST_NONE, RoundMode::CAST_RINT, RoundMode::CAST_FLOOR, RoundMode::CAST_CEIL, RoundMode::CAST_ROUND, RoundMode::CAST_TRUNC, RoundMode::CAST_ODD);
template <> inline constexpr uint32_t Cast<float, half> = modes(RoundMode::CAST_NONE);
template <> inline constexpr uint32_t Cast<float, bfloat16_t> = modes(RoundMode::CAST_NONE);
template <> inline constexpr uint32_t Cast<float, int16_t> = modes(RoundMode::CAST_NONE);
template <> inline constexpr uint32_t Cast<float, int32_t> = modes(RoundMode::CAST_NONE, RoundMode::CAST_RINT, RoundMode::CAST_FLOOR, RoundMode::CAST_CEIL, RoundMode::CAST_ROUND, RoundMode::CAST_TRUNC);
template <> inline constexpr uint32_t Cast<float, int64_t> = modes(RoundMode::CAST_RINT, RoundMode::CAST_FLOOR, RoundMode::CAST_CEIL, RoundMode::CAST_ROUND, RoundMode::CAST_TRUNC);
template <> inline constexpr uint32_t Cast<float, float> = modes(RoundMode::CAST_RINT, RoundMode::CAST_FLOOR, RoundMode::CAST_CEIL, RoundMode::CAST_ROUND, RoundMode::CAST_TRUNC);
template <> inline constexpr uint32_t Cast<bfloat16_t, float> = modes(RoundMode::CAST_RINT, RoundMode::CAST_FLOOR, RoundMode::CAST_CEIL, RoundMode::CAST_ROUND, RoundMode::CAST_TRUNC);
template <> inline constexpr uint32_t Cast<int8_t, half> = modes(RoundMode::CAST_NONE, RoundMode::CAST_RINT, RoundMode::CAST_FLOOR, RoundMode::CAST_CEIL, RoundMode::CAST_ROUND, RoundMode::CAST_TRUNC);
template <> inline constexpr uint32_t Cast<uint8_t, half> = modes(RoundMode::CAST_NONE, RoundMode::CAST_RINT, RoundMode::CAST_FLOOR, RoundMode::CAST_CEIL, RoundMode::CAST_ROUND, RoundMode::CAST_TRUNC);
template <> inline constexpr uint32_t Cast<int16_t, half> = modes(RoundMode::CAST_RINT, RoundMode::CAST_FLOOR, RoundMode::CAST_CEIL, RoundMode::CAST_ROUND, RoundMode::CAST_TRUNC);
template <> inline constexpr uint32_t Cast<int16_t, float> = modes(RoundMode::CAST_RINT, RoundMode::CAST_FLOOR, RoundMode::CAST_CEIL, RoundMode::CAST_ROUND, RoundMode::CAST_TRUNC);
template <> inline constexpr uint32_t Cast<int16_t, int32_t> = modes(RoundMode::CAST_NONE);
template <> inline constexpr uint32_t Cast<int32_t, half> = modes(RoundMode::CAST_RINT, RoundMode::CAST_FLOOR, RoundMode::CAST_CEIL, RoundMode::CAST_ROUND, RoundMode::CAST_TRUNC);
template <> inline constexpr uint32_t Cast<int32_t, bfloat16_t> = modes(RoundMode::CAST_RINT, RoundMode::CAST_FLOOR, RoundMode::CAST_CEIL, RoundMode::CAST_ROUND, RoundMode::CAST_TRUNC);
template <> inline constexpr uint32_t Cast<int32_t, float> = modes(RoundMode::CAST_RINT, RoundMode::CAST_FLOOR, RoundMode::CAST_CEIL, RoundMode::CAST_ROUND, RoundMode::CAST_TRUNC);
template <> inline constexpr uint32_t Cast<int32_t, int64_t> = modes(RoundMode::CAST_NONE);
template <> inline constexpr uint32_t Cast<int64_t, float> = modes(RoundMode::CAST_RINT, RoundMode::CAST_FLOOR, RoundMode::CAST_CEIL, RoundMode::CAST_ROUND, RoundMode::CAST_TRUNC);
template <> inline constexpr uint32_t Cast<int64_t, int32_t> = modes(RoundMode::CAST_NONE);
template <class... T> inline constexpr uint32_t Compare = 0;
template <> inline constexpr uint32_t Compare<uint8_t, half> = modes(CMPMODE::LT, CMPMODE::GT, CMPMODE::EQ, CMPMODE::LE, CMPMODE::GE, CMPMODE::NE);
template <> inline constexpr uint32_t Compare<uint8_t, float> = modes(CMPMODE::LT, CMPMODE::GT, CMPMODE::EQ, CMPMODE::LE, CMPMODE::GE, CMPMODE::NE);
template <> inline constexpr uint32_t Compare<uint8_t, int32_t> = modes(CMPMODE::EQ);
template <> inline constexpr uint32_t Compare<int8_t, half> = modes(CMPMODE::LT, CMPMODE::GT, CMPMODE::EQ, CMPMODE::LE, CMPMODE::GE, CMPMODE::NE);
template <> inline constexpr uint32_t Compare<int8_t, float> = modes(CMPMODE::LT, CMPMODE::GT, CMPMODE::EQ, CMPMODE::LE, CMPMODE::GE, CMPMODE::NE);
template <> inline constexpr uint32_t Compare<int8_t, int32_t> = modes(CMPMODE::EQ);
template <class... T> inline constexpr uint32_t CompareScalar = 0;
template <> inline constexpr uint32_t CompareScalar<uint8_t, half> = modes(CMPMODE::LT, CMPMODE::GT, CMPMODE::EQ, CMPMODE::LE, CMPMODE::GE, CMPMODE::NE);
template <> inline constexpr uint32_t CompareScalar<uint8_t, float> = modes(CMPMODE::LT, CMPMODE::GT, CMPMODE::EQ, CMPMODE::LE, CMPMODE::GE, CMPMODE::NE);
template <> inline constexpr uint32_t CompareScalar<uint8_t, int32_t> = modes(CMPMODE::EQ);
template <class... T> inline constexpr uint32_t Select = 0;
template <> inline constexpr uint32_t Select<half, uint8_t> = 1;
template <> inline constexpr uint32_t Select<half, uint16_t> = 1;
template <> inline constexpr uint32_t Select<half, uint32_t> = 1;
template <> inline constexpr uint32_t Select<half, uint64_t> = 1;
template <> inline constexpr uint32_t Select<float, uint8_t> = 1;
template <> inline constexpr uint32_t Select<float, uint16_t> = 1;
template <> inline constexpr uint32_t Select<float, uint32_t> = 1;
template <> inline constexpr uint32_t Select<float, uint64_t> = 1;
template <class... T> inline constexpr uint32_t WholeReduceMax = 0;
template <> inline constexpr uint32_t WholeReduceMax<half> = 1;
template <> inline constexpr uint32_t WholeReduceMax<float> = 1;
template <class... T> inline constexpr uint32_t WholeReduceMin = 0;
template <> inline constexpr uint32_t WholeReduceMin<half> = 1;
template <> inline constexpr uint32_t WholeReduceMin<float> = 1;
template <class... T> inline constexpr uint32_t WholeReduceSum = 0;
template <> inline constexpr uint32_t WholeReduceSum<half> = 1;
template <> inline constexpr uint32_t WholeReduceSum<float> = 1;
template <class... T> inline constexpr uint32_t BlockReduceMax = 0;
template <> inline constexpr uint32_t BlockReduceMax<half> = 1;
template <> inline constexpr uint32_t BlockReduceMax<float> = 1;
template <class... T> inline constexpr uint32_t BlockReduceMin = 0;
template <> inline constexpr uint32_t BlockReduceMin<half> = 1;
template <> inline constexpr uint32_t BlockReduceMin<float> = 1;
template <class... T> inline constexpr uint32_t BlockReduceSum = 0;
template <> inline constexpr uint32_t BlockReduceSum<half> = 1;
template <> inline constexpr uint32_t BlockReduceSum<float> = 1;
template <class... T> inline constexpr uint32_t PairReduceSum = 0;
template <> inline constexpr uint32_t PairReduceSum<half> = 1;
template <> inline constexpr uint32_t PairReduceSum<float> = 1;
template <class... T> inline constexpr uint32_t DataCopy = 0;
template <> inline constexpr uint32_t DataCopy<int8_t> = 1;
template <> inline constexpr uint32_t DataCopy<uint8_t> = 1;
template <> inline constexpr uint32_t DataCopy<int16_t> = 1;
template <> inline constexpr uint32_t DataCopy<uint16_t> = 1;
template <> inline constexpr uint32_t DataCopy<int32_t> = 1;
template <> inline constexpr uint32_t DataCopy<uint32_t> = 1;
template <> inline constexpr uint32_t DataCopy<int64_t> = 1;
template <> inline constexpr uint32_t DataCopy<uint64_t> = 1;
template <> inline constexpr uint32_t DataCopy<half> = 1;
template <> inline constexpr uint32_t DataCopy<bfloat16_t> = 1;
template <> inline constexpr uint32_t DataCopy<float> = 1;
template <> inline constexpr uint32_t DataCopy<double> = 1;
template <class... T> inline constexpr uint32_t DataCopyPad = 0;
template <> inline constexpr uint32_t DataCopyPad<int8_t> = 1;
template <> inline constexpr uint32_t DataCopyPad<uint8_t> = 1;
template <> inline constexpr uint32_t DataCopyPad<int16_t> = 1;
template <> inline constexpr uint32_t DataCopyPad<uint16_t> = 1;
template <> inline constexpr uint32_t DataCopyPad<int32_t> = 1;
template <> inline constexpr uint32_t DataCopyPad<uint32_t> = 1;
template <> inline constexpr uint32_t DataCopyPad<int64_t> = 1;
template <> inline constexpr uint32_t DataCopyPad<uint64_t> = 1;
template <> inline constexpr uint32_t DataCopyPad<half> = 1;
template <> inline constexpr uint32_t DataCopyPad<bfloat16_t> = 1;
template <> inline constexpr uint32_t DataCopyPad<float> = 1;
template <> inline constexpr uint32_t DataCopyPad<double> = 1;
template <class... T> inline constexpr uint32_t Nd2Nz = 0;
template <> inline constexpr uint32_t Nd2Nz<int8_t> = 1;
template <> inline constexpr uint32_t Nd2Nz<uint8_t> = 1;
template <> inline constexpr uint32_t Nd2Nz<int16_t> = 1;
template <> inline constexpr uint32_t Nd2Nz<uint16_t> = 1;
template <> inline constexpr uint32_t Nd2Nz<int32_t> = 1;
template <> inline constexpr uint32_t Nd2Nz<uint32_t> = 1;
template <> inline constexpr uint32_t Nd2Nz<half> = 1;
template <> inline constexpr uint32_t Nd2Nz<bfloat16_t> = 1;
template <> inline constexpr uint32_t Nd2Nz<float> = 1;
template <class... T> inline constexpr uint32_t LoadData = 0;
template <> inline constexpr uint32_t LoadData<uint8_t> = 1;
template <> inline constexpr uint32_t LoadData<int8_t> = 1;
template <> inline constexpr uint32_t LoadData<uint16_t> = 1;
template <> inline constexpr uint32_t LoadData<int16_t> = 1;
template <> inline constexpr uint32_t LoadData<half> = 1;
template <> inline constexpr uint32_t LoadData<bfloat16_t> = 1;
template <> inline constexpr uint32_t LoadData<uint32_t> = 1;
template <> inline constexpr uint32_t LoadData<int32_t> = 1;
template <> inline constexpr uint32_t LoadData<float> = 1;
template <class... T> inline constexpr uint32_t Mmad = 0;
template <> inline constexpr uint32_t Mmad<float, half, half> = 1;
template <> inline constexpr uint32_t Mmad<float, float, float> = 1;
template <> inline constexpr uint32_t Mmad<float, bfloat16_t, bfloat16_t> = 1;
template <> inline constexpr uint32_t Mmad<int32_t, int8_t, int8_t> = 1;
template <class... T> inline constexpr uint32_t Fixpipe = 0;
template <> inline constexpr uint32_t Fixpipe<float, float> = modes(QuantMode_t::NoQuant);
template <> inline constexpr uint32_t Fixpipe<half, float> = modes(QuantMode_t::F322F16);
template <> inline constexpr uint32_t Fixpipe<bfloat16_t, float> = modes(QuantMode_t::F322BF16);
template <> inline constexpr uint32_t Fixpipe<int32_t, int32_t> = modes(QuantMode_t::NoQuant);
template <> inline constexpr uint32_t Fixpipe<int8_t, float> = modes(QuantMode_t::QF322B8_PRE, QuantMode_t::VQF322B8_PRE);
template <> inline constexpr uint32_t Fixpipe<uint8_t, float> = modes(QuantMode_t::QF322B8_PRE, QuantMode_t::VQF322B8_PRE);
template <> inline constexpr uint32_t Fixpipe<half, int32_t> = modes(QuantMode_t::DEQF16, QuantMode_t::VDEQF16);
template <> inline constexpr uint32_t Fixpipe<int8_t, int32_t> = modes(QuantMode_t::REQ8, QuantMode_t::VREQ8);
template <> inline constexpr uint32_t Fixpipe<uint8_t, int32_t> = modes(QuantMode_t::REQ8, QuantMode_t::VREQ8);

// What a field may be.
namespace DataCopyParams { constexpr Limit blockCount{1, 4095}, blockLen{1, 65535}, srcGap{0, 65535}, dstGap{0, 65535}; }
namespace DataCopyExtParams { constexpr Limit blockCount{1, 4095}, blockLen{1, 2097151}, srcStride{0, 4294967295}, dstStride{0, 4294967295}, rsv{0, 0}; }
namespace DataCopyPadExtParams { constexpr Limit leftPadding{0, 32}, rightPadding{0, 32}; }
namespace Nd2NzParams { constexpr Limit ndNum{1, 4095}, nValue{1, 16384}, dValue{1, 65535}, srcNdMatrixStride{0, 65535}, srcDValue{1, 65535}, dstNzC0Stride{1, 16384}, dstNzNStride{1, 16384}, dstNzMatrixStride{0, 65535}; }
namespace LoadData2DParams { constexpr Limit startIndex{0, 65535}, repeatTimes{1, 255}, srcStride{0, 65535}, sid{0, 15}, dstGap{0, 65535}, addrMode{0, 255}; }
namespace MmadParams { constexpr Limit m{1, 4095}, n{1, 4095}, k{1, 4095}; }
namespace FixpipeParamsV220 { constexpr Limit nSize{1, 4095}, mSize{1, 8192}, srcStride{0, 65535}, dstStride{1, 4294967295}, ndNum{1, 65535}, srcNdStride{1, 512}, dstNdStride{1, 65535}; }
namespace Vector { constexpr Limit repeat{1, 255}, count{1, 2147483647}, lanesOf2{1, 128}, lanesOf4{1, 64}, lanesOf8{1, 32}; }
namespace UnaryRepeatParams { constexpr Limit blockStride{0, 65535}, repeatStride{0, 255}; }
namespace BinaryRepeatParams { constexpr Limit blockStride{0, 255}, repeatStride{0, 255}; }
namespace BrcbRepeatParams { constexpr Limit blockStride{0, 65535}, repeatStride{0, 65535}; }
namespace Event { constexpr Limit id{0, 5}; }
namespace CrossCore { constexpr Limit mode{0, 2}, flag{0, 15}; }

}  // namespace AscendC::emulator::facts

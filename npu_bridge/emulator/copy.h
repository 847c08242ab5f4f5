// Copies between global memory and the local memories, and within UB.
#pragma once

#include "vector.h"

namespace AscendC {

// Lengths and gaps (from the end of one block to the start of the next) in 32 bytes.
struct DataCopyParams {
  Field<uint16_t> blockCount = 1, blockLen = 0, srcGap = 0, dstGap = 0;
  DataCopyParams() = default;
  DataCopyParams(Field<uint16_t> count, Field<uint16_t> length, Field<uint16_t> src,
                 Field<uint16_t> dst)
      : blockCount(count), blockLen(length), srcGap(src), dstGap(dst) {}
};

// Lengths in bytes; gaps in bytes on the side of GM, in 32 bytes on the side of UB.
struct DataCopyExtParams {
  Field<uint16_t> blockCount = 1;
  Field<uint32_t> blockLen = 0, srcStride = 0, dstStride = 0, rsv = 0;
  DataCopyExtParams() = default;
  DataCopyExtParams(Field<uint16_t> count, Field<uint32_t> length, Field<uint32_t> src,
                    Field<uint32_t> dst, Field<uint32_t> reserved)
      : blockCount(count), blockLen(length), srcStride(src), dstStride(dst), rsv(reserved) {}
};

template <class T>
struct DataCopyPadExtParams {
  bool isPad = false;
  Field<uint8_t> leftPadding = 0, rightPadding = 0;  // elements
  T paddingValue{};
  DataCopyPadExtParams() = default;
  DataCopyPadExtParams(bool pad, Field<uint8_t> left, Field<uint8_t> right, T value)
      : isPad(pad), leftPadding(left), rightPadding(right), paddingValue(value) {}
};

// From rows in GM to Nz in L1: columns of C0 = 32 bytes, each holding all rows. Strides of the
// source in elements, of the destination in C0, between destination matrices in elements.
struct Nd2NzParams {
  Field<uint16_t> ndNum = 0, nValue = 0, dValue = 0, srcNdMatrixStride = 0, srcDValue = 0;
  Field<uint16_t> dstNzC0Stride = 0, dstNzNStride = 0, dstNzMatrixStride = 0;
  Nd2NzParams() = default;
  Nd2NzParams(Field<uint16_t> matrices, Field<uint16_t> rows, Field<uint16_t> columns,
              Field<uint16_t> src_matrix, Field<uint16_t> src_row, Field<uint16_t> dst_column,
              Field<uint16_t> dst_row, Field<uint16_t> dst_matrix)
      : ndNum(matrices),
        nValue(rows),
        dValue(columns),
        srcNdMatrixStride(src_matrix),
        srcDValue(src_row),
        dstNzC0Stride(dst_column),
        dstNzNStride(dst_row),
        dstNzMatrixStride(dst_matrix) {}
};

namespace emulator {

inline uint8_t* bytes(const Span& span, uint64_t offset) {
  return span.memory->data.data() + span.begin + offset;
}

// `count` blocks of `length` bytes whose starts are `src_step` and `dst_step` bytes apart.
inline void copy_blocks(Call& call, const Span& dst, const Span& src, uint64_t count,
                        uint64_t length, uint64_t dst_step, uint64_t src_step) {
  call.disjoint("dst", length, count, dst_step);
  call.read(src, 0, length, count, src_step).write(dst, 0, length, count, dst_step).no_overlap();
  call.run([=] {
    for (uint64_t i = 0; i < count; ++i)
      std::memmove(bytes(dst, i * dst_step), bytes(src, i * src_step), length);
  });
}

// The pipe of a copy follows from where it begins and ends.
template <class Dst, class Src>
void copy(const Dst& dst, const Src& src, const DataCopyParams& p, Where where) {
  using T = typename Dst::PrimType;
  Span to = dst.span(), from = src.span();
  bool inside = to.place != Place::GM && from.place != Place::GM;
  Call call(inside ? PIPE_V : from.place == Place::GM ? PIPE_MTE2 : PIPE_MTE3, "DataCopy", where);
  if (to.place == Place::GM)
    call.operand("dst", to, {Place::GM}, sizeof(T)).operand("src", from, {Place::UB});
  else if (inside)
    call.operand("dst", to, {Place::UB}).operand("src", from, {Place::UB});
  else
    call.operand("dst", to, {Place::UB, Place::L1}).operand("src", from, {Place::GM}, sizeof(T));
  namespace limits = facts::DataCopyParams;
  static_assert(facts::DataCopy<T>, "DataCopy has no such type on this chip");
  call.field("blockCount", p.blockCount, limits::blockCount);
  call.field("blockLen", p.blockLen, limits::blockLen);
  call.field("srcGap", p.srcGap, limits::srcGap).field("dstGap", p.dstGap, limits::dstGap);
  uint64_t length = uint64_t(p.blockLen.given) * kBlock;
  copy_blocks(call, to, from, p.blockCount, length, length + p.dstGap.given * kBlock,
              length + p.srcGap.given * kBlock);
}

template <class Dst, class Src>
void copy(const Dst& dst, const Src& src, const Field<uint32_t>& count, Where where) {
  using T = typename Dst::PrimType;
  uint64_t length = uint64_t(count.given) * sizeof(T);
  if (length % kBlock != 0)
    return void(Call(PIPE_S, "DataCopy", where)
                    .complain("field", number(int64_t(length)) +
                                           " bytes are not a multiple of 32; use DataCopyPad"));
  // The library counts blocks in 16 bits: a longer copy would be cut without a word.
  copy(dst, src, DataCopyParams(1, length / kBlock, 0, 0), where);
}

template <class T>
void pad_fields(Call& call, const DataCopyExtParams& p) {
  namespace limits = facts::DataCopyExtParams;
  static_assert(facts::DataCopyPad<T>, "DataCopyPad has no such type on this chip");
  call.field("blockCount", p.blockCount, limits::blockCount);
  call.field("blockLen", p.blockLen, limits::blockLen);
  call.field("srcStride", p.srcStride, limits::srcStride);
  call.field("dstStride", p.dstStride, limits::dstStride).field("rsv", p.rsv, limits::rsv);
  call.require(p.blockLen.given % sizeof(T) == 0, "field",
               "blockLen is no whole number of elements");
}

}  // namespace emulator

template <class T>
void DataCopy(const LocalTensor<T>& dst, const GlobalTensor<T>& src, Field<uint32_t> count,
              Where where = {}) {
  emulator::copy(dst, src, count, where);
}
template <class T>
void DataCopy(const GlobalTensor<T>& dst, const LocalTensor<T>& src, Field<uint32_t> count,
              Where where = {}) {
  emulator::copy(dst, src, count, where);
}
template <class T>
void DataCopy(const LocalTensor<T>& dst, const LocalTensor<T>& src, Field<uint32_t> count,
              Where where = {}) {
  emulator::copy(dst, src, count, where);
}
template <class T>
void DataCopy(const LocalTensor<T>& dst, const GlobalTensor<T>& src, const DataCopyParams& p,
              Where where = {}) {
  emulator::copy(dst, src, p, where);
}
template <class T>
void DataCopy(const GlobalTensor<T>& dst, const LocalTensor<T>& src, const DataCopyParams& p,
              Where where = {}) {
  emulator::copy(dst, src, p, where);
}
template <class T>
void DataCopy(const LocalTensor<T>& dst, const LocalTensor<T>& src, const DataCopyParams& p,
              Where where = {}) {
  emulator::copy(dst, src, p, where);
}

// Every row is filled up with zeros to whole C0.
template <class T>
void DataCopy(const LocalTensor<T>& dst, const GlobalTensor<T>& src, const Nd2NzParams& p,
              Where where = {}) {
  using emulator::kBlock;
  constexpr uint64_t size = sizeof(T), c0 = kBlock / size;
  emulator::Call call(PIPE_MTE2, "DataCopy (Nd2Nz)", where);
  emulator::Span to = dst.span(), from = src.span();
  call.operand("dst", to, {emulator::Place::L1}).operand("src", from, {emulator::Place::GM}, size);
  namespace limits = emulator::facts::Nd2NzParams;
  static_assert(emulator::facts::Nd2Nz<T>, "Nd2Nz has no such type on this chip");
  call.field("ndNum", p.ndNum, limits::ndNum).field("nValue", p.nValue, limits::nValue);
  call.field("dValue", p.dValue, limits::dValue);
  call.field("srcNdMatrixStride", p.srcNdMatrixStride, limits::srcNdMatrixStride);
  call.field("srcDValue", p.srcDValue, limits::srcDValue);
  call.field("dstNzC0Stride", p.dstNzC0Stride, limits::dstNzC0Stride);
  call.field("dstNzNStride", p.dstNzNStride, limits::dstNzNStride);
  call.field("dstNzMatrixStride", p.dstNzMatrixStride, limits::dstNzMatrixStride);
  if (!call.ok()) return call.run(nullptr);
  uint64_t rows = p.nValue, columns = p.dValue, strips = (columns + c0 - 1) / c0;
  uint64_t row_step = p.srcDValue.given * size, matrix_step = p.srcNdMatrixStride.given * size;
  uint64_t nz_row = p.dstNzNStride.given * kBlock, nz_strip = p.dstNzC0Stride.given * kBlock;
  uint64_t nz_matrix = p.dstNzMatrixStride.given * size;
  call.disjoint("dst", (rows ? rows - 1 : 0) * nz_row + kBlock, strips,
                nz_row == kBlock ? nz_strip : ~0ull >> 1);
  for (uint64_t n = 0; n < uint64_t(p.ndNum); ++n) {
    call.read(from, n * matrix_step, columns * size, rows, row_step);
    for (uint64_t strip = 0; strip < strips; ++strip)
      call.write(to, n * nz_matrix + strip * nz_strip, kBlock, rows, nz_row);
  }
  call.run([=, matrices = uint64_t(p.ndNum)] {
    for (uint64_t n = 0; n < matrices; ++n)
      for (uint64_t strip = 0; strip < strips; ++strip)
        for (uint64_t row = 0; row < rows; ++row) {
          uint8_t* block = emulator::bytes(to, n * nz_matrix + strip * nz_strip + row * nz_row);
          uint64_t used = std::min(columns - strip * c0, c0) * size;
          std::memset(block, 0, kBlock);
          std::memcpy(block,
                      emulator::bytes(from, n * matrix_step + row * row_step + strip * kBlock),
                      used);
        }
  });
}

// A block in UB takes whole 32 bytes: padding on the left, the data, padding on the right.
template <class T>
void DataCopyPad(const LocalTensor<T>& dst, const GlobalTensor<T>& src, const DataCopyExtParams& p,
                 const DataCopyPadExtParams<T>& pad, Where where = {}) {
  using emulator::kBlock;
  constexpr uint64_t size = sizeof(T);
  emulator::Call call(PIPE_MTE2, "DataCopyPad", where);
  emulator::Span to = dst.span(), from = src.span();
  call.operand("dst", to, {emulator::Place::UB}).operand("src", from, {emulator::Place::GM}, size);
  emulator::pad_fields<T>(call, p);
  namespace limits = emulator::facts::DataCopyPadExtParams;
  call.field("leftPadding", pad.leftPadding, 0, limits::leftPadding.high / size)
      .field("rightPadding", pad.rightPadding, 0, limits::rightPadding.high / size);
  uint64_t count = p.blockCount, length = p.blockLen, left = pad.leftPadding * size;
  uint64_t whole = (left + length + pad.rightPadding * size + kBlock - 1) / kBlock * kBlock;
  uint64_t from_step = length + p.srcStride.given, to_step = whole + p.dstStride.given * kBlock;
  // Without a value, the fill is the block's first element, or nothing in particular if padding was
  // asked for.
  bool filled = pad.isPad || (left == 0 && pad.rightPadding.given == 0);
  call.read(from, 0, length, count, from_step).write(to, 0, whole, count, to_step, true, filled);
  if (!filled) call.write(to, left, length, count, to_step, false);
  call.run([=, given = pad.isPad, value = pad.paddingValue] {
    for (uint64_t i = 0; i < count; ++i) {
      const uint8_t* source = emulator::bytes(from, i * from_step);
      uint8_t* target = emulator::bytes(to, i * to_step);
      T fill = given ? value : emulator::load<T>(source);
      for (uint64_t at = 0; filled && at < whole; at += size) emulator::store<T>(target + at, fill);
      std::memcpy(target + left, source, length);
    }
  });
}

template <class T>
void DataCopyPad(const GlobalTensor<T>& dst, const LocalTensor<T>& src, const DataCopyExtParams& p,
                 Where where = {}) {
  using emulator::kBlock;
  emulator::Call call(PIPE_MTE3, "DataCopyPad", where);
  emulator::Span to = dst.span(), from = src.span();
  call.operand("dst", to, {emulator::Place::GM}, sizeof(T))
      .operand("src", from, {emulator::Place::UB});
  emulator::pad_fields<T>(call, p);
  uint64_t length = p.blockLen, whole = (length + kBlock - 1) / kBlock * kBlock;
  emulator::copy_blocks(call, to, from, p.blockCount, length, length + p.dstStride.given,
                        whole + p.srcStride.given * kBlock);
}

}  // namespace AscendC

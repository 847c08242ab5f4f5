// Vector instructions: PIPE_V, on UB.
//
// One repeat handles 8 blocks of 32 bytes, so 128 lanes of 2 bytes or 64 of 4. Operands step by
// block and by repeat, both in blocks; what differs is said at the instruction.
#pragma once

#include <array>

#include "tensors.h"

namespace AscendC {

using emulator::Field;
using emulator::Where;

// The types of the strides below are the header's; its limits are theirs.
template <class T>
constexpr bool holds(emulator::facts::Limit limit) {
  return limit.low == 0 && limit.high == std::numeric_limits<T>::max();
}
static_assert(holds<uint16_t>(emulator::facts::UnaryRepeatParams::blockStride) &&
              holds<uint8_t>(emulator::facts::UnaryRepeatParams::repeatStride) &&
              holds<uint8_t>(emulator::facts::BinaryRepeatParams::blockStride) &&
              holds<uint8_t>(emulator::facts::BinaryRepeatParams::repeatStride) &&
              holds<uint16_t>(emulator::facts::BrcbRepeatParams::blockStride) &&
              holds<uint16_t>(emulator::facts::BrcbRepeatParams::repeatStride));

struct UnaryRepeatParams {
  Field<uint16_t> dstBlkStride = 1, srcBlkStride = 1;
  Field<uint8_t> dstRepStride = 8, srcRepStride = 8;
  UnaryRepeatParams() = default;
  UnaryRepeatParams(Field<uint16_t> dst_block, Field<uint16_t> src_block, Field<uint8_t> dst_repeat,
                    Field<uint8_t> src_repeat)
      : dstBlkStride(dst_block),
        srcBlkStride(src_block),
        dstRepStride(dst_repeat),
        srcRepStride(src_repeat) {}
};

struct BinaryRepeatParams {
  Field<uint8_t> dstBlkStride = 1, src0BlkStride = 1, src1BlkStride = 1;
  Field<uint8_t> dstRepStride = 8, src0RepStride = 8, src1RepStride = 8;
  BinaryRepeatParams() = default;
  BinaryRepeatParams(Field<uint8_t> dst_block, Field<uint8_t> src0_block, Field<uint8_t> src1_block,
                     Field<uint8_t> dst_repeat, Field<uint8_t> src0_repeat,
                     Field<uint8_t> src1_repeat)
      : dstBlkStride(dst_block),
        src0BlkStride(src0_block),
        src1BlkStride(src1_block),
        dstRepStride(dst_repeat),
        src0RepStride(src0_repeat),
        src1RepStride(src1_repeat) {}
};

struct BrcbRepeatParams {
  Field<uint16_t> dstBlkStride = 1, dstRepStride = 8;
  BrcbRepeatParams() = default;
  BrcbRepeatParams(Field<uint16_t> block, Field<uint16_t> repeat)
      : dstBlkStride(block), dstRepStride(repeat) {}
};

enum class SELMODE : uint8_t { VSEL_CMPMASK_SPR, VSEL_TENSOR_SCALAR_MODE, VSEL_TENSOR_TENSOR_MODE };
enum class ReduceOrder : uint8_t {
  ORDER_VALUE_INDEX,
  ORDER_INDEX_VALUE,
  ORDER_ONLY_VALUE,
  ORDER_ONLY_INDEX
};

namespace emulator {

constexpr uint32_t kBlock = 32, kRepeat = 256;

// The lanes of a repeat that take part: the first `count`, or one bit for each.
struct Mask {
  int64_t count = 0;
  const uint64_t* words = nullptr;
  template <class Integer, class = std::enable_if_t<std::is_integral_v<Integer>>>
  Mask(Integer count) : count(int64_t(count)) {}
  Mask(const uint64_t* words) : words(words) {}
};

// The lanes of every repeat as runs [first, last).
struct Lanes {
  uint32_t repeat = 0;
  std::vector<std::pair<uint32_t, uint32_t>> runs;

  static Lanes first(int64_t count) { return {1, {{0u, uint32_t(std::max<int64_t>(count, 0))}}}; }

  template <class F>
  void each(F f) const {
    for (uint32_t r = 0; r < repeat; ++r)
      for (auto [first, last] : runs)
        for (uint32_t lane = first; lane < last; ++lane) f(r, lane);
  }
};

inline Lanes counted(Call& call, const Field<int32_t>& count) {
  call.field("count", count, facts::Vector::count);
  return Lanes::first(count.given);
}

// `size`: bytes of the widest operand's elements, which decides how many lanes there are.
template <class Repeat>
Lanes masked(Call& call, const Mask& mask, const Field<Repeat>& repeat, size_t size) {
  uint32_t most = kRepeat / uint32_t(size);
  call.field("repeat", repeat, facts::Vector::repeat);
  Lanes lanes{uint32_t(repeat.given), {}};
  if (!mask.words) {
    call.field("mask", Field<uint64_t>(mask.count), 1, most);
    lanes.runs = {{0u, uint32_t(std::clamp<int64_t>(mask.count, 0, most))}};
    return lanes;
  }
  for (uint32_t lane = 0; lane < 128; ++lane) {
    if (!(mask.words[lane / 64] >> lane % 64 & 1)) continue;
    call.require(lane < most, "field", "mask has a bit beyond lane " + number(most));
    if (!lanes.runs.empty() && lanes.runs.back().second == lane)
      ++lanes.runs.back().second;
    else
      lanes.runs.push_back({lane, lane + 1});
  }
  return lanes;
}

// A tensor walked by blocks and repeats.
template <class T>
struct Operand {
  const char* name;
  Span span;
  uint32_t block = 1, repeat = 8;  // strides in blocks
  bool folds = false;              // a destination that every repeat adds to

  static constexpr uint32_t kLanes = kBlock / sizeof(T);

  template <class B, class R>
  Operand(Call& call, const char* name, const LocalTensor<T>& tensor, const Field<B>& block,
          const Field<R>& repeat)
      : name(name),
        span(tensor.span()),
        block(uint32_t(block.given)),
        repeat(uint32_t(repeat.given)) {
    call.field("block stride", block).field("repeat stride", repeat);
  }
  Operand(const char* name, const LocalTensor<T>& tensor) : name(name), span(tensor.span()) {}

  uint64_t offset(uint32_t r, uint32_t lane) const {
    return (uint64_t(r) * repeat + uint64_t(lane / kLanes) * block) * kBlock +
           lane % kLanes * sizeof(T);
  }
  uint8_t* at(uint32_t r, uint32_t lane) const {
    return span.memory->data.data() + span.begin + offset(r, lane);
  }
  T get(uint32_t r, uint32_t lane) const { return load<T>(at(r, lane)); }
  void set(uint32_t r, uint32_t lane, T value) const { store<T>(at(r, lane), value); }

  // Calls f(offset, bytes) for each piece of a repeat that lies in one run of bytes.
  template <class F>
  void pieces(const Lanes& lanes, F f) const {
    for (auto [first, last] : lanes.runs) {
      uint32_t step = block == 1 ? last - first : 0;
      for (uint32_t lane = first; lane < last; lane += step) {
        if (block != 1) step = std::min(last, (lane / kLanes + 1) * kLanes) - lane;
        f(offset(0, lane), step * uint32_t(sizeof(T)));
      }
    }
  }

  void read(Call& call, const Lanes& lanes) const {
    call.operand(name, span, {Place::UB});
    pieces(lanes, [&](uint64_t at, uint32_t bytes) {
      call.read(span, at, bytes, lanes.repeat, repeat * kBlock);
    });
  }

  void write(Call& call, const Lanes& lanes) const {
    call.operand(name, span, {Place::UB});
    bool several = !lanes.runs.empty() && lanes.runs.back().second > kLanes;
    call.require(block > 0 || !several, "overlap",
                 std::string(name) + ": block stride 0 writes one block several times");
    pieces(lanes, [&](uint64_t at, uint32_t bytes) {
      if (!folds) call.disjoint(name, bytes, lanes.repeat, repeat * kBlock);
      call.write(span, at, bytes, lanes.repeat, repeat * kBlock);
    });
  }
};

// dst = f(src…) lane by lane; f takes and gives elements.
template <class F, class D, class... S>
void elementwise(Call& call, const Lanes& lanes, F f, const Operand<D>& dst,
                 const Operand<S>&... src) {
  (src.read(call, lanes), ...);
  dst.write(call, lanes);
  call.no_overlap();
  call.run([=] {
    lanes.each([&](uint32_t r, uint32_t lane) { dst.set(r, lane, f(src.get(r, lane)...)); });
  });
}

// Half, float and integers are computed in double and rounded once.
template <class T, class F>
auto rounded(F f) {
  return [f](auto... x) { return narrow<T>(f(widen(x)...)); };
}

// Whether Add and its like may gather the repeats into one destination.
template <class T>
bool folds(const Operand<T>& dst, const Operand<T>& last) {
  return one_of<T, half, int32_t, float> && dst.span.begin == last.span.begin && dst.repeat == 0 &&
         last.repeat == 0;
}

inline double larger(double x, double y) { return x != x || x > y ? x : y; }
inline double smaller(double x, double y) { return x != x || x < y ? x : y; }

}  // namespace emulator

// Each instruction has a form for the first `count` elements and one for masked repeats.
#define ASCENDC_UNARY(Name, expression)                                                            \
  template <class T>                                                                               \
  void Name(const LocalTensor<T>& dst, const LocalTensor<T>& src, Field<int32_t> count,            \
            Where where = {}) {                                                                    \
    static_assert(emulator::facts::Name<T>, #Name " has no such type on this chip");               \
    emulator::Call call(PIPE_V, #Name, where);                                                     \
    auto f = emulator::rounded<T>([](double x) { return double(expression); });                    \
    emulator::elementwise(call, emulator::counted(call, count), f,                                 \
                          emulator::Operand<T>("dst", dst), emulator::Operand<T>("src", src));     \
  }                                                                                                \
  template <class T>                                                                               \
  void Name(const LocalTensor<T>& dst, const LocalTensor<T>& src, emulator::Mask mask,             \
            Field<uint8_t> repeat, const UnaryRepeatParams& p, Where where = {}) {                 \
    static_assert(emulator::facts::Name<T>, #Name " has no such type on this chip");               \
    emulator::Call call(PIPE_V, #Name, where);                                                     \
    auto f = emulator::rounded<T>([](double x) { return double(expression); });                    \
    emulator::elementwise(call, emulator::masked(call, mask, repeat, sizeof(T)), f,                \
                          emulator::Operand<T>(call, "dst", dst, p.dstBlkStride, p.dstRepStride),  \
                          emulator::Operand<T>(call, "src", src, p.srcBlkStride, p.srcRepStride)); \
  }

ASCENDC_UNARY(Exp, std::exp(x))
ASCENDC_UNARY(Ln, std::log(x))
ASCENDC_UNARY(Abs, std::fabs(x))
ASCENDC_UNARY(Sqrt, std::sqrt(x))
ASCENDC_UNARY(Rsqrt, 1 / std::sqrt(x))
ASCENDC_UNARY(Reciprocal, 1 / x)
ASCENDC_UNARY(Relu, emulator::larger(x, 0))
ASCENDC_UNARY(Not, std::is_signed_v<T> ? ~int64_t(x) : 65535 - int64_t(x))

#define ASCENDC_BINARY(Name, expression, may_fold)                                              \
  template <class T>                                                                            \
  void Name(const LocalTensor<T>& dst, const LocalTensor<T>& src0, const LocalTensor<T>& src1,  \
            Field<int32_t> count, Where where = {}) {                                           \
    static_assert(emulator::facts::Name<T>, #Name " has no such type on this chip");            \
    emulator::Call call(PIPE_V, #Name, where);                                                  \
    auto f = emulator::rounded<T>([](double x, double y) { return double(expression); });       \
    emulator::elementwise(call, emulator::counted(call, count), f,                              \
                          emulator::Operand<T>("dst", dst), emulator::Operand<T>("src0", src0), \
                          emulator::Operand<T>("src1", src1));                                  \
  }                                                                                             \
  template <class T>                                                                            \
  void Name(const LocalTensor<T>& dst, const LocalTensor<T>& src0, const LocalTensor<T>& src1,  \
            emulator::Mask mask, Field<uint8_t> repeat, const BinaryRepeatParams& p,            \
            Where where = {}) {                                                                 \
    static_assert(emulator::facts::Name<T>, #Name " has no such type on this chip");            \
    emulator::Call call(PIPE_V, #Name, where);                                                  \
    auto f = emulator::rounded<T>([](double x, double y) { return double(expression); });       \
    emulator::Operand<T> to(call, "dst", dst, p.dstBlkStride, p.dstRepStride);                  \
    emulator::Operand<T> x(call, "src0", src0, p.src0BlkStride, p.src0RepStride);               \
    emulator::Operand<T> y(call, "src1", src1, p.src1BlkStride, p.src1RepStride);               \
    to.folds = may_fold && emulator::folds(to, y);                                              \
    emulator::elementwise(call, emulator::masked(call, mask, repeat, sizeof(T)), f, to, x, y);  \
  }

ASCENDC_BINARY(Add, x + y, true)
ASCENDC_BINARY(Sub, x - y, true)
ASCENDC_BINARY(Mul, x* y, true)
ASCENDC_BINARY(Div, x / y, false)
ASCENDC_BINARY(Max, emulator::larger(x, y), true)
ASCENDC_BINARY(Min, emulator::smaller(x, y), true)
ASCENDC_BINARY(And, int64_t(x) & int64_t(y), false)
ASCENDC_BINARY(Or, int64_t(x) | int64_t(y), false)

#define ASCENDC_SCALAR(Name, expression)                                                           \
  template <class T>                                                                               \
  void Name(const LocalTensor<T>& dst, const LocalTensor<T>& src, T scalar, Field<int32_t> count,  \
            Where where = {}) {                                                                    \
    static_assert(emulator::facts::Name<T>, #Name " has no such type on this chip");               \
    emulator::Call call(PIPE_V, #Name, where);                                                     \
    auto f = emulator::rounded<T>(                                                                 \
        [y = emulator::widen(scalar)](double x) { return double(expression); });                   \
    emulator::elementwise(call, emulator::counted(call, count), f,                                 \
                          emulator::Operand<T>("dst", dst), emulator::Operand<T>("src", src));     \
  }                                                                                                \
  template <class T>                                                                               \
  void Name(const LocalTensor<T>& dst, const LocalTensor<T>& src, T scalar, emulator::Mask mask,   \
            Field<uint8_t> repeat, const UnaryRepeatParams& p, Where where = {}) {                 \
    static_assert(emulator::facts::Name<T>, #Name " has no such type on this chip");               \
    emulator::Call call(PIPE_V, #Name, where);                                                     \
    auto f = emulator::rounded<T>(                                                                 \
        [y = emulator::widen(scalar)](double x) { return double(expression); });                   \
    emulator::elementwise(call, emulator::masked(call, mask, repeat, sizeof(T)), f,                \
                          emulator::Operand<T>(call, "dst", dst, p.dstBlkStride, p.dstRepStride),  \
                          emulator::Operand<T>(call, "src", src, p.srcBlkStride, p.srcRepStride)); \
  }

ASCENDC_SCALAR(Muls, x* y)
ASCENDC_SCALAR(Adds, x + y)
ASCENDC_SCALAR(Maxs, emulator::larger(x, y))
ASCENDC_SCALAR(Mins, emulator::smaller(x, y))

#undef ASCENDC_UNARY
#undef ASCENDC_BINARY
#undef ASCENDC_SCALAR

namespace emulator {

// dst += src · scalar, rounded once.
template <class T, class U>
void axpy(Call& call, const Lanes& lanes, const Operand<T>& dst, const Operand<U>& src, U scalar) {
  static_assert(facts::Axpy<T, U>, "Axpy has no such types on this chip");
  auto f = rounded<T>([y = widen(scalar)](double sum, double x) { return std::fma(x, y, sum); });
  elementwise(call, lanes, f, dst, dst, src);
}

}  // namespace emulator

template <class T, class U>
void Axpy(const LocalTensor<T>& dst, const LocalTensor<U>& src, U scalar, Field<int32_t> count,
          Where where = {}) {
  emulator::Call call(PIPE_V, "Axpy", where);
  emulator::axpy(call, emulator::counted(call, count), emulator::Operand<T>("dst", dst),
                 emulator::Operand<U>("src", src), scalar);
}

template <class T, class U>
void Axpy(const LocalTensor<T>& dst, const LocalTensor<U>& src, U scalar, emulator::Mask mask,
          Field<uint8_t> repeat, const UnaryRepeatParams& p, Where where = {}) {
  emulator::Call call(PIPE_V, "Axpy", where);
  emulator::axpy(call, emulator::masked(call, mask, repeat, sizeof(T)),
                 emulator::Operand<T>(call, "dst", dst, p.dstBlkStride, p.dstRepStride),
                 emulator::Operand<U>(call, "src", src, p.srcBlkStride, p.srcRepStride), scalar);
}

namespace emulator {

template <class D, class S>
void cast(Call& call, const Lanes& lanes, const Operand<D>& dst, const Operand<S>& src,
          RoundMode mode) {
  constexpr uint32_t modes = facts::Cast<D, S>;
  static_assert(modes != 0, "Cast has no such types on this chip");
  call.require(modes >> int(mode) & 1, "field",
               "Cast between these types has no rounding mode " + number(int(mode)));
  // A float cast to float is rounded to an integer value.
  auto f = [mode](S x) {
    return std::is_same_v<D, S> ? narrow<D>(round_to_integer(widen(x), mode))
                                : narrow<D>(widen(x), mode);
  };
  elementwise(call, lanes, f, dst, src);
}

}  // namespace emulator

template <class D, class S>
void Cast(const LocalTensor<D>& dst, const LocalTensor<S>& src, RoundMode mode,
          Field<uint32_t> count, Where where = {}) {
  emulator::Call call(PIPE_V, "Cast", where);
  emulator::cast(call, emulator::counted(call, count.given), emulator::Operand<D>("dst", dst),
                 emulator::Operand<S>("src", src), mode);
}

template <class D, class S>
void Cast(const LocalTensor<D>& dst, const LocalTensor<S>& src, RoundMode mode, emulator::Mask mask,
          Field<uint8_t> repeat, const UnaryRepeatParams& p, Where where = {}) {
  emulator::Call call(PIPE_V, "Cast", where);
  emulator::cast(call, emulator::masked(call, mask, repeat, std::max(sizeof(D), sizeof(S))),
                 emulator::Operand<D>(call, "dst", dst, p.dstBlkStride, p.dstRepStride),
                 emulator::Operand<S>(call, "src", src, p.srcBlkStride, p.srcRepStride), mode);
}

namespace emulator {

template <class T>
void duplicate(Call& call, const Lanes& lanes, const Operand<T>& dst, T scalar) {
  static_assert(facts::Duplicate<T>, "Duplicate has no such type on this chip");
  elementwise(call, lanes, [scalar] { return scalar; }, dst);
}

}  // namespace emulator

template <class T>
void Duplicate(const LocalTensor<T>& dst, T scalar, Field<int32_t> count, Where where = {}) {
  emulator::Call call(PIPE_V, "Duplicate", where);
  emulator::duplicate(call, emulator::counted(call, count), emulator::Operand<T>("dst", dst),
                      scalar);
}

template <class T>
void Duplicate(const LocalTensor<T>& dst, T scalar, emulator::Mask mask, Field<uint8_t> repeat,
               Field<uint16_t> block_stride, Field<uint8_t> repeat_stride, Where where = {}) {
  emulator::Call call(PIPE_V, "Duplicate", where);
  emulator::duplicate(call, emulator::masked(call, mask, repeat, sizeof(T)),
                      emulator::Operand<T>(call, "dst", dst, block_stride, repeat_stride), scalar);
}

// Its library takes an event from a TPipe, and writes the first block from the scalar unit.
template <class T>
void CreateVecIndex(const LocalTensor<T>&, T, Field<uint32_t>, Where where = {}) {
  static_assert(emulator::facts::CreateVecIndex<T>, "CreateVecIndex has no such type on this chip");
  emulator::Call(PIPE_V, "CreateVecIndex", where)
      .complain("tpipe", "needs a live TPipe, which kernels with static tensors do not have");
}

// Each repeat takes 8 numbers and fills one block with each.
template <class T>
void Brcb(const LocalTensor<T>& dst, const LocalTensor<T>& src, Field<uint8_t> repeat,
          const BrcbRepeatParams& p, Where where = {}) {
  static_assert(emulator::facts::Brcb<T>, "Brcb has no such type on this chip");
  using emulator::kBlock;
  emulator::Call call(PIPE_V, "Brcb", where);
  emulator::Lanes lanes = emulator::masked(call, kBlock / sizeof(T) * 8, repeat, sizeof(T));
  emulator::Operand<T> to(call, "dst", dst, p.dstBlkStride, p.dstRepStride);
  if (to.block == 0) to.block = 1;
  emulator::Span from = src.span();
  call.operand("src", from, {emulator::Place::UB}).read(from, 0, lanes.repeat * 8 * sizeof(T));
  to.write(call, lanes);
  call.no_overlap();
  call.run([=] {
    lanes.each([&](uint32_t r, uint32_t lane) {
      uint64_t index = r * 8 + lane / to.kLanes;
      to.set(r, lane, emulator::load<T>(from.memory->data.data() + from.begin + index * sizeof(T)));
    });
  });
}

namespace emulator {

template <class T>
bool compare(T a, T b, CMPMODE mode) {
  switch (mode) {
    case CMPMODE::LT:
      return a < b;
    case CMPMODE::GT:
      return a > b;
    case CMPMODE::EQ:
      return a == b;
    case CMPMODE::LE:
      return a <= b;
    case CMPMODE::GE:
      return a >= b;
    default:
      return a != b;
  }
}

// Bits of a repeat follow those of the one before, whatever the strides.
struct Bits {
  Span span;
  uint32_t per_repeat;

  uint8_t& byte(uint64_t bit) const { return span.memory->data[span.begin + bit / 8]; }
  bool get(uint32_t r, uint32_t lane) const {
    uint64_t bit = uint64_t(r) * per_repeat + lane;
    return byte(bit) >> bit % 8 & 1;
  }
  void set(uint32_t r, uint32_t lane, bool value) const {
    uint64_t bit = uint64_t(r) * per_repeat + lane;
    byte(bit) = uint8_t((byte(bit) & ~(1 << bit % 8)) | value << bit % 8);
  }
};

template <bool scalar, class T, class U>
Bits compare_into(Call& call, const LocalTensor<U>& dst, const Lanes& lanes, CMPMODE mode) {
  constexpr uint32_t modes = scalar ? facts::CompareScalar<U, T> : facts::Compare<U, T>;
  static_assert(modes != 0, "Compare has no such types on this chip");
  uint32_t count = lanes.runs.empty() ? 0 : lanes.runs.back().second;
  call.require(modes >> int(mode) & 1, "field", "these types are not compared in this mode");
  call.require(count * sizeof(T) % kRepeat == 0, "field",
               "compares whole repeats of 256 bytes, not " + number(count) +
                   " elements (a mask has no effect)");
  Bits bits{dst.span(), kRepeat / uint32_t(sizeof(T))};
  call.operand("dst", bits.span, {Place::UB})
      .write(bits.span, 0, uint64_t(lanes.repeat) * count / 8);
  return bits;
}

template <class T, class U>
void compare(Call& call, const Lanes& lanes, const LocalTensor<U>& dst, const Operand<T>& x,
             const Operand<T>& y, CMPMODE mode) {
  x.read(call, lanes), y.read(call, lanes);
  Bits bits = compare_into<false, T>(call, dst, lanes, mode);
  call.no_overlap();
  call.run([=] {
    lanes.each([&](uint32_t r, uint32_t lane) {
      bits.set(r, lane, compare(x.get(r, lane), y.get(r, lane), mode));
    });
  });
}

template <class T, class U>
void compare(Call& call, const Lanes& lanes, const LocalTensor<U>& dst, const Operand<T>& x, T y,
             CMPMODE mode) {
  x.read(call, lanes);
  Bits bits = compare_into<true, T>(call, dst, lanes, mode);
  call.no_overlap();
  call.run([=] {
    lanes.each(
        [&](uint32_t r, uint32_t lane) { bits.set(r, lane, compare(x.get(r, lane), y, mode)); });
  });
}

}  // namespace emulator

template <class T, class U>
void Compare(const LocalTensor<U>& dst, const LocalTensor<T>& src0, const LocalTensor<T>& src1,
             CMPMODE mode, Field<uint32_t> count, Where where = {}) {
  emulator::Call call(PIPE_V, "Compare", where);
  emulator::compare(call, emulator::counted(call, count.given), dst,
                    emulator::Operand<T>("src0", src0), emulator::Operand<T>("src1", src1), mode);
}

template <class T, class U>
void Compare(const LocalTensor<U>& dst, const LocalTensor<T>& src0, const LocalTensor<T>& src1,
             CMPMODE mode, emulator::Mask mask, Field<uint8_t> repeat, const BinaryRepeatParams& p,
             Where where = {}) {
  emulator::Call call(PIPE_V, "Compare", where);
  emulator::compare(call, emulator::masked(call, mask, repeat, sizeof(T)), dst,
                    emulator::Operand<T>(call, "src0", src0, p.src0BlkStride, p.src0RepStride),
                    emulator::Operand<T>(call, "src1", src1, p.src1BlkStride, p.src1RepStride),
                    mode);
}

template <class T, class U>
void CompareScalar(const LocalTensor<U>& dst, const LocalTensor<T>& src, T scalar, CMPMODE mode,
                   Field<uint32_t> count, Where where = {}) {
  emulator::Call call(PIPE_V, "CompareScalar", where);
  emulator::compare(call, emulator::counted(call, count.given), dst,
                    emulator::Operand<T>("src", src), scalar, mode);
}

template <class T, class U>
void CompareScalar(const LocalTensor<U>& dst, const LocalTensor<T>& src, T scalar, CMPMODE mode,
                   emulator::Mask mask, Field<uint8_t> repeat, const UnaryRepeatParams& p,
                   Where where = {}) {
  emulator::Call call(PIPE_V, "CompareScalar", where);
  emulator::compare(call, emulator::masked(call, mask, repeat, sizeof(T)), dst,
                    emulator::Operand<T>(call, "src", src, p.srcBlkStride, p.srcRepStride), scalar,
                    mode);
}

namespace emulator {

// Mode 0 uses the bits of one repeat for all of them; the others go on from repeat to repeat.
template <class T, class U>
Bits select_bits(Call& call, const LocalTensor<U>& mask, const Lanes& lanes, SELMODE mode) {
  static_assert(facts::Select<T, U>, "Select has no such types on this chip");
  uint32_t last = lanes.runs.empty() ? 0 : lanes.runs.back().second,
           lane_bits = kRepeat / uint32_t(sizeof(T));
  Bits bits{mask.span(), mode == SELMODE::VSEL_CMPMASK_SPR ? 0 : lane_bits};
  uint64_t used = uint64_t(lanes.repeat ? lanes.repeat - 1 : 0) * bits.per_repeat + last;
  if (mode == SELMODE::VSEL_CMPMASK_SPR) used = std::min(last, lane_bits);
  call.operand("mask", bits.span, {Place::UB}).read(bits.span, 0, (used + 7) / 8);
  return bits;
}

// The lane whose bit decides: in mode 0 a count beyond one repeat starts over.
template <class T>
uint32_t select_lane(uint32_t lane, SELMODE mode) {
  return mode == SELMODE::VSEL_CMPMASK_SPR ? lane % (kRepeat / uint32_t(sizeof(T))) : lane;
}

template <class T, class U, class Other>
void select(Call& call, const Lanes& lanes, const Operand<T>& dst, const LocalTensor<U>& mask,
            const Operand<T>& x, Other other, SELMODE mode) {
  Bits bits = select_bits<T>(call, mask, lanes, mode);
  x.read(call, lanes);
  dst.write(call, lanes);
  call.no_overlap();
  call.run([=] {
    lanes.each([&](uint32_t r, uint32_t lane) {
      bool first = bits.get(r, select_lane<T>(lane, mode));
      dst.set(r, lane, first ? x.get(r, lane) : other(r, lane));
    });
  });
}

template <class T, class U>
void select(Call& call, const Lanes& lanes, const Operand<T>& dst, const LocalTensor<U>& mask,
            const Operand<T>& x, const Operand<T>& y, SELMODE mode) {
  call.require(mode != SELMODE::VSEL_TENSOR_SCALAR_MODE, "field", "this mode takes a scalar");
  y.read(call, lanes);
  select(
      call, lanes, dst, mask, x, [y](uint32_t r, uint32_t lane) { return y.get(r, lane); }, mode);
}

template <class T, class U>
void select(Call& call, const Lanes& lanes, const Operand<T>& dst, const LocalTensor<U>& mask,
            const Operand<T>& x, T y, SELMODE mode) {
  call.require(mode == SELMODE::VSEL_TENSOR_SCALAR_MODE, "field", "this mode takes no scalar");
  select(call, lanes, dst, mask, x, [y](uint32_t, uint32_t) { return y; }, mode);
}

}  // namespace emulator

template <class T, class U>
void Select(const LocalTensor<T>& dst, const LocalTensor<U>& mask, const LocalTensor<T>& src0,
            const LocalTensor<T>& src1, SELMODE mode, Field<uint32_t> count, Where where = {}) {
  emulator::Call call(PIPE_V, "Select", where);
  emulator::select(call, emulator::counted(call, count.given), emulator::Operand<T>("dst", dst),
                   mask, emulator::Operand<T>("src0", src0), emulator::Operand<T>("src1", src1),
                   mode);
}

template <class T, class U>
void Select(const LocalTensor<T>& dst, const LocalTensor<U>& mask, const LocalTensor<T>& src0,
            T src1, SELMODE mode, Field<uint32_t> count, Where where = {}) {
  emulator::Call call(PIPE_V, "Select", where);
  emulator::select(call, emulator::counted(call, count.given), emulator::Operand<T>("dst", dst),
                   mask, emulator::Operand<T>("src0", src0), src1, mode);
}

template <class T, class U>
void Select(const LocalTensor<T>& dst, const LocalTensor<U>& mask, const LocalTensor<T>& src0,
            const LocalTensor<T>& src1, SELMODE mode, emulator::Mask lanes, Field<uint8_t> repeat,
            const BinaryRepeatParams& p, Where where = {}) {
  emulator::Call call(PIPE_V, "Select", where);
  emulator::select(call, emulator::masked(call, lanes, repeat, sizeof(T)),
                   emulator::Operand<T>(call, "dst", dst, p.dstBlkStride, p.dstRepStride), mask,
                   emulator::Operand<T>(call, "src0", src0, p.src0BlkStride, p.src0RepStride),
                   emulator::Operand<T>(call, "src1", src1, p.src1BlkStride, p.src1RepStride),
                   mode);
}

template <class T, class U>
void Select(const LocalTensor<T>& dst, const LocalTensor<U>& mask, const LocalTensor<T>& src0,
            T src1, SELMODE mode, emulator::Mask lanes, Field<uint8_t> repeat,
            const BinaryRepeatParams& p, Where where = {}) {
  emulator::Call call(PIPE_V, "Select", where);
  emulator::select(call, emulator::masked(call, lanes, repeat, sizeof(T)),
                   emulator::Operand<T>(call, "dst", dst, p.dstBlkStride, p.dstRepStride), mask,
                   emulator::Operand<T>(call, "src0", src0, p.src0BlkStride, p.src0RepStride), src1,
                   mode);
}

}  // namespace AscendC

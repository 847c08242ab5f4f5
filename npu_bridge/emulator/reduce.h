// Reductions of the vector unit: of a whole repeat, of each block of 32 bytes, of each pair.
#pragma once

#include "vector.h"

namespace AscendC {
namespace emulator {

enum class Reduce { Sum, Max, Min };

template <class T>
struct Item {
  T value;
  uint32_t lane;
};

// Sums pairwise in a binary tree, each sum rounded to T; lanes outside the mask count as 0.
template <class T>
T tree_sum(std::vector<Item<T>> const& items, uint32_t lanes) {
  std::vector<T> sums(lanes, T(0));
  for (const Item<T>& item : items) sums[item.lane % lanes] = item.value;
  for (; lanes > 1; lanes /= 2)
    for (uint32_t i = 0; i < lanes / 2; ++i)
      sums[i] = narrow<T>(widen(sums[2 * i]) + widen(sums[2 * i + 1]));
  return sums[0];
}

// The first of the largest (smallest); a NaN wins.
template <class T>
Item<T> extreme(const std::vector<Item<T>>& items, Reduce reduce) {
  Item<T> best = items[0];
  for (const Item<T>& item : items) {
    bool better = reduce == Reduce::Max ? item.value > best.value : item.value < best.value;
    if (best.value == best.value && (better || item.value != item.value)) best = item;
  }
  return best;
}

// The lanes of one repeat in groups of `width`: (group, its lanes in the mask).
template <class T>
std::map<uint32_t, std::vector<Item<T>>> groups(const Operand<T>& src, const Lanes& lanes,
                                                uint32_t r, uint32_t width) {
  std::map<uint32_t, std::vector<Item<T>>> result;
  for (auto [first, last] : lanes.runs)
    for (uint32_t lane = first; lane < last; ++lane)
      result[lane / width].push_back({src.get(r, lane), lane});
  return result;
}

struct ReduceShape {
  Mask mask;
  Field<int32_t> repeat, dst_repeat, src_block, src_repeat;
};

template <class T>
struct Reduction {
  Lanes lanes;
  Operand<T> src;
  Span dst;
  uint64_t dst_stride;  // bytes

  uint8_t* out(uint32_t r) const { return dst.memory->data.data() + dst.begin + r * dst_stride; }
};

// What all reductions check; `unit`: bytes of the stride and of the alignment of dst.
template <class T>
Reduction<T> reduction(Call& call, const LocalTensor<T>& dst, const LocalTensor<T>& src,
                       const ReduceShape& shape, uint32_t unit, uint32_t alignment) {
  static_assert(facts::WholeReduceSum<T> && facts::BlockReduceSum<T> && facts::PairReduceSum<T>,
                "reductions have no such type on this chip");
  for (auto [name, field] : {std::pair{"dstRepStride", shape.dst_repeat},
                             {"srcBlkStride", shape.src_block},
                             {"srcRepStride", shape.src_repeat}})
    call.field(name, field, 0, 65535);
  Operand<T> from(call, "src", src, shape.src_block, shape.src_repeat);
  Reduction<T> result{masked(call, shape.mask, shape.repeat, sizeof(T)), from, dst.span(),
                      uint64_t(shape.dst_repeat.given) * unit};
  from.read(call, result.lanes);
  call.operand("dst", result.dst, {Place::UB}, alignment);
  return result;
}

template <class T>
void whole(Reduce reduce, const char* name, const LocalTensor<T>& dst, const LocalTensor<T>& src,
           const ReduceShape& shape, ReduceOrder order, Where where) {
  constexpr uint32_t size = sizeof(T);
  using Index = std::conditional_t<size == 2, uint16_t, uint32_t>;
  bool pair = order == ReduceOrder::ORDER_VALUE_INDEX || order == ReduceOrder::ORDER_INDEX_VALUE;
  bool only_index = order == ReduceOrder::ORDER_ONLY_INDEX;
  uint32_t unit = pair ? 2 * size : only_index ? 4 : size;
  Call call(PIPE_V, name, where);
  // The library wants room for a pair where only the value is written, too.
  uint32_t alignment = reduce == Reduce::Sum ? size : 2 * size;
  Reduction<T> go = reduction(call, dst, src, shape, unit, alignment);
  call.disjoint("dst", unit, go.lanes.repeat, go.dst_stride)
      .write(go.dst, 0, unit, go.lanes.repeat, go.dst_stride)
      .no_overlap();
  call.run([=] {
    for (uint32_t r = 0; r < go.lanes.repeat; ++r) {
      auto lanes = groups(go.src, go.lanes, r, kRepeat)[0];
      if (reduce == Reduce::Sum) {
        store<T>(go.out(r), tree_sum<T>(lanes, kRepeat / size));
        continue;
      }
      Item<T> best = extreme(lanes, reduce);
      if (only_index)
        store<uint32_t>(go.out(r), best.lane);
      else
        store<T>(go.out(r) + (order == ReduceOrder::ORDER_INDEX_VALUE ? size : 0), best.value);
      if (pair)
        store<Index>(go.out(r) + (order == ReduceOrder::ORDER_INDEX_VALUE ? 0 : size),
                     Index(best.lane));
    }
  });
}

// Groups of `width` lanes give one number each; a group outside the mask leaves dst as it was.
template <class T>
void grouped(Reduce reduce, const char* name, uint32_t width, uint32_t alignment,
             const LocalTensor<T>& dst, const LocalTensor<T>& src, const ReduceShape& shape,
             Where where) {
  constexpr uint32_t size = sizeof(T);
  Call call(PIPE_V, name, where);
  uint32_t unit = kRepeat / width;
  Reduction<T> go = reduction(call, dst, src, shape, unit, alignment);
  std::set<uint32_t> hit;
  for (auto [first, last] : go.lanes.runs)
    for (uint32_t lane = first; lane < last; ++lane) hit.insert(lane / width);
  for (uint32_t group : hit)
    call.disjoint("dst", size, go.lanes.repeat, go.dst_stride)
        .write(go.dst, group * size, size, go.lanes.repeat, go.dst_stride);
  call.no_overlap();
  call.run([=] {
    for (uint32_t r = 0; r < go.lanes.repeat; ++r)
      for (auto& [group, lanes] : groups(go.src, go.lanes, r, width))
        store<T>(go.out(r) + group * size,
                 reduce == Reduce::Sum ? tree_sum<T>(lanes, width) : extreme(lanes, reduce).value);
  });
}

}  // namespace emulator

// dstRepStride counts results: values, or pairs of value and index.
#define ASCENDC_WHOLE(Name, kind)                                                                \
  template <class T, bool set_mask = true>                                                       \
  void Name(const LocalTensor<T>& dst, const LocalTensor<T>& src, emulator::Mask mask,           \
            Field<int32_t> repeat, Field<int32_t> dst_repeat, Field<int32_t> src_block,          \
            Field<int32_t> src_repeat, ReduceOrder order = ReduceOrder::ORDER_VALUE_INDEX,       \
            Where where = {}) {                                                                  \
    emulator::whole<T>(kind, #Name, dst, src, {mask, repeat, dst_repeat, src_block, src_repeat}, \
                       order, where);                                                            \
  }

ASCENDC_WHOLE(WholeReduceMax, emulator::Reduce::Max)
ASCENDC_WHOLE(WholeReduceMin, emulator::Reduce::Min)
#undef ASCENDC_WHOLE

template <class T, bool set_mask = true>
void WholeReduceSum(const LocalTensor<T>& dst, const LocalTensor<T>& src, emulator::Mask mask,
                    Field<int32_t> repeat, Field<int32_t> dst_repeat, Field<int32_t> src_block,
                    Field<int32_t> src_repeat, Where where = {}) {
  emulator::whole<T>(emulator::Reduce::Sum, "WholeReduceSum", dst, src,
                     {mask, repeat, dst_repeat, src_block, src_repeat},
                     ReduceOrder::ORDER_ONLY_VALUE, where);
}

// dstRepStride counts the results of one repeat: 8 of them, or half as many as lanes for pairs.
#define ASCENDC_GROUPED(Name, kind, width, alignment)                                    \
  template <class T, bool set_mask = true>                                               \
  void Name(const LocalTensor<T>& dst, const LocalTensor<T>& src, Field<int32_t> repeat, \
            emulator::Mask mask, Field<int32_t> dst_repeat, Field<int32_t> src_block,    \
            Field<int32_t> src_repeat, Where where = {}) {                               \
    emulator::grouped<T>(kind, #Name, width, alignment, dst, src,                        \
                         {mask, repeat, dst_repeat, src_block, src_repeat}, where);      \
  }

ASCENDC_GROUPED(BlockReduceMax, emulator::Reduce::Max, emulator::kBlock / sizeof(T), 8 * sizeof(T))
ASCENDC_GROUPED(BlockReduceMin, emulator::Reduce::Min, emulator::kBlock / sizeof(T), 8 * sizeof(T))
ASCENDC_GROUPED(BlockReduceSum, emulator::Reduce::Sum, emulator::kBlock / sizeof(T), 8 * sizeof(T))
ASCENDC_GROUPED(PairReduceSum, emulator::Reduce::Sum, 2, emulator::kBlock)
#undef ASCENDC_GROUPED

}  // namespace AscendC

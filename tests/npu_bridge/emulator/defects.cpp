// One planted defect each: `kernel JOB NAME`. `none` is the same kernel without any.
#include <map>
#include <string>

#include "kernel_operator.h"
#include "main.h"

using namespace AscendC;

namespace {

constexpr int kCount = 128, kTurns = 4;

GlobalTensor<float> global(GM_ADDR address, int count = kCount * kTurns * 2) {
  GlobalTensor<float> tensor;
  tensor.SetGlobalBuffer((__gm__ float*)address, count);
  return tensor;
}

LocalTensor<float> local(int address = 0, int count = kCount) {
  return LocalTensor<float>(TPosition::VECCALC, address, count);
}

enum Skip { kNothing, kState, kBarrier, kFlag, kBackFlag, kBackWait, kLastWait, kEnd };

// out = 2·exp(in), in turns on two buffers; each AIV does its half.
template <Skip skip>
void pipeline(GM_ADDR in, GM_ADDR out, GM_ADDR) {
  if ASCEND_IS_AIC
    return;
  if (skip != kState) InitSocState();
  int base = GetBlockIdx() * kCount * kTurns;
  for (int i = 0; i < 2; ++i) SetFlag<HardEvent::MTE3_MTE2>(i);
  for (int turn = 0; turn < kTurns; ++turn) {
    int at = base + turn * kCount, id = turn % 2;
    LocalTensor<float> x = local(id * kCount * 4);
    if (skip != kBackWait) WaitFlag<HardEvent::MTE3_MTE2>(id);
    DataCopy(x, global(in)[at], kCount);
    if (skip != kFlag) SetFlag<HardEvent::MTE2_V>(id), WaitFlag<HardEvent::MTE2_V>(id);
    Exp(x, x, kCount);
    if (skip != kBarrier) PipeBarrier<PIPE_V>();
    Muls(x, x, 2.f, kCount);
    SetFlag<HardEvent::V_MTE3>(id), WaitFlag<HardEvent::V_MTE3>(id);
    DataCopy(global(out)[at], x, kCount);
    if (skip != kBackFlag) SetFlag<HardEvent::MTE3_MTE2>(id);
  }
  for (int i = 0; i < 2 && skip != kLastWait && skip != kBackWait; ++i)
    WaitFlag<HardEvent::MTE3_MTE2>(i);
  if (skip != kEnd) PipeBarrier<PIPE_ALL>();
}

// out[0…15] = in[0…15], times what a scalar reads after it was written: in[0].
template <bool flag, bool invalidate>
void looks(GM_ADDR in, GM_ADDR out, GM_ADDR space) {
  if (ASCEND_IS_AIC || GetBlockIdx() != 0) return;
  InitSocState();
  DataCopy(local(), global(in), 16);
  SetFlag<HardEvent::MTE2_MTE3>(0), WaitFlag<HardEvent::MTE2_MTE3>(0);
  DataCopy(global(space), local(), 16);
  if (flag) SetFlag<HardEvent::MTE3_S>(0), WaitFlag<HardEvent::MTE3_S>(0);
  if (invalidate)
    DataCacheCleanAndInvalid<float, CacheLine::ENTIRE_DATA_CACHE, DcciDst::CACHELINE_OUT>(
        global(space));
  float x = global(space).GetValue(0);
  SetFlag<HardEvent::MTE2_V>(0), WaitFlag<HardEvent::MTE2_V>(0);
  Muls(local(), local(), x, 16);
  SetFlag<HardEvent::V_MTE3>(0), WaitFlag<HardEvent::V_MTE3>(0);
  DataCopy(global(out), local(), 16);
  PipeBarrier<PIPE_ALL>();
}

// Runs on the first AIV, or on the first AIC; BARE_CASE without what a kernel begins and ends with.
#define BARE_CASE(core, ...)                   \
  [](GM_ADDR in, GM_ADDR out, GM_ADDR space) { \
    (void)in, (void)out, (void)space;          \
    if (core && GetBlockIdx() == 0) {          \
      __VA_ARGS__;                             \
    }                                          \
  }
#define VECTOR_CASE(...) \
  BARE_CASE(ASCEND_IS_AIV, InitSocState(); __VA_ARGS__; PipeBarrier<PIPE_ALL>())
#define CUBE_CASE(...) \
  BARE_CASE(ASCEND_IS_AIC, InitSocState(); __VA_ARGS__; PipeBarrier<PIPE_ALL>())

// One AIV stores to the workspace, the other loads the same bytes.
template <bool in_order>
void through_memory(GM_ADDR, GM_ADDR out, GM_ADDR space) {
  if ASCEND_IS_AIC
    return;
  InitSocState();
  bool writer = GetSubBlockIdx() == 0;
  if (writer) {
    Duplicate(local(), 1.f, kCount);
    SetFlag<HardEvent::V_MTE3>(0), WaitFlag<HardEvent::V_MTE3>(0);
    DataCopy(global(space), local(), kCount);
  }
  if (in_order) CrossCoreSetFlag<1, PIPE_MTE3>(3), CrossCoreWaitFlag<1, PIPE_MTE2>(3);
  if (!writer) {
    DataCopy(local(), global(space), kCount);
    SetFlag<HardEvent::MTE2_MTE3>(0), WaitFlag<HardEvent::MTE2_MTE3>(0);
    DataCopy(global(out), local(), kCount);
  }
  PipeBarrier<PIPE_ALL>();
}

template <bool barrier>
void accumulate(GM_ADDR, GM_ADDR out, GM_ADDR space) {
  if (ASCEND_IS_AIV || GetBlockIdx() != 0) return;
  InitSocState();
  LocalTensor<half> a1(TPosition::A1, 0, 256), a2(TPosition::A2, 0, 256), b2(TPosition::B2, 0, 256);
  LocalTensor<float> c(TPosition::CO1, 0, 256);
  GlobalTensor<half> rows;
  rows.SetGlobalBuffer((__gm__ half*)space, 256);
  DataCopy(a1, rows, Nd2NzParams(1, 16, 16, 0, 16, 16, 1, 0));
  SetFlag<HardEvent::MTE2_MTE1>(0), WaitFlag<HardEvent::MTE2_MTE1>(0);
  LoadData(a2, a1, LoadData2DParams(0, 1, 1, 0, 0, false, 0));
  LoadData(b2, a1, LoadData2DParams(0, 1, 1, 0, 0, false, 0));
  SetFlag<HardEvent::MTE1_M>(0), WaitFlag<HardEvent::MTE1_M>(0);
  Mmad(c, a2, b2, MmadParams(16, 16, 16, 0, false, true));
  if (barrier) PipeBarrier<PIPE_M>();
  Mmad(c, a2, b2, MmadParams(16, 16, 16, 0, false, false));
  SetFlag<HardEvent::M_FIX>(0), WaitFlag<HardEvent::M_FIX>(0);
  Fixpipe<float, float, CFG_ROW_MAJOR>(global(out), c, FixpipeParamsV220(16, 16, 16, 16, false));
  PipeBarrier<PIPE_ALL>();
}

using Kernel = void (*)(GM_ADDR, GM_ADDR, GM_ADDR);
const int kHuge = 300;
const std::map<std::string, Kernel> kKernels = {
    {"none", pipeline<kNothing>},
    {"none_through_memory", through_memory<true>},
    {"missing_barrier", pipeline<kBarrier>},
    {"missing_flag", pipeline<kFlag>},
    {"deadlock", pipeline<kBackFlag>},
    {"double_set", pipeline<kBackWait>},
    {"left_over_flag", pipeline<kLastWait>},
    {"race_between_cores", through_memory<false>},
    {"accumulate_without_barrier", accumulate<false>},
    {"overlapping_stores",
     VECTOR_CASE(Duplicate(local(), 1.f, kCount);
                 SetFlag<HardEvent::V_MTE3>(0), WaitFlag<HardEvent::V_MTE3>(0);
                 DataCopy(global(out), local(), kCount); DataCopy(global(out)[8], local(), 8))},
    {"scalar_store", VECTOR_CASE(local().SetValue(0, 1.f); Muls(local(512), local(), 2.f, 1))},
    {"scalar_store_after_vector",
     VECTOR_CASE(Duplicate(local(), 1.f, 8); local().SetValue(0, 2.f); SetFlag<HardEvent::S_V>(0);
                 WaitFlag<HardEvent::S_V>(0); Muls(local(512), local(), 2.f, 8))},
    {"scalar_store_to_global",
     VECTOR_CASE(for (int i = 0; i < 8; ++i) local().SetValue(i, 1.f);
                 SetFlag<HardEvent::S_V>(0); WaitFlag<HardEvent::S_V>(0);
                 DataCopy(global(out), local(), 8))},
    {"none_scalar_store_to_global",
     VECTOR_CASE(Duplicate(local(), 1.f, 8); SetFlag<HardEvent::V_S>(0);
                 WaitFlag<HardEvent::V_S>(0); local().SetValue(0, 2.f);
                 SetFlag<HardEvent::S_MTE3>(0); WaitFlag<HardEvent::S_MTE3>(0);
                 DataCopy(global(out), local(), 8))},
    {"no_state", pipeline<kState>},
    {"late_state", BARE_CASE(ASCEND_IS_AIV, Duplicate(local(), 1.f, 8); InitSocState();
                             PipeBarrier<PIPE_ALL>())},
    {"no_end", pipeline<kEnd>},
    {"after_the_end", BARE_CASE(ASCEND_IS_AIC, InitSocState(); PipeBarrier<PIPE_ALL>();
                                DataCopy(LocalTensor<float>(TPosition::A1, 0, 8), global(in), 8))},
    {"index_by_tpipe", VECTOR_CASE(CreateVecIndex(local(), 0.f, kCount))},
    {"repeat_0", VECTOR_CASE(Duplicate(local(), 1.f, 64, 0, 1, 8))},
    {"count_0", VECTOR_CASE(Duplicate(local(), 1.f, 0))},
    {"load_0", CUBE_CASE(LoadData(LocalTensor<half>(TPosition::A2, 0, 256),
                                  LocalTensor<half>(TPosition::A1, 0, 256),
                                  LoadData2DParams(0, 0, 1, 0, 0, false, 0)))},
    {"copy_0", VECTOR_CASE(DataCopy(local(), global(in), DataCopyParams(0, 1, 0, 0)))},
    {"long_copy", VECTOR_CASE(DataCopy(local(0, 1 << 20), global(in, 1 << 20), 1 << 20))},
    {"many_rows", VECTOR_CASE(DataCopyPad(local(), global(in), DataCopyExtParams(4096, 4, 0, 0, 0),
                                          DataCopyPadExtParams<float>()))},
    {"row_stride", CUBE_CASE(DataCopy(LocalTensor<float>(TPosition::A1, 0, 256), global(in),
                                      Nd2NzParams(1, 16, 8, 0, 65536, 16, 1, 0)))},
    {"tall_product",
     CUBE_CASE(Mmad(LocalTensor<float>(TPosition::CO1, 0, 256),
                    LocalTensor<half>(TPosition::A2, 0, 256),
                    LocalTensor<half>(TPosition::B2, 0, 256),
                    MmadParams(4096, 16, 16, 0, false, true)))},
    {"tall_result", CUBE_CASE(Fixpipe<float, float, CFG_ROW_MAJOR>(
                        global(out), LocalTensor<float>(TPosition::CO1, 0, 256),
                        FixpipeParamsV220(16, 8193, 16, 16, false)))},
    {"over_the_scratch", VECTOR_CASE(Duplicate(local(184 * 1024, 8), 1.f, 8))},
    {"odd_maximum",
     VECTOR_CASE(Duplicate(local(), 1.f, 64); PipeBarrier<PIPE_V>(); WholeReduceMax<float>(
                     local(1028), local(), 64, 1, 1, 1, 8, ReduceOrder::ORDER_ONLY_VALUE))},
    {"integers_in_order",
     VECTOR_CASE(LocalTensor<int32_t> x(TPosition::VECCALC, 0, 64); Duplicate(x, 1, 64);
                 PipeBarrier<PIPE_V>();
                 CompareScalar(local(4096).ReinterpretCast<uint8_t>(), x, 0, CMPMODE::LT, 64))},
    {"none_scalar_wait", VECTOR_CASE(for (int i = 0; i < 2; ++i) {
       SetFlag<HardEvent::V_S>(0);
       WaitFlag<HardEvent::V_S>(0);
     })},
    {"none_accumulate", accumulate<true>},
    {"none_scalar_store",
     VECTOR_CASE(local().SetValue(0, 1.f); SetFlag<HardEvent::S_V>(0); WaitFlag<HardEvent::S_V>(0);
                 Muls(local(512), local(), 2.f, 1))},
    {"cross_deadlock", CUBE_CASE(CrossCoreWaitFlag(1);
                                 DataCopy(LocalTensor<float>(TPosition::A1, 0, 8), global(in), 8))},
    {"cross_left_over", CUBE_CASE(CrossCoreSetFlag<2, PIPE_FIX>(1))},
    {"cross_counter",
     [](GM_ADDR, GM_ADDR, GM_ADDR) {
       InitSocState();
       for (int i = 0; i < 16; ++i)
         ASCEND_IS_AIC ? CrossCoreSetFlag<2, PIPE_FIX>(1) : CrossCoreWaitFlag(1);
       PipeBarrier<PIPE_ALL>();
     }},
    {"cross_reserved", CUBE_CASE(CrossCoreSetFlag<2, PIPE_FIX>(12))},
    {"event_reserved", VECTOR_CASE(SetFlag<HardEvent::MTE2_V>(6); WaitFlag<HardEvent::MTE2_V>(6))},
    {"event_of_no_pipe", VECTOR_CASE(SetFlag<HardEvent::M_FIX>(0); WaitFlag<HardEvent::M_FIX>(0))},
    {"scalar_barrier", VECTOR_CASE(PipeBarrier<PIPE_S>())},
    {"capacity", VECTOR_CASE(Duplicate(local(184 * 1024 - 256, 8), 1.f, 8))},
    {"tensor_bounds", VECTOR_CASE(Duplicate(local(0, 64), 1.f, 65))},
    {"global_bounds", VECTOR_CASE(DataCopy(local(), global(in)[kCount * kTurns * 2 - 8], 16))},
    {"buffer_bounds",
     VECTOR_CASE(DataCopy(local(), global(in, 1 << 20)[kCount * kTurns * 2 - 8], 16))},
    {"null_buffer", VECTOR_CASE(DataCopy(local(), global(nullptr), 16))},
    {"unaligned", VECTOR_CASE(Duplicate(local(16), 1.f, 8))},
    {"unaligned_fractal", CUBE_CASE(LoadData(LocalTensor<half>(TPosition::A2, 256, 256),
                                             LocalTensor<half>(TPosition::A1, 0, 256),
                                             LoadData2DParams(0, 1, 1, 0, 0, false, 0)))},
    {"uninitialised", VECTOR_CASE(Exp(local(), local(), 8))},
    {"uninitialised_global", VECTOR_CASE(DataCopy(local(), global(space), 8))},
    {"read_only", VECTOR_CASE(Duplicate(local(), 1.f, 8); SetFlag<HardEvent::V_MTE3>(0);
                              WaitFlag<HardEvent::V_MTE3>(0); DataCopy(global(in), local(), 8))},
    {"narrow_repeat", VECTOR_CASE(Duplicate(local(0, 40000), 1.f, 64, kHuge, 1, 1))},
    {"narrow_stride", VECTOR_CASE(Duplicate(local(0, 40000), 1.f, 64, 2, 1, kHuge))},
    {"narrow_block_length",
     VECTOR_CASE(DataCopy(local(), global(in), DataCopyParams(1, 1 << 16, 0, 0)))},
    {"wide_mask", VECTOR_CASE(Duplicate(local(), 1.f, 65, 1, 1, 8))},
    {"odd_length", VECTOR_CASE(DataCopy(local(), global(in), 9))},
    {"partial_repeat",
     VECTOR_CASE(Duplicate(local(), 1.f, 128); PipeBarrier<PIPE_V>(); CompareScalar(
                     local(4096).ReinterpretCast<uint8_t>(), local(), 0.f, CMPMODE::GT, 65))},
    {"no_such_rounding", VECTOR_CASE(Duplicate(local(), 1.f, 64); PipeBarrier<PIPE_V>();
                                     Cast(LocalTensor<int32_t>(TPosition::VECCALC, 4096, 64),
                                          local(), RoundMode::CAST_ODD, 64))},
    {"partial_overlap", VECTOR_CASE(Duplicate(local(), 1.f, kCount); PipeBarrier<PIPE_V>();
                                    Exp(local()[8], local(), 64))},
    {"written_twice", VECTOR_CASE(Duplicate(local(), 1.f, 64, 2, 1, 4))},
    {"vector_memory_on_cube", CUBE_CASE(DataCopy(local(), global(in), 8))},
    {"cube_memory_on_vector",
     VECTOR_CASE(DataCopy(LocalTensor<float>(TPosition::A1, 0, 8), global(in), 8))},
    {"wrong_memory",
     CUBE_CASE(
         Mmad(LocalTensor<float>(TPosition::CO1, 0, 256), LocalTensor<half>(TPosition::B2, 0, 256),
              LocalTensor<half>(TPosition::B2, 0, 256), MmadParams(16, 16, 16, 0, false, true)))},
    {"pipe_of_other_core", CUBE_CASE(PipeBarrier<PIPE_V>())},
    {"scalar_read", VECTOR_CASE(local().GetValue(0))},
    {"scalar_read_of_nothing", VECTOR_CASE(global(out).GetValue(0))},
    {"scalar_read_too_early", looks<false, true>},
    {"scalar_cache", looks<true, false>},
    {"none_scalar_look", looks<true, true>},
    {"quantisation",
     CUBE_CASE(GlobalTensor<half> to; to.SetGlobalBuffer((half*)out, 256);
               Fixpipe<half, float, CFG_ROW_MAJOR>(to, LocalTensor<float>(TPosition::CO1, 0, 256),
                                                   FixpipeParamsV220(16, 16, 16, 16, false)))},
};

}  // namespace

int main(int argc, char** argv) { return argc < 3 ? 2 : emulate(argc, argv, kKernels.at(argv[2])); }

// Flags, barriers, and which core runs.
#pragma once

#include "tensors.h"

namespace AscendC {

#define ASCENDC_EVENT(from, to) from##_##to = PIPE_##from * 8 + PIPE_##to,
enum class HardEvent : uint8_t { ASCENDC_EVENTS(ASCENDC_EVENT) };
#undef ASCENDC_EVENT

using TEventID = int8_t;

inline bool is_core(emulator::CoreKind kind) { return emulator::machine().core->kind == kind; }

inline int64_t GetBlockIdx() {
  const emulator::Core& core = *emulator::machine().core;
  return core.kind == emulator::CoreKind::AIC ? core.block : 2 * core.block + core.sub;
}
inline int64_t GetSubBlockIdx() { return emulator::machine().core->sub; }
inline int64_t GetSubBlockNum() { return is_core(emulator::CoreKind::AIC) ? 1 : 2; }
inline int64_t GetBlockNum() { return emulator::machine().blocks; }
inline int64_t GetTaskRation() { return 2; }

namespace emulator {

inline void flag(const char* name, Kind kind, HardEvent event, int64_t id, Where where) {
  pipe_t from = pipe_t(uint8_t(event) / 8), to = pipe_t(uint8_t(event) % 8);
  Call call(kind == Kind::SetFlag ? from : to, name, where, kind);
  call.require(machine().core->has(from) && machine().core->has(to), "pipe",
               "the event joins a pipe that this core does not have");
  call.require(id >= facts::Event::id.low && id <= facts::Event::id.high, "event id",
               "event id is " + number(id) + ", allowed is 0 to 5 (6 and 7 are reserved)");
  call.sync(uint8_t(event), uint8_t(id));
  if (kind == Kind::WaitFlag && to == PIPE_S) call.gate();
}

// Whether a flag is SyncAll's own.
constexpr bool taken(int64_t id) {
  for (int64_t flag : facts::kTakenFlags)
    if (id == flag) return true;
  return false;
}

// `own`: the call is SyncAll's.
inline void check_flag(Call& call, int64_t id, bool own) {
  bool exists = id >= facts::CrossCore::flag.low && id <= facts::CrossCore::flag.high;
  call.require(exists && taken(id) == own, "flag id",
               "flag id is " + number(id) + ", allowed is 0 to 15 without SyncAll's 11 to 14");
}

inline void cross_set(uint8_t mode, pipe_t pipe, int64_t id, bool own, const char* name,
                      Where where) {
  Call call(pipe == PIPE_ALL ? PIPE_S : pipe, name, where, Kind::CrossSet);
  call.require(pipe != PIPE_S && pipe != PIPE_ALL, "pipe",
               "a cross-core flag is set by one pipe, not PIPE_S or PIPE_ALL");
  call.require(mode <= facts::CrossCore::mode.high, "field",
               "mode is " + number(mode) + ", allowed is 0, 1 or 2");
  call.require(mode != 1 || is_core(CoreKind::AIV), "pipe",
               "mode 1 joins the AIVs of a block; this is an AIC");
  check_flag(call, id, own);
  call.sync(mode, uint8_t(id));
}

// On this chip the wait holds back every pipe of the core, whatever pipe and mode say.
inline void cross_wait(int64_t id, bool own, const char* name, Where where) {
  Call call(PIPE_S, name, where, Kind::CrossWait);
  check_flag(call, id, own);
  call.sync(0, uint8_t(id));
  call.gate();
}

inline void barrier(pipe_t pipe, const char* name, Where where) {
  bool all = pipe == PIPE_ALL;
  Call call(all ? PIPE_S : pipe, name, where, all ? Kind::BarrierAll : Kind::Barrier);
  if (pipe == PIPE_S) return void(call.complain("pipe", "PIPE_S has no barrier: it runs in order"));
  if (!all) return call.sync(0, 0);
  call.barrier_all();
  call.gate();
}

}  // namespace emulator

template <HardEvent event>
void SetFlag(int64_t id, emulator::Where where = {}) {
  emulator::flag("SetFlag", emulator::Kind::SetFlag, event, id, where);
}

template <HardEvent event>
void WaitFlag(int64_t id, emulator::Where where = {}) {
  emulator::flag("WaitFlag", emulator::Kind::WaitFlag, event, id, where);
}

template <pipe_t pipe>
void PipeBarrier(emulator::Where where = {}) {
  emulator::barrier(pipe, "PipeBarrier", where);
  if (pipe == PIPE_ALL) emulator::machine().core->open = nullptr;
}

template <uint8_t mode, pipe_t pipe>
void CrossCoreSetFlag(int64_t id, emulator::Where where = {}) {
  emulator::cross_set(mode, pipe, id, false, "CrossCoreSetFlag", where);
}

template <uint8_t mode = 0, pipe_t pipe = PIPE_S>
void CrossCoreWaitFlag(int64_t id, emulator::Where where = {}) {
  emulator::cross_wait(id, false, "CrossCoreWaitFlag", where);
}

// Sets the core's registers (atomics, masks, padding) to their defaults, which are all that is
// emulated: an earlier kernel may have left them otherwise, so it comes before everything else.
inline void InitSocState(emulator::Where where = {}) {
  emulator::Core& core = *emulator::machine().core;
  if (core.begun)
    emulator::machine().complain("state", "InitSocState() comes after another call", &core,
                                 "InitSocState", where);
  core.begun = true;
}

enum class CacheLine : uint64_t { SINGLE_CACHE_LINE, ENTIRE_DATA_CACHE };
enum class DcciDst : uint64_t { CACHELINE_ALL, CACHELINE_UB, CACHELINE_OUT, CACHELINE_ATOMIC };

// Drops what the scalars' cache holds, all of it or one line.
template <class T, CacheLine line, DcciDst to = DcciDst::CACHELINE_OUT>
void DataCacheCleanAndInvalid(const GlobalTensor<T>& tensor, emulator::Where where = {}) {
  static_assert(line == CacheLine::ENTIRE_DATA_CACHE, "only whole caches are emulated");
  emulator::Call call(PIPE_S, "DataCacheCleanAndInvalid", where, emulator::Kind::Invalidate);
  call.require(tensor.span().memory != nullptr, "bounds", "is of no buffer of the kernel");
  call.sync(0, 0);
}

// All AIVs, or with `false` every core: each AIC waits for its AIVs, the AICs for one another, and
// the AIVs for their AIC. Pipes and flags are those of the header.
template <bool vectors_only = true>
void SyncAll(emulator::Where where = {}) {
  constexpr int64_t cubes = 11, to_cube = 12, to_vectors = 13, vectors = 14;
  bool cube = is_core(emulator::CoreKind::AIC);
  if (vectors_only && cube) {
    emulator::Call(PIPE_S, "SyncAll", where)
        .complain("pipe", "SyncAll() joins only AIVs; this is an AIC");
    return;
  }
  auto set = [&](uint8_t mode, int64_t id, pipe_t pipe = PIPE_MTE3) {
    emulator::cross_set(mode, pipe, id, true, "SyncAll", where);
  };
  auto wait = [&](int64_t id) { emulator::cross_wait(id, true, "SyncAll", where); };
  emulator::barrier(PIPE_ALL, "SyncAll", where);
  if (vectors_only) {
    set(0, vectors), wait(vectors);
  } else if (cube) {
    wait(to_cube), set(0, cubes, PIPE_FIX), wait(cubes), set(2, to_vectors);
  } else {
    set(2, to_cube), wait(to_vectors);
  }
}

}  // namespace AscendC

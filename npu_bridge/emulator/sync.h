// Flags, barriers, and which core runs.
#pragma once

#include "tensors.h"

#define ASCENDC_EVENT(from, to) from##_##to = PIPE_##from * 8 + PIPE_##to

namespace AscendC {

enum class HardEvent : uint8_t {
  ASCENDC_EVENT(MTE2, MTE1),
  ASCENDC_EVENT(MTE1, MTE2),
  ASCENDC_EVENT(MTE1, M),
  ASCENDC_EVENT(M, MTE1),
  ASCENDC_EVENT(M, FIX),
  ASCENDC_EVENT(FIX, M),
  ASCENDC_EVENT(MTE2, V),
  ASCENDC_EVENT(V, MTE2),
  ASCENDC_EVENT(MTE3, V),
  ASCENDC_EVENT(V, MTE3),
  ASCENDC_EVENT(MTE3, MTE2),
  ASCENDC_EVENT(MTE2, MTE3),
  ASCENDC_EVENT(MTE3, MTE1),
  ASCENDC_EVENT(MTE1, MTE3),
  ASCENDC_EVENT(MTE2, M),
  ASCENDC_EVENT(M, MTE2),
  ASCENDC_EVENT(MTE2, FIX),
  ASCENDC_EVENT(FIX, MTE2),
  ASCENDC_EVENT(MTE1, FIX),
  ASCENDC_EVENT(FIX, MTE1),
  ASCENDC_EVENT(FIX, MTE3),
  ASCENDC_EVENT(MTE3, FIX),
  ASCENDC_EVENT(M, S),
  ASCENDC_EVENT(S, V),
  ASCENDC_EVENT(V, S),
  ASCENDC_EVENT(S, MTE2),
  ASCENDC_EVENT(MTE2, S),
  ASCENDC_EVENT(S, MTE3),
  ASCENDC_EVENT(MTE3, S),
  ASCENDC_EVENT(FIX, S),
  ASCENDC_EVENT(S, FIX),
  ASCENDC_EVENT(MTE1, S),
  ASCENDC_EVENT(S, M)
};

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
  call.require(id >= 0 && id <= 5, "event id",
               "event id is " + number(id) + ", allowed is 0 to 5 (6 and 7 are reserved)");
  call.sync(uint8_t(event), uint8_t(id));
  if (kind == Kind::WaitFlag && to == PIPE_S) call.gate();
}

inline void cross_set(uint8_t mode, pipe_t pipe, int64_t id, int64_t last, const char* name,
                      Where where) {
  Call call(pipe == PIPE_ALL ? PIPE_S : pipe, name, where, Kind::CrossSet);
  call.require(pipe != PIPE_S && pipe != PIPE_ALL, "pipe",
               "a cross-core flag is set by one pipe, not PIPE_S or PIPE_ALL");
  call.require(mode <= 2, "field", "mode is " + number(mode) + ", allowed is 0, 1 or 2");
  call.require(mode != 1 || is_core(CoreKind::AIV), "pipe",
               "mode 1 joins the AIVs of a block; this is an AIC");
  call.require(id >= 0 && id <= last, "flag id",
               "flag id is " + number(id) + ", allowed is 0 to 10 (11 to 14 are SyncAll's)");
  call.sync(mode, uint8_t(id));
}

// On this chip the wait holds back every pipe of the core, whatever pipe and mode say.
inline void cross_wait(int64_t id, int64_t last, const char* name, Where where) {
  Call call(PIPE_S, name, where, Kind::CrossWait);
  call.require(id >= 0 && id <= last, "flag id",
               "flag id is " + number(id) + ", allowed is 0 to 10 (11 to 14 are SyncAll's)");
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
}

constexpr int64_t kLastFreeFlag = 10;

template <uint8_t mode, pipe_t pipe>
void CrossCoreSetFlag(int64_t id, emulator::Where where = {}) {
  emulator::cross_set(mode, pipe, id, kLastFreeFlag, "CrossCoreSetFlag", where);
}

template <uint8_t mode = 0, pipe_t pipe = PIPE_S>
void CrossCoreWaitFlag(int64_t id, emulator::Where where = {}) {
  emulator::cross_wait(id, kLastFreeFlag, "CrossCoreWaitFlag", where);
}

// Sets the core's registers to their defaults, which are all that is emulated.
inline void InitSocState() {}

// All AIVs, or with `false` every core: each AIC waits for its AIVs, the AICs for one another, and
// the AIVs for their AIC.
template <bool vectors_only = true>
void SyncAll(emulator::Where where = {}) {
  constexpr int64_t all = 14, to_cube = 12, to_vectors = 13;
  bool cube = is_core(emulator::CoreKind::AIC);
  if (vectors_only && cube) {
    emulator::Call(PIPE_S, "SyncAll", where)
        .complain("pipe", "SyncAll() joins only AIVs; this is an AIC");
    return;
  }
  auto set = [&](uint8_t mode, int64_t id) {
    emulator::cross_set(mode, cube ? PIPE_FIX : PIPE_MTE3, id, all, "SyncAll", where);
  };
  auto wait = [&](int64_t id) { emulator::cross_wait(id, all, "SyncAll", where); };
  emulator::barrier(PIPE_ALL, "SyncAll", where);
  if (vectors_only) {
    set(0, all), wait(all);
  } else if (cube) {
    wait(to_cube), set(0, all), wait(all), set(2, to_vectors);
  } else {
    set(2, to_cube), wait(to_vectors);
  }
}

}  // namespace AscendC

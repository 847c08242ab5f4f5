// Tensors of a kernel: an address and a length, never data.
#pragma once

#include "machine.h"

namespace AscendC {

enum class TPosition : uint8_t { GM, A1, B1, C1, TSCM, A2, B2, CO1, VECIN, VECCALC, VECOUT };

namespace emulator {

constexpr Place place_of(TPosition position) {
  switch (position) {
    case TPosition::GM:
      return Place::GM;
    case TPosition::A1:
    case TPosition::B1:
    case TPosition::C1:
    case TPosition::TSCM:
      return Place::L1;
    case TPosition::A2:
      return Place::L0A;
    case TPosition::B2:
      return Place::L0B;
    case TPosition::CO1:
      return Place::L0C;
    default:
      return Place::UB;
  }
}

inline Memory* memory_of(Place place) { return &machine().core->memories[int(place)]; }

}  // namespace emulator

template <class T>
class LocalTensor {
 public:
  using PrimType = T;

  LocalTensor() = default;
  LocalTensor(TPosition position, uint32_t address, uint32_t count)
      : position_(position), address_(address), bytes_(count * uint32_t(sizeof(T))) {}

  LocalTensor operator[](uint32_t offset) const {
    LocalTensor rest = *this;
    uint64_t skipped = uint64_t(offset) * sizeof(T);
    rest.address_ += uint32_t(skipped);
    rest.bytes_ = bytes_ > skipped ? bytes_ - uint32_t(skipped) : 0;
    return rest;
  }

  template <class U>
  LocalTensor<U> ReinterpretCast() const {
    return LocalTensor<U>(position_, address_, bytes_ / uint32_t(sizeof(U)));
  }

  uint32_t GetSize() const { return bytes_ / uint32_t(sizeof(T)); }
  TPosition GetPosition() const { return position_; }

  // The scalar program runs before any data exists, so it cannot read a local memory.
  T GetValue(uint32_t, emulator::Where where = {}) const {
    emulator::Call(PIPE_S, "GetValue", where)
        .complain("scalar", "reads a local memory; the emulator has no data while scalars run");
    return T();
  }

  // A store of PIPE_S: whoever reads it needs a flag from PIPE_S.
  void SetValue(uint32_t index, T value, emulator::Where where = {}) const {
    emulator::Call call(PIPE_S, "SetValue", where);
    emulator::Span span = this->span();
    call.require(span.place == emulator::Place::UB, "memory", "a scalar store reaches only UB")
        .write(span, uint64_t(index) * sizeof(T), sizeof(T));
    call.run(
        [=] { emulator::store(span.memory->data.data() + span.begin + index * sizeof(T), value); });
  }

  emulator::Span span() const {
    emulator::Place place = emulator::place_of(position_);
    return {place, emulator::memory_of(place), address_, uint64_t(address_) + bytes_};
  }

 private:
  TPosition position_ = TPosition::VECCALC;
  uint32_t address_ = 0, bytes_ = 0;
};

template <class T>
class GlobalTensor {
 public:
  using PrimType = T;

  void SetGlobalBuffer(T* address, uint64_t count) {
    const uint8_t* bytes = reinterpret_cast<const uint8_t*>(address);
    memory_ = address ? emulator::machine().buffer(bytes) : nullptr;
    begin_ = memory_ ? uint64_t(bytes - memory_->data.data()) : 0;
    end_ = begin_ + count * sizeof(T);
  }
  void SetGlobalBuffer(T* address) {
    SetGlobalBuffer(address, 0);
    end_ = memory_ ? memory_->bytes : 0;
  }

  GlobalTensor operator[](uint64_t offset) const {
    GlobalTensor rest = *this;
    rest.begin_ += offset * sizeof(T);
    return rest;
  }

  uint64_t GetSize() const { return end_ > begin_ ? (end_ - begin_) / sizeof(T) : 0; }

  // An input is there from the start. For anything else the scalar program waits until it has been
  // written, as far as flags and barriers say; what its cache may still hold of it is an error.
  T GetValue(uint64_t index, emulator::Where where = {}) const {
    static_assert(sizeof(T) <= 8);
    if (!memory_ || !memory_->read_only) {
      uint64_t bytes = emulator::Call(PIPE_S, "GetValue", where, emulator::Kind::Look)
                           .look(span(), index * sizeof(T), sizeof(T));
      return emulator::load<T>(reinterpret_cast<const uint8_t*>(&bytes));
    }
    emulator::Call call(PIPE_S, "GetValue", where);
    call.read(span(), index * sizeof(T), sizeof(T));
    return call.ok() ? emulator::load<T>(memory_->data.data() + begin_ + index * sizeof(T)) : T();
  }

  emulator::Span span() const { return {emulator::Place::GM, memory_, begin_, end_}; }

 private:
  emulator::Memory* memory_ = nullptr;
  uint64_t begin_ = 0, end_ = 0;
};

}  // namespace AscendC

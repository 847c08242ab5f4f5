// Races by vector clocks: every pipe of every core is a thread.
//
// `known_[t][u]` is the sequence number up to which thread u's instructions are complete before
// anything that thread t issues from now on. A pipe starts its instructions in order but may
// complete them in any, so a pipe knows of its own earlier instructions only what a barrier or a
// flag that came back has told it.
#pragma once

#include "machine.h"

namespace AscendC::emulator {

using Clock = std::vector<uint32_t>;

inline void join(Clock& clock, const Clock& other) {
  if (clock.size() < other.size()) clock.resize(other.size());
  for (size_t i = 0; i < other.size(); ++i) clock[i] = std::max(clock[i], other[i]);
}

class Clocks {
 public:
  explicit Clocks(Machine& machine) : machine_(machine) {
    size_t threads = machine.cores.size() * kPipes;
    known_.assign(threads, Clock(threads));
    gates_.resize(machine.cores.size());
    seen_.assign(threads, 0);
  }

  // An instruction issues: it learns what PIPE_S had waited for by then.
  void issue(size_t thread, uint32_t sequence, const Instruction& item) {
    auto& gates = gates_[thread / kPipes];
    auto gate = gates.upper_bound(item.gate);
    if (gate != gates.begin() && seen_[thread] < (--gate)->first) {
      seen_[thread] = gate->first;
      join(known_[thread], gate->second);
    }
    for (const Access& access : item.reads) check(thread, sequence, item, access, false);
    for (const Access& access : item.writes) check(thread, sequence, item, access, true);
  }

  // What is complete once all instructions of a thread up to `sequence` are.
  Clock upto(size_t thread, uint32_t sequence) const {
    Clock clock = known_[thread];
    clock[thread] = sequence;
    return clock;
  }

  void learn(size_t thread, const Clock& clock) { join(known_[thread], clock); }

  // PIPE_S has waited: whatever issues after its entry `sequence` is ordered after the clock.
  void gate(size_t thread, uint32_t sequence, const Clock& clock) {
    learn(thread, clock);
    gates_[thread / kPipes][sequence] = known_[thread];
  }

  const Clock& known(size_t thread) const { return known_[thread]; }

  // Whether a byte was written by something that is not complete at this clock.
  static bool written_since(const Clock& clock, const Memory& memory, uint64_t byte) {
    const Cell& cell = memory.cells.get()[byte >> memory.cell_bits()];
    return cell.written && (clock.size() <= cell.writer || clock[cell.writer] < cell.written);
  }

  bool knows(size_t thread, size_t other, uint32_t sequence) const {
    return known_[thread][other] >= sequence;
  }

 private:
  Machine& machine_;
  std::vector<Clock> known_;
  std::vector<std::map<uint32_t, Clock>> gates_;  // of each core, by entry of PIPE_S
  std::vector<uint32_t> seen_;

  bool ordered(size_t before, uint32_t past, size_t thread, uint32_t sequence) const {
    return (before == thread && past == sequence) || knows(thread, before, past);
  }

  void check(size_t thread, uint32_t sequence, const Instruction& item, const Access& access,
             bool write) {
    if (access.memory->read_only) return;
    for (uint32_t i = 0; access.ordered && i < access.count; ++i) {
      uint64_t low = access.offset + i * access.stride, high = low + access.length - 1;
      int bits = access.memory->cell_bits();
      for (uint64_t cell = low >> bits; cell <= high >> bits; ++cell)
        write ? written(thread, sequence, item, *access.memory, cell)
              : read(thread, sequence, item, *access.memory, cell);
    }
  }

  void read(size_t thread, uint32_t sequence, const Instruction& item, Memory& memory,
            uint64_t index) {
    Cell& cell = memory.cells.get()[index];
    if (cell.written && !ordered(cell.writer, cell.written, thread, sequence))
      race("reads what is still being written by", memory, index, thread, item, cell.writer,
           cell.written);
    if (cell.reader == kManyReaders) return remember(memory.readers[index], thread, sequence);
    // A reader that is complete before this one need not be remembered.
    if (!cell.read || cell.reader == thread || ordered(cell.reader, cell.read, thread, sequence)) {
      cell.reader = uint16_t(thread);
      cell.read = sequence;
    } else {
      memory.readers[index] = {{cell.reader, cell.read}, {uint16_t(thread), sequence}};
      cell.reader = kManyReaders;
    }
  }

  static void remember(std::vector<std::pair<uint16_t, uint32_t>>& readers, size_t thread,
                       uint32_t sequence) {
    for (auto& [reader, last] : readers)
      if (reader == thread) return void(last = sequence);
    readers.push_back({uint16_t(thread), sequence});
  }

  void written(size_t thread, uint32_t sequence, const Instruction& item, Memory& memory,
               uint64_t index) {
    Cell& cell = memory.cells.get()[index];
    if (cell.written && !ordered(cell.writer, cell.written, thread, sequence))
      race("writes what is still being written by", memory, index, thread, item, cell.writer,
           cell.written);
    if (cell.reader == kManyReaders) {
      for (auto& [reader, last] : memory.readers[index])
        overwritten(memory, index, thread, sequence, item, reader, last);
      memory.readers.erase(index);
    } else if (cell.read) {
      overwritten(memory, index, thread, sequence, item, cell.reader, cell.read);
    }
    cell = {sequence, 0, uint16_t(thread), 0};
  }

  void overwritten(Memory& memory, uint64_t index, size_t thread, uint32_t sequence,
                   const Instruction& item, size_t reader, uint32_t last) {
    if (!ordered(reader, last, thread, sequence))
      race("writes what is still being read by", memory, index, thread, item, reader, last);
  }

  void race(const char* what, const Memory& memory, uint64_t index, size_t thread,
            const Instruction& item, size_t other, uint32_t sequence) {
    const Core& core = *machine_.cores[thread / kPipes];
    const Core& there = *machine_.cores[other / kPipes];
    const Instruction& past = there.queues[other % kPipes][sequence - 1];
    std::string who = std::string(past.name) + " (" + past.where.text() + ", " + there.name() +
                      " " + kPipeNames[other % kPipes] + ")";
    std::string text = std::string(kPipeNames[thread % kPipes]) + " " + what + " " + who + ": " +
                       memory.name + " at byte " + number(int64_t(index) << memory.cell_bits());
    machine_.complain("race", text, &core, item.name, item.where, what + past.where.text());
  }
};

}  // namespace AscendC::emulator

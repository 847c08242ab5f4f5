// Executes the recorded instructions: pipes run side by side, each in its own order, as far as
// flags, barriers and the policy let them.
#pragma once

#include <deque>
#include <random>

#include "clocks.h"

namespace AscendC::emulator {

constexpr int kCrossFlags = 16, kCounterLimit = 15;
enum CrossMode : uint8_t { kAllOfAKind = 0, kVectorsOfABlock = 1, kCubeWithVectors = 2 };

// The order in which ready pipes advance.
struct Policy {
  std::string name;
  bool random = false;
  uint64_t seed = 0;
  int kind = -1, pipe = -1;  // the pipes that wait as long as anything else can run
};

class Schedule {
 public:
  // The first run of a trace looks for races and reads of what was never written.
  Schedule(Machine& machine, bool check) : machine_(machine) {
    if (check) clocks_ = std::make_unique<Clocks>(machine);
    states_.resize(machine.cores.size());
  }

  // Runs all that is recorded. Arguments: resume(core): lets its scalar program go on, which waited
  // for what it looked at; of a trace that is complete, nothing.
  void run(const Policy& policy, const std::function<void(Core&)>& resume = nullptr) {
    resume_ = resume;
    std::mt19937_64 random(policy.seed);
    for (;;) {
      std::vector<size_t> threads;
      for (size_t t = 0; t < machine_.cores.size() * kPipes; ++t)
        if (!done(t)) threads.push_back(t);
      if (threads.empty()) return left_over();
      if (policy.random) std::shuffle(threads.begin(), threads.end(), random);
      if (!pass(threads, policy, false) && !pass(threads, policy, true)) return deadlock(threads);
    }
  }

  static void reset(Machine& machine) {
    for (auto& memory : machine.buffers) memory->reset();
    for (auto& core : machine.cores)
      for (Memory& memory : core->memories) memory.reset();
  }

 private:
  struct Flag {
    bool set = false;
    Clock clock;
    uint32_t waited = 0;  // the last WaitFlag, to see whether the next SetFlag comes after it
    Where where;
  };
  struct Counter {
    std::deque<Clock> ready;
    Where where;
  };
  struct State {
    uint32_t next[kPipes] = {};
    std::map<std::pair<int, int>, Flag> flags;  // by event and id
    Counter counters[kCrossFlags];
    std::deque<Clock> pending[kCrossFlags];  // sets that wait for the other cores' sets
    Clock cached;  // what was complete when the scalars' cache was dropped last
  };

  Machine& machine_;
  std::unique_ptr<Clocks> clocks_;
  std::vector<State> states_;
  std::function<void(Core&)> resume_;

  std::vector<Instruction>& queue(size_t t) {
    return machine_.cores[t / kPipes]->queues[t % kPipes];
  }
  State& state(size_t t) { return states_[t / kPipes]; }
  uint32_t& next(size_t t) { return state(t).next[t % kPipes]; }
  bool done(size_t t) { return next(t) == queue(t).size(); }
  Core* core(size_t t) { return machine_.cores[t / kPipes].get(); }

  static bool delayed(size_t thread, const Policy& policy) {
    int kind = thread / kPipes % 3 != 0;
    return policy.kind == kind && policy.pipe == int(thread % kPipes);
  }

  // One turn of every pipe; of the delayed ones, one step of one.
  bool pass(const std::vector<size_t>& threads, const Policy& policy, bool delayed_ones) {
    bool moved = false;
    for (size_t t : threads) {
      if (delayed(t, policy) != delayed_ones || done(t) || !ready(t)) continue;
      execute(t);
      moved = true;
      if (delayed_ones) return true;
    }
    return moved;
  }

  bool ready(size_t t) {
    const Instruction& item = queue(t)[next(t)];
    State& state = this->state(t);
    if (state.next[PIPE_S] < item.gate && t % kPipes != PIPE_S) return false;
    switch (item.kind) {
      case Kind::WaitFlag:
        return state.flags[{item.event, item.id}].set;
      case Kind::CrossWait:
        return !state.counters[item.id].ready.empty();
      case Kind::BarrierAll:
        for (int pipe = PIPE_S + 1; pipe < kPipes; ++pipe)
          if (state.next[pipe] < item.drained[pipe]) return false;
        return true;
      default:
        return true;
    }
  }

  void execute(size_t t) {
    const Instruction& item = queue(t)[next(t)];
    uint32_t sequence = ++next(t);
    if (clocks_) clocks_->issue(t, sequence, item);
    switch (item.kind) {
      case Kind::Work:
        return work(t, item);
      case Kind::SetFlag:
        return set_flag(t, sequence, item);
      case Kind::WaitFlag:
        return wait_flag(t, sequence, item);
      case Kind::Barrier:
        return learn(t, sequence, complete(t, sequence));
      case Kind::BarrierAll:
        return barrier_all(t, sequence, item);
      case Kind::CrossSet:
        return cross_set(t, sequence, item);
      case Kind::CrossWait:
        return cross_wait(t, sequence, item);
      case Kind::Invalidate:
        if (clocks_) state(t).cached = clocks_->known(t);
        return;
      case Kind::Look:
        return look(t, queue(t)[sequence - 1]);
    }
  }

  void look(size_t t, Instruction& item) {
    const Access& access = item.reads.front();
    uint64_t bytes = 0;
    std::memcpy(&bytes, access.memory->data.data() + access.offset, access.length);
    if (clocks_) {
      written_before(t, item, access);
      for (uint64_t byte = access.offset; byte < access.end(); ++byte)
        if (Clocks::written_since(state(t).cached, *access.memory, byte)) {
          complain("cache", "reads " + access.memory->name +
                   ", which the scalars' cache may hold as it was before it was written", t, item);
          break;
        }
    }
    if (!resume_) {
      if (bytes != item.looked) complain("order", "a scalar reads another number", t, item);
      return;
    }
    item.looked = bytes;
    resume_(*core(t));  // records more: `item` may be moved
  }

  void work(size_t t, const Instruction& item) {
    if (clocks_)
      for (const Access& access : item.reads) written_before(t, item, access);
    if (item.run) item.run();
    if (clocks_)
      for (const Access& access : item.writes) mark(access);
  }

  static void mark(const Access& access) {
    for (uint32_t i = 0; access.contents && i < access.count; ++i)
      std::memset(access.memory->written.get() + access.offset + i * access.stride, 1,
                  access.length);
  }

  void written_before(size_t t, const Instruction& item, const Access& access) {
    for (uint32_t i = 0; access.contents && i < access.count; ++i) {
      const uint8_t* begin = access.memory->written.get() + access.offset + i * access.stride;
      if (const void* hole = std::memchr(begin, 0, access.length)) {
        int64_t byte = static_cast<const uint8_t*>(hole) - access.memory->written.get();
        return complain(
            "uninitialised",
            "reads what was never written: " + access.memory->name + " at byte " + number(byte), t,
            item, access.memory->name);
      }
    }
  }

  Clock complete(size_t t, uint32_t sequence) {
    return clocks_ ? clocks_->upto(t, sequence) : Clock();
  }

  // A wait of PIPE_S holds back whatever the core issues after it.
  void learn(size_t t, uint32_t sequence, const Clock& clock) {
    if (!clocks_) return;
    t % kPipes == PIPE_S ? clocks_->gate(t, sequence, clock) : clocks_->learn(t, clock);
  }

  // A set follows the last wait if its pipe knows of it, or issued behind it.
  bool after_wait(size_t t, const Instruction& item, uint32_t waited) {
    size_t waiter = item.event % 8;
    return waiter == PIPE_S ? item.gate >= waited
                            : clocks_->knows(t, t / kPipes * kPipes + waiter, waited);
  }

  void set_flag(size_t t, uint32_t sequence, const Instruction& item) {
    Flag& flag = state(t).flags[{item.event, item.id}];
    bool early = clocks_ && flag.waited && !after_wait(t, item, flag.waited);
    if (flag.set || early)
      complain("double set", "sets a flag that may not have been waited for yet", t, item);
    flag.set = true;
    flag.clock = complete(t, sequence);
    flag.where = item.where;
  }

  void wait_flag(size_t t, uint32_t sequence, const Instruction& item) {
    Flag& flag = state(t).flags[{item.event, item.id}];
    flag.set = false;
    flag.waited = sequence;
    learn(t, sequence, flag.clock);
  }

  void barrier_all(size_t t, uint32_t sequence, const Instruction& item) {
    Clock clock = complete(t, sequence);
    for (int pipe = PIPE_S + 1; clocks_ && pipe < kPipes; ++pipe)
      join(clock, complete(t / kPipes * kPipes + pipe, item.drained[pipe]));
    learn(t, sequence, clock);
  }

  // The cores whose sets make one signal, and those that receive it.
  std::pair<std::vector<size_t>, std::vector<size_t>> group(size_t core, uint8_t mode) {
    std::vector<size_t> all;
    if (mode == kAllOfAKind) {
      for (size_t other = 0; other < states_.size(); ++other)
        if (machine_.cores[other]->kind == machine_.cores[core]->kind) all.push_back(other);
      return {all, all};
    }
    size_t cube = core / 3 * 3;
    std::vector<size_t> vectors = {cube + 1, cube + 2};
    if (mode == kVectorsOfABlock) return {vectors, vectors};
    return core == cube ? std::pair{std::vector{cube}, vectors}
                        : std::pair{vectors, std::vector{cube}};
  }

  void cross_set(size_t t, uint32_t sequence, const Instruction& item) {
    auto [senders, receivers] = group(t / kPipes, item.event);
    states_[t / kPipes].pending[item.id].push_back(complete(t, sequence));
    if (states_[t / kPipes].pending[item.id].size() > kCounterLimit)
      complain("counter", "more than 15 sets wait for the other cores", t, item);
    for (size_t sender : senders)
      if (states_[sender].pending[item.id].empty()) return;
    Clock clock;
    for (size_t sender : senders) {
      join(clock, states_[sender].pending[item.id].front());
      states_[sender].pending[item.id].pop_front();
    }
    for (size_t receiver : receivers) {
      Counter& counter = states_[receiver].counters[item.id];
      counter.ready.push_back(clock);
      counter.where = item.where;
      if (counter.ready.size() > kCounterLimit)
        complain("counter",
                 "raises the counter of flag " + number(item.id) + " of " +
                     machine_.cores[receiver]->name() + " above 15",
                 t, item);
    }
  }

  void cross_wait(size_t t, uint32_t sequence, const Instruction& item) {
    Counter& counter = state(t).counters[item.id];
    Clock clock = std::move(counter.ready.front());
    counter.ready.pop_front();
    learn(t, sequence, clock);
  }

  void complain(const char* kind, const std::string& text, size_t t, const Instruction& item,
                const std::string& key = "") {
    machine_.complain(kind, text, core(t), item.name, item.where, key);
  }

  void deadlock(const std::vector<size_t>& threads) {
    std::string text;
    for (size_t t : threads) {
      if (done(t)) continue;
      const Instruction& item = queue(t)[next(t)];
      bool held = state(t).next[PIPE_S] < item.gate && t % kPipes != PIPE_S;
      text += (text.empty() ? "" : "; ") + core(t)->name() + " " + kPipeNames[t % kPipes] +
              " stands at " + (held ? "an instruction behind PIPE_S: " : "") + item.name + " (" +
              item.where.text() + ")";
      if (!held && item.kind != Kind::Work && item.kind != Kind::BarrierAll)
        text += " for flag " + number(item.id);
    }
    machine_.complain("deadlock", text, nullptr, "", Where("", 0), "deadlock");
  }

  void left_over() {
    for (size_t c = 0; c < states_.size(); ++c) {
      const Core* core = machine_.cores[c].get();
      for (auto& [key, flag] : states_[c].flags)
        if (flag.set)
          machine_.complain("left over", "nothing waits for flag " + number(key.second), core,
                            "SetFlag", flag.where);
      for (int id = 0; id < kCrossFlags; ++id) {
        size_t ready = states_[c].counters[id].ready.size(),
               pending = states_[c].pending[id].size();
        if (ready)
          machine_.complain("left over",
                            number(ready) + " sets of flag " + number(id) + " are never waited for",
                            core, "CrossCoreSetFlag", states_[c].counters[id].where);
        if (pending)
          machine_.complain(
              "left over",
              number(pending) + " sets of flag " + number(id) + " wait for the other cores", core,
              "CrossCoreSetFlag", Where("", 0));
      }
    }
  }
};

}  // namespace AscendC::emulator

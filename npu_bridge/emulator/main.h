// Runs a kernel as a job file says and writes a report; see README.md for both formats.
#pragma once

#include <ucontext.h>

#include <fstream>
#include <iostream>
#include <iterator>
#include <sstream>

#include "kernel_operator.h"
#include "schedule.h"

namespace AscendC::emulator {

struct Argument {
  std::string name, role, path;
  uint64_t bytes = 0;
  Memory* memory = nullptr;
};

struct Job {
  int blocks = 1;
  std::vector<Argument> arguments;
  std::vector<Policy> policies;
  std::string report;
};

[[noreturn]] inline void fail(const std::string& text) {
  std::cerr << text << "\n";
  std::exit(2);
}

inline int index_of(const std::string& name, const char* const* names, int count) {
  for (int i = 0; i < count; ++i)
    if (name == names[i]) return i;
  fail("unknown name " + name);
}

inline Policy delay(int kind, int pipe) {
  return {std::string("delay ") + kKindNames[kind] + " " + kPipeNames[pipe], false, 0, kind, pipe};
}

inline Policy shuffled(uint64_t seed) { return {"random " + std::to_string(seed), true, seed}; }

// Round robin, three random orders, and each pipe that a kind of core has kept back in turn.
inline std::vector<Policy> all_policies() {
  std::vector<Policy> policies = {{"round_robin"}, shuffled(1), shuffled(2), shuffled(3)};
  for (int pipe : {PIPE_S, PIPE_M, PIPE_MTE1, PIPE_MTE2, PIPE_FIX})
    policies.push_back(delay(0, pipe));
  for (int pipe : {PIPE_S, PIPE_V, PIPE_MTE2, PIPE_MTE3}) policies.push_back(delay(1, pipe));
  return policies;
}

inline void read_policy(std::istream& line, std::vector<Policy>& policies) {
  std::string name, kind, pipe;
  uint64_t seed;
  line >> name;
  if (name == "all")
    policies = all_policies();
  else if (name == "round_robin")
    policies.push_back({name});
  else if (name == "random" && line >> seed)
    policies.push_back(shuffled(seed));
  else if (name == "delay" && line >> kind >> pipe)
    policies.push_back(delay(index_of(kind, kKindNames, 2), index_of(pipe, kPipeNames, kPipes)));
  else
    fail("unknown policy " + name);
}

inline Job read_job(const std::string& path) {
  Job job;
  std::ifstream file(path);
  if (!file) fail("cannot read " + path);
  for (std::string text; std::getline(file, text);) {
    std::istringstream line(text);
    std::string word;
    if (!(line >> word)) continue;
    if (word == "blocks")
      line >> job.blocks;
    else if (word == "report")
      line >> job.report;
    else if (word == "policy")
      read_policy(line, job.policies);
    else if (word == "arg") {
      Argument argument;
      line >> argument.name >> argument.role >> argument.bytes >> argument.path;
      job.arguments.push_back(argument);
    } else
      fail("unknown line: " + text);
  }
  if (job.policies.empty()) job.policies = {{"round_robin"}};
  return job;
}

inline std::vector<uint8_t> read_bytes(const Argument& argument) {
  std::ifstream file(argument.path, std::ios::binary);
  std::vector<uint8_t> bytes{std::istreambuf_iterator<char>(file), {}};
  if (bytes.size() != argument.bytes)
    fail(argument.path + " has " + std::to_string(bytes.size()) + " bytes, " + argument.name +
         " has " + std::to_string(argument.bytes));
  return bytes;
}

inline void allocate(Argument& argument) {
  const std::string& role = argument.role;
  if (role == "null") return;
  machine().buffers.push_back(std::make_unique<Memory>());
  argument.memory = machine().buffers.back().get();
  argument.memory->name = argument.name;
  argument.memory->bytes = argument.bytes;
  argument.memory->read_only = role == "in";
  if (role == "in" || role == "inout")
    argument.memory->initial = read_bytes(argument);
  else if (role != "out" && role != "workspace")
    fail("unknown role " + role);
  argument.memory->reset();
}

inline bool is_output(const Argument& argument) {
  return argument.role == "out" || argument.role == "inout";
}

inline std::vector<std::vector<uint8_t>> outputs(const Job& job) {
  std::vector<std::vector<uint8_t>> result;
  for (const Argument& argument : job.arguments)
    if (is_output(argument)) result.push_back(argument.memory->data);
  return result;
}

inline void write_outputs(const Job& job, const std::vector<std::vector<uint8_t>>& contents) {
  size_t i = 0;
  for (const Argument& argument : job.arguments) {
    if (!is_output(argument)) continue;
    std::ofstream(argument.path, std::ios::binary)
        .write(reinterpret_cast<const char*>(contents[i].data()), contents[i].size());
    ++i;
  }
}

inline std::string quoted(const std::string& text) {
  std::string result = "\"";
  for (char c : text) {
    if (c == '"' || c == '\\') result += '\\';
    result += c;
  }
  return result + "\"";
}

// {"key": value, …} or [value, …] of texts that are JSON already.
inline std::string listed(const std::vector<std::string>& items, const char* brackets) {
  std::string result(1, brackets[0]);
  for (const std::string& item : items) result += (result.size() > 1 ? ", " : "") + item;
  return result + brackets[1];
}

inline std::string object(const std::map<std::string, uint64_t>& numbers) {
  std::vector<std::string> items;
  for (auto& [name, value] : numbers) items.push_back(quoted(name) + ": " + std::to_string(value));
  return listed(items, "{}");
}

inline std::string complaint_text(const Complaint& c) {
  return listed({"\"kind\": " + quoted(c.kind), "\"text\": " + quoted(c.text),
                 "\"core\": " + quoted(c.core), "\"instruction\": " + quoted(c.instruction),
                 "\"where\": " + quoted(c.where), "\"policy\": " + quoted(c.policy)},
                "{}");
}

inline std::string report(const Job& job, const std::map<std::string, uint64_t>& unwritten) {
  std::map<std::string, uint64_t> instructions, bytes;
  for (auto& core : machine().cores) {
    for (int pipe = 0; pipe < kPipes; ++pipe)
      if (!core->queues[pipe].empty())
        instructions[std::string(kKindNames[int(core->kind)]) + " " + kPipeNames[pipe]] +=
            core->queues[pipe].size();
    for (const Memory& memory : core->memories)
      if (memory.bytes) bytes[memory.name] = std::max(bytes[memory.name], memory.high_water);
  }
  std::vector<std::string> complaints, policies;
  for (const Complaint& complaint : machine().complaints)
    complaints.push_back("\n  " + complaint_text(complaint));
  for (const Policy& policy : job.policies) policies.push_back(quoted(policy.name));
  return "{\"complaints\": " + listed(complaints, "[]") +
         ",\n\"total\": " + std::to_string(machine().complained) +
         ",\n\"instructions\": " + object(instructions) + ",\n\"bytes\": " + object(bytes) +
         ",\n\"unwritten\": " + object(unwritten) + ",\n\"policies\": " + listed(policies, "[]") +
         "}\n";
}

// How many bytes of each output no instruction wrote: no complaint, a kernel may mean it.
inline std::map<std::string, uint64_t> unwritten(const Job& job) {
  std::map<std::string, uint64_t> result;
  for (const Argument& argument : job.arguments)
    if (argument.role == "out") {
      const uint8_t* flags = argument.memory->written.get();
      result[argument.name] = std::count(flags, flags + argument.bytes, 0);
    }
  return result;
}

// The scalar programs of all cores. Each runs until it ends or waits for what it looks at.
class Programs {
 public:
  template <class Kernel>
  Programs(int blocks, Kernel kernel) {
    machine().start(blocks);
    Schedule::reset(machine());
    for (auto& core : machine().cores) {
      contexts_[core.get()] = std::make_unique<Context>();
      start(*core, kernel);
    }
  }

  // Lets a program that waits go on.
  void resume(Core& core) {
    Context& context = *contexts_.at(&core);
    core.looking = false;
    machine().core = &core;
    swapcontext(&outside_, &context.inside);
    machine().core = nullptr;
  }

 private:
  struct Context {
    ucontext_t inside;
    std::vector<char> stack = std::vector<char>(kStack);
    std::function<void()> program;
  };
  static constexpr size_t kStack = 1 << 20;
  std::map<Core*, std::unique_ptr<Context>> contexts_;
  ucontext_t outside_;

  template <class Kernel>
  void start(Core& core, Kernel kernel) {
    Context& context = *contexts_.at(&core);
    context.program = [kernel, &core] {
      kernel();
      if (core.open)
        machine().complain("end", "PipeBarrier<PIPE_ALL>() is not the last call of the core", &core,
                           core.open, core.opened);
    };
    core.wait = [this, &context] { swapcontext(&context.inside, &outside_); };
    getcontext(&context.inside);
    context.inside.uc_stack.ss_sp = context.stack.data();
    context.inside.uc_stack.ss_size = context.stack.size();
    context.inside.uc_link = &outside_;
    auto pointer = reinterpret_cast<uintptr_t>(&context);  // makecontext passes ints
    makecontext(&context.inside, reinterpret_cast<void (*)()>(&enter), 2, int(pointer >> 32),
                int(pointer & 0xffffffff));
    resume(core);
  }

  static void enter(int high, int low) {
    uintptr_t pointer = uintptr_t(uint32_t(high)) << 32 | uint32_t(low);
    reinterpret_cast<Context*>(pointer)->program();
  }
};

// Runs the programs under the first policy, and what they recorded under every other one: all must
// give the same bytes.
inline std::map<std::string, uint64_t> run(const Job& job, Programs& programs) {
  std::vector<std::vector<uint8_t>> first;
  std::map<std::string, uint64_t> holes;
  for (const Policy& policy : job.policies) {
    bool check = &policy == &job.policies.front();
    machine().policy = policy.name;
    if (check) {
      Schedule(machine(), true).run(policy, [&](Core& core) { programs.resume(core); });
    } else {
      Schedule::reset(machine());
      Schedule(machine(), false).run(policy);
    }
    if (check) {
      first = outputs(job);
      holes = unwritten(job);
    } else if (outputs(job) != first) {
      machine().complain("order",
                         "the outputs differ from those under " + job.policies.front().name,
                         nullptr, "", Where("", 0), policy.name);
    }
  }
  write_outputs(job, first);
  return holes;
}

template <class... A, size_t... I>
Programs programs(const Job& job, void (*kernel)(A...), std::index_sequence<I...>) {
  static_assert((std::is_pointer_v<A> && ...), "a kernel takes pointers to global memory");
  auto pointer = [&job](size_t i) {
    return job.arguments[i].memory ? job.arguments[i].memory->data.data() : nullptr;
  };
  return Programs(job.blocks, [=] { kernel(reinterpret_cast<A>(pointer(I))...); });
}

}  // namespace AscendC::emulator

namespace AscendC {

// 0: no complaint; 1: complaints, listed in the report; 2: the job itself is wrong.
template <class... A>
int emulate(int argc, char** argv, void (*kernel)(A...)) {
  using namespace emulator;
  if (argc < 2) fail("usage: kernel JOB");
  Job job = read_job(argv[1]);
  if (job.arguments.size() != sizeof...(A))
    fail("the kernel takes " + std::to_string(sizeof...(A)) + " arguments, the job has " +
         std::to_string(job.arguments.size()));
  for (Argument& argument : job.arguments) allocate(argument);
  Programs started = programs(job, kernel, std::index_sequence_for<A...>());
  std::string text = report(job, run(job, started));
  if (job.report.empty())
    std::cout << text;
  else
    std::ofstream(job.report) << text;
  return machine().complained ? 1 : 0;
}

}  // namespace AscendC

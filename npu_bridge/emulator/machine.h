// The emulated machine: memories, instructions and what is checked when one is recorded.
//
// A kernel's scalar program runs first, core after core, and only records instructions; schedule.h
// executes them afterwards.
#pragma once

#include <cctype>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "facts.h"

enum pipe_t : uint8_t {
  PIPE_S,
  PIPE_V,
  PIPE_M,
  PIPE_MTE1,
  PIPE_MTE2,
  PIPE_MTE3,
  PIPE_FIX,
  PIPE_ALL
};

namespace AscendC::emulator {

constexpr int kPipes = PIPE_ALL;
constexpr const char* kPipeNames[] = {"PIPE_S",    "PIPE_V",    "PIPE_M",   "PIPE_MTE1",
                                      "PIPE_MTE2", "PIPE_MTE3", "PIPE_FIX", "PIPE_ALL"};

// Ascend 910B (arch 2201). What is kept back: 256 B of UB and of L1 by the runtime, 8 KiB of UB by
// the library (Select needs it).
enum class Place : uint8_t { GM, L1, L0A, L0B, L0C, UB };
constexpr int kPlaces = 6;
constexpr const char* kPlaceNames[] = {"GM", "L1", "L0A", "L0B", "L0C", "UB"};
constexpr uint64_t kCapacity[] = {0,         512 * 1024 - 256, 64 * 1024,
                                  64 * 1024, 128 * 1024,       192 * 1024 - 256 - 8 * 1024};
static_assert(kCapacity[int(Place::UB)] <= facts::kScratchBegin, "the library writes there");
constexpr uint32_t kAlignment[] = {1, 32, 512, 512, 64, 32};
// Bytes per cell of the race detector, as a power of two. Vector instructions write single
// elements; everything else moves blocks of 32 bytes.
constexpr int kCellBits[] = {1, 5, 5, 5, 5, 1};

constexpr uint8_t kPoison = 0xff;  // a NaN in every floating type
constexpr size_t kListed = 50;     // complaints in the report
constexpr uint64_t kGuard =
    1 << 20;  // kept free behind a buffer, so that a pointer beyond it meets no other

// Where in the kernel's text a call stands.
struct Where {
  const char* file;
  int line;
  Where(const char* file = __builtin_FILE(), int line = __builtin_LINE())
      : file(file), line(line) {}
  std::string text() const {
    if (line == 0) return "";
    std::string path = file;
    return path.substr(path.find_last_of('/') + 1) + ":" + std::to_string(line);
  }
};

// An integer field of an instruction that remembers the value it was given.
template <class T>
struct Field {
  int64_t given;
  template <class Integer>
  Field(Integer value) : given(int64_t(value)) {}
  operator T() const { return T(given); }
};

// Who wrote a cell last and who has read it since: (thread, sequence number); 0 is nobody.
struct Cell {
  uint32_t written, read;
  uint16_t writer, reader;
};
constexpr uint16_t kManyReaders = 0xffff;

template <class T>
struct Zeroed {  // calloc gives pages that cost nothing until they are touched
  std::unique_ptr<T[], decltype(&std::free)> items{nullptr, &std::free};
  void reset(size_t count) { items.reset(static_cast<T*>(std::calloc(count + 1, sizeof(T)))); }
  T* get() const { return items.get(); }
};

struct Memory {
  std::string name;
  Place place = Place::GM;
  uint64_t bytes = 0;
  bool read_only = false;
  std::vector<uint8_t> initial;  // GM: the contents before the kernel
  uint64_t high_water = 0;

  std::vector<uint8_t> data;
  Zeroed<uint8_t> written;  // one flag per byte
  Zeroed<Cell> cells;
  std::map<uint64_t, std::vector<std::pair<uint16_t, uint32_t>>> readers;  // of cells with many

  int cell_bits() const { return kCellBits[int(place)]; }

  void reset() {
    data.reserve(bytes + kGuard);
    data.assign(bytes, kPoison);
    std::copy(initial.begin(), initial.end(), data.begin());
    written.reset(bytes);
    std::fill_n(written.get(), initial.size(), 1);
    cells.reset((bytes >> cell_bits()) + 1);
    readers.clear();
  }
};

// `count` pieces of `length` bytes, `stride` apart.
struct Access {
  Memory* memory;
  uint64_t offset;
  uint32_t length, count;
  uint64_t stride;
  bool ordered = true;   // takes part in the search for races
  bool contents = true;  // read: must have been written; write: is written from now on

  uint64_t end() const { return offset + (count - 1) * stride + length; }
};

enum class Kind : uint8_t {
  Work,
  SetFlag,
  WaitFlag,
  Barrier,
  BarrierAll,
  CrossSet,
  CrossWait,
  Look,       // a scalar reads what an instruction has written
  Invalidate  // drops what the scalars' cache holds
};

struct Instruction {
  const char* name;
  Where where;
  Kind kind = Kind::Work;
  pipe_t pipe = PIPE_S;
  uint32_t gate = 0;  // entries of the core's PIPE_S that must have passed before this one issues
  uint8_t event = 0;  // SetFlag, WaitFlag: the HardEvent; CrossSet: the mode
  uint8_t id = 0;
  std::vector<uint32_t> drained{};  // BarrierAll: instructions of each pipe before it
  std::vector<Access> reads{}, writes{};
  std::function<void()> run{};
  uint64_t looked = 0;  // Look: the bytes that were read
};

enum class CoreKind : uint8_t { AIC, AIV };
constexpr const char* kKindNames[] = {"AIC", "AIV"};

struct Core {
  CoreKind kind;
  int block, sub;
  std::vector<Instruction> queues[kPipes];
  uint32_t gates = 0;
  Memory memories[kPlaces];
  bool begun = false;          // the first call was made
  const char* open = nullptr;  // the last call, unless it was PipeBarrier<PIPE_ALL>
  Where opened;
  bool looking = false;          // its scalar program waits for what its last instruction reads
  std::function<void()> wait{};  // lets the other programs go on until that is there

  std::string name() const {
    std::string text = kKindNames[int(kind)] + std::to_string(block);
    return kind == CoreKind::AIV ? text + "." + std::to_string(sub) : text;
  }
  bool has(Place place) const {
    return place == Place::GM || (kind == CoreKind::AIV) == (place == Place::UB);
  }
  bool has(pipe_t pipe) const {
    bool vector_pipe = pipe == PIPE_V,
         cube_pipe = pipe == PIPE_M || pipe == PIPE_MTE1 || pipe == PIPE_FIX;
    return kind == CoreKind::AIV ? !cube_pipe : !vector_pipe;
  }
};

struct Complaint {
  std::string kind, text, core, instruction, where, policy;
};

class Machine {
 public:
  int blocks = 0;
  std::vector<std::unique_ptr<Core>> cores;  // AIC, AIV, AIV of block 0, then of block 1, …
  std::vector<std::unique_ptr<Memory>> buffers;
  std::vector<Complaint> complaints;  // the first kListed
  size_t complained = 0;
  std::string policy = "recording";
  Core* core = nullptr;  // whose scalar program is running

  void start(int count) {
    blocks = count;
    cores.clear();
    for (int block = 0; block < count; ++block) {
      add(CoreKind::AIC, block, 0);
      add(CoreKind::AIV, block, 0);
      add(CoreKind::AIV, block, 1);
    }
  }

  Core& at(int block, int member) { return *cores[3 * block + member]; }

  // The buffer that holds an address, its end included so that an empty rest is no error.
  Memory* buffer(const uint8_t* address) {
    for (auto& memory : buffers) {
      const uint8_t* begin = memory->data.data();
      if (address >= begin && address <= begin + memory->bytes) return memory.get();
    }
    return nullptr;
  }

  // A defect met under several policies, or in every turn of a loop with other numbers, is one.
  void complain(const char* kind, const std::string& text, const Core* at, const char* instruction,
                Where where, const std::string& key = "") {
    std::string identity = where.text() + "|" + kind + "|";
    for (char c : key.empty() ? text : key)
      if (!key.empty() || !std::isdigit(static_cast<unsigned char>(c))) identity += c;
    if (!seen_.insert(identity).second) return;
    ++complained;
    if (complaints.size() < kListed)
      complaints.push_back({kind, text, at ? at->name() : "", instruction, where.text(), policy});
  }

 private:
  std::set<std::string> seen_;

  void add(CoreKind kind, int block, int sub) {
    cores.push_back(std::make_unique<Core>());
    Core& core = *cores.back();
    core.kind = kind;
    core.block = block;
    core.sub = sub;
    for (int place = 1; place < kPlaces; ++place) {
      core.memories[place].name = kPlaceNames[place];
      core.memories[place].place = Place(place);
      core.memories[place].bytes = core.has(Place(place)) ? kCapacity[place] : 0;
    }
  }
};

inline Machine& machine() {
  static Machine machine;
  return machine;
}

// Bytes of one memory that an operand may touch: a tensor, seen from its first element.
struct Span {
  Place place;
  Memory* memory;  // null: no buffer of the kernel holds this address
  uint64_t begin, end;
};

inline std::string number(int64_t value) { return std::to_string(value); }

// One instruction while it is recorded. An instruction with a complaint is not executed.
class Call {
 public:
  Call(pipe_t pipe, const char* name, Where where, Kind kind = Kind::Work)
      : core_(*machine().core), item_{name, where} {
    item_.kind = kind;
    item_.pipe = pipe;
    item_.gate = core_.gates;
    note(name, where);
    if (!core_.has(pipe))
      complain("pipe", std::string(kPipeNames[pipe]) + " is not a pipe of this core");
  }

  Call& complain(const char* kind, const std::string& text) {
    machine().complain(kind, text, &core_, item_.name, item_.where);
    ok_ = false;
    return *this;
  }

  Call& require(bool holds, const char* kind, const std::string& text) {
    return holds ? *this : complain(kind, text);
  }

  template <class T>
  Call& field(const char* name, const Field<T>& field, int64_t low = 0,
              int64_t high = std::numeric_limits<T>::max()) {
    return require(field.given >= low && field.given <= high, "field",
                   std::string(name) + " is " + number(field.given) + ", allowed is " +
                       number(low) + " to " + number(high));
  }

  template <class T>
  Call& field(const char* name, const Field<T>& value, facts::Limit limit) {
    return field(name, value, limit.low, limit.high);
  }

  // An operand's memory and the alignment of its first byte.
  Call& operand(const char* name, const Span& span, std::initializer_list<Place> allowed,
                uint32_t alignment = 0) {
    bool found = false;
    for (Place place : allowed) found |= place == span.place;
    if (!found)
      return complain("memory", std::string(name) + " lies in " + kPlaceNames[int(span.place)]);
    if (!core_.has(span.place))
      return complain("memory", std::string(name) + " lies in " + kPlaceNames[int(span.place)] +
                                    ", which this core does not have");
    uint32_t multiple = alignment ? alignment : kAlignment[int(span.place)];
    return require(span.begin % multiple == 0, "alignment",
                   std::string(name) + " begins at byte " + number(span.begin) +
                       ", not at a multiple of " + number(multiple));
  }

  Call& read(const Span& span, uint64_t offset, uint64_t length, uint64_t count = 1,
             uint64_t stride = 0, bool ordered = true, bool contents = true) {
    return access(item_.reads, "reads", span, offset, length, count, stride, ordered, contents);
  }

  Call& write(const Span& span, uint64_t offset, uint64_t length, uint64_t count = 1,
              uint64_t stride = 0, bool ordered = true, bool contents = true) {
    if (span.memory && span.memory->read_only)
      return complain("read-only", "writes the input " + span.memory->name);
    return access(item_.writes, "writes", span, offset, length, count, stride, ordered, contents);
  }

  // The pieces of one operand written by one instruction must be disjoint.
  Call& disjoint(const char* name, uint64_t length, uint64_t count, uint64_t stride) {
    return require(count <= 1 || stride >= length, "overlap",
                   std::string(name) + ": pieces of " + number(length) + " B written " +
                       number(stride) + " B apart overlap");
  }

  // Source and destination that overlap without being the same pieces.
  Call& no_overlap() {
    for (const Access& write : item_.writes)
      for (const Access& read : item_.reads)
        if (write.memory == read.memory && touch(write, read) && !same(write, read) &&
            !among(write, item_.reads))
          return complain("overlap", "source and destination overlap");
    return *this;
  }

  void run(std::function<void()> work) {
    if (!ok_) work = nullptr, item_.reads.clear(), item_.writes.clear();
    item_.run = std::move(work);
    record();
  }

  void sync(uint8_t event, uint8_t id) {
    item_.event = event;
    item_.id = id;
    if (ok_) record();
  }

  void barrier_all() {
    for (auto& queue : core_.queues) item_.drained.push_back(uint32_t(queue.size()));
    record();
  }

  // Everything recorded after this call waits until PIPE_S has passed it.
  void gate() { core_.gates = uint32_t(core_.queues[PIPE_S].size()); }

  // Reads up to 8 bytes for the scalar program, which waits for them.
  uint64_t look(const Span& span, uint64_t offset, uint64_t length) {
    read(span, offset, length);
    if (!ok_) return 0;
    Core& core = core_;
    auto& queue = core.queues[PIPE_S];
    record();
    gate();
    size_t at = queue.size() - 1;
    core.looking = true;
    core.wait();
    return core.queues[PIPE_S][at].looked;
  }

  bool ok() const { return ok_; }

 private:
  Core& core_;
  Instruction item_;
  bool ok_ = true;

  void record() { core_.queues[item_.pipe].push_back(std::move(item_)); }

  // What every core's program must begin and end with; such a defect stops no call.
  void note(const char* name, Where where) {
    if (!core_.begun)
      machine().complain("state", "the core begins without InitSocState()", &core_, name, where);
    core_.begun = true;
    core_.open = name;
    core_.opened = where;
  }

  Call& access(std::vector<Access>& list, const char* verb, const Span& span, uint64_t offset,
               uint64_t length, uint64_t count, uint64_t stride, bool ordered, bool contents) {
    if (!ok_ || length == 0 || count == 0) return *this;
    if (!span.memory) return complain("bounds", std::string(verb) + " no buffer of the kernel");
    if (stride == length) length *= count, count = 1;
    if (count == 1) stride = length;
    Access access{
        span.memory, span.begin + offset, uint32_t(length), uint32_t(count), stride, ordered,
        contents};
    std::string reach =
        std::string(verb) + " " + span.memory->name + " up to byte " + number(access.end());
    if (span.place == Place::UB && access.end() > facts::kScratchBegin)
      return complain("scratch", reach + "; from " + number(facts::kScratchBegin) +
                                     " on it is the library's, and Select writes there");
    if (access.end() > span.memory->bytes)
      return complain("bounds", reach + " of " + number(span.memory->bytes));
    if (access.end() > span.end)
      return complain("bounds", reach + ", past the end of its tensor at " + number(span.end));
    span.memory->high_water = std::max(span.memory->high_water, access.end());
    list.push_back(access);
    return *this;
  }

  static bool same(const Access& a, const Access& b) {
    return a.offset == b.offset && a.length == b.length && a.count == b.count &&
           a.stride == b.stride;
  }
  static bool among(const Access& a, const std::vector<Access>& list) {
    for (const Access& b : list)
      if (a.memory == b.memory && same(a, b)) return true;
    return false;
  }
  static bool touch(const Access& a, const Access& b) {
    if (a.end() <= b.offset || b.end() <= a.offset) return false;
    for (uint32_t i = 0; i < a.count; ++i) {
      uint64_t low = a.offset + i * a.stride, high = low + a.length;
      bool later = b.stride && low > b.offset + b.length;
      uint64_t first = later ? (low - b.offset - b.length) / b.stride : 0;
      for (uint64_t j = first; j < b.count && b.offset + j * b.stride < high; ++j)
        if (b.offset + j * b.stride + b.length > low) return true;
    }
    return false;
  }
};

}  // namespace AscendC::emulator

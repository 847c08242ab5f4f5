// Runs the emitted kernel on the emulator, with the arrays that acl.h allocated.
#include "main.h"

#include "aclrtlaunch_pasa_attention.h"
#include "pasa_attention.cpp"

namespace {

template <class... A, size_t... I>
void Call(void (*kernel)(A...), const std::vector<uint8_t*>& arguments, std::index_sequence<I...>) {
    kernel(reinterpret_cast<A>(arguments[I])...);
}

template <class... A>
void Run(void (*kernel)(A...), uint32_t cores, const std::vector<uint8_t*>& arguments) {
    using namespace AscendC::emulator;
    if (arguments.size() != sizeof...(A)) fail("wrong number of arguments");
    Programs programs(cores, [=] { Call(kernel, arguments, std::index_sequence_for<A...>()); });
    const Policy policy{"round_robin"};
    machine().policy = policy.name;
    Schedule(machine(), true).run(policy, [&](Core& core) { programs.resume(core); });
}

}  // namespace

uint32_t fake::Launch(uint32_t cores, const std::vector<uint8_t*>& arguments) {
    using namespace AscendC::emulator;
    std::vector<uint8_t*> places;
    std::vector<Memory*> memories;
    for (uint8_t* at : arguments) {
        const Allocation& allocation = fake::memory.at(at);
        machine().buffers.push_back(std::make_unique<Memory>());
        Memory& memory = *machine().buffers.back();
        memory.name = "argument " + std::to_string(places.size());
        memory.bytes = allocation.bytes;
        // What the host has not written is not to be read.
        memory.read_only = allocation.written;
        if (allocation.written) memory.initial.assign(at, at + allocation.bytes);
        memory.reset();
        places.push_back(memory.data.data());
        memories.push_back(&memory);
    }
    Run(pasa_attention, cores, places);
    for (size_t i = 0; i < arguments.size(); ++i) {
        std::copy(memories[i]->data.begin(), memories[i]->data.end(), arguments[i]);
    }
    for (const Complaint& c : machine().complaints) std::cerr << c.kind << ": " << c.text << "\n";
    return machine().complained ? 1 : 0;
}

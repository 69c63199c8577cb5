// An emulator of PTX: of the instructions that nvcc makes of csrc/cuda for sm_80 and sm_90a, and of
// no others. What it does not know, an instruction, a modifier or a directive, is an error that
// names the line.
//
// It is a second opinion. csrc/cuda/host/device.h gives the kernels' own words a meaning on a CPU;
// here runs what nvcc makes of the kernels with gpu.h, so that inline assembly and the optimizer
// are tested, too. What an instruction does is written from the PTX ISA (version 9.0; comments name
// its sections by their titles, as numbers change), and nothing here includes or follows
// csrc/cuda/host: a misreading would have to be made twice.
//
// Of a warp the lanes that are least far go on, so those that have parted meet again; what a warp
// does together waits for all of them. Warps, and a few blocks at a time, take turns that are drawn
// from a seed; asynchronous copies arrive as late as they may, and registers and shared memory
// begin as garbage. What is stored is seen by all threads at once.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

namespace ptx {

struct Error : std::runtime_error {
    using std::runtime_error::runtime_error;
};

constexpr int kLanes = 32;

using Lanes = uint32_t;  // a bit each

struct Warp;
struct Instruction;
using Execute = std::function<void(Warp&, const Instruction&, Lanes)>;

struct Instruction {
    enum Flow { kPlain, kBranch, kReturn, kBarrier };

    Flow flow = kPlain;
    Execute execute;          // of a plain one
    bool collective = false;  // waits for all lanes
    bool polls = false;       // asks for what others store: they get their turn
    int target = -1;          // of a branch

    // Rows of the warp's registers, each of a number for each lane.
    std::vector<int> to, from;
    int guard = -1, beside = -1;  // predicates: @p, and the p of a shuffle's d|p
    bool negated = false;
    std::vector<int64_t> offsets;  // of the addresses among `from`

    int line = 0;
    std::string text;
};

// Rows of registers that every kernel has, in this order.
constexpr const char* kSpecial[] = {"%tid.x",   "%tid.y",   "%tid.z",    "%ctaid.x",  "%ctaid.y",
                                    "%ctaid.z", "%ntid.x",  "%nctaid.x", "%nctaid.y", "%nctaid.z",
                                    "%laneid",  "%envreg1", "%envreg2"};

struct Parameter {
    std::string name;
    size_t size, offset;
};

struct Kernel {
    std::string name;
    std::vector<Parameter> parameters;
    size_t parameter_bytes = 0;
    int most_threads = 1024;
    std::string body;  // until it is decoded, at the first launch
    int body_line = 0;
    std::vector<Instruction> code;
    int registers = 0;
    std::map<uint64_t, int> constants;  // and the rows that hold them
};

struct Module {
    explicit Module(const std::string& path);
    std::map<std::string, Kernel> kernels;
    std::vector<std::string> shared;  // names of the block's shared memory
};

void decode(const Module& module, Kernel& kernel);  // parse.cpp

// What an instruction does, by its whole name and its operands; throws where it is none of those
// that are known. instructions.cpp
Execute find(const std::string& opcode, Instruction& instruction);

struct Launch {
    uint32_t grid[3], threads;
    size_t shared_bytes;
    std::vector<uint8_t> parameters;
    // A cooperative launch, whose blocks run all together. %envreg1 and 2 are the address of its
    // workspace, zeros at first, in which CUDA's cooperative groups count who has come.
    bool cooperative = false;
    uint64_t workspace[4] = {};
};

void run(const Kernel& kernel, const Launch& launch, uint64_t seed);  // execute.cpp

// A running block and its warps ----------------------------------------------------------------

// Addresses of shared memory begin here, so that 0 is nobody's.
constexpr uint32_t kSharedStart = 1024;

struct Block {
    const Kernel* kernel;
    const Launch* launch;
    uint32_t number;
    std::vector<uint8_t> shared;
    // Of a byte of shared memory since the last barrier: bits of warps, and whether all of them
    // were atomic.
    struct Access {
        uint32_t epoch, readers, writers;
        bool atomic;
    };
    std::vector<Access> accesses;
    uint32_t epoch = 1;
    std::vector<Warp> warps;
    size_t waiting = 0, finished = 0;

    // Checks bounds, alignment and who else has been there.
    enum Use { kRead, kWrite, kAtomic };
    uint8_t* shared_at(int warp, uint32_t address, size_t bytes, Use use);
};

struct Warp {
    Block* block;
    int index;
    int next[kLanes] = {};   // instructions
    Lanes live = ~Lanes(0);  // those that have not returned,
    Lanes held = 0;          // and of these, those that wait for the others
    bool waiting = false;    // at a barrier
    const Instruction* at = nullptr;
    std::vector<uint64_t> registers;

    // Groups of asynchronous copies that have not arrived; the last one is still open.
    struct Copy {
        uint32_t to;
        uint64_t from;
        size_t bytes;  // of 16, which zeros fill up
    };
    std::deque<std::vector<Copy>> copies[kLanes];

    uint64_t* row(int at) { return &registers[size_t(at) * kLanes]; }
};

template <class Body>
void each(Lanes lanes, Body body) {
    for (int lane = 0; lane < kLanes; ++lane)
        if (lanes >> lane & 1) body(lane);
}

// A register's number as one of another type: of its lower bytes, as an instruction of that type
// reads it.
template <class T>
T as(uint64_t number) {
    T result;
    memcpy(&result, &number, sizeof(T));
    return result;
}
template <>
inline bool as<bool>(uint64_t number) {
    return number & 1;
}

// Integers keep their sign in the whole register: loads and conversions extend it, and any other
// reader of fewer bits cuts it off.
template <class T>
uint64_t bits(T value) {
    if constexpr (std::is_integral<T>::value) return uint64_t(int64_t(value));
    uint64_t result = 0;
    memcpy(&result, &value, sizeof(T));
    return result;
}

uint8_t* global_at(uint64_t address, size_t bytes);

std::string hex(uint64_t number);

}  // namespace ptx

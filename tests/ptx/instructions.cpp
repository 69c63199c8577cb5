// What each instruction does: numbers lane by lane, memory, and what a warp does together.
#include <algorithm>
#include <cmath>
#include <regex>

#include "ptx.h"

namespace ptx {

namespace {

// Numbers --------------------------------------------------------------------------------------

// A 16-bit float with so many bits of fraction and of exponent.
template <int kFraction, int kExponent>
struct Half {
    static constexpr int kBias = (1 << (kExponent - 1)) - 1;
    static constexpr int kInfinity = ((1 << kExponent) - 1) << kFraction;

    static double widen(uint16_t half) {
        const int code = half & 0x7fff, fraction = code & ((1 << kFraction) - 1);
        const int exponent = code >> kFraction;
        double size = std::ldexp(fraction + (exponent ? 1 << kFraction : 0),
                                 std::max(exponent, 1) - kBias - kFraction);
        if (code >= kInfinity) size = fraction ? NAN : INFINITY;
        return half >> 15 ? -size : size;
    }

    // The nearest, and of two that are as near the even one.
    static uint16_t narrow(double number) {
        if (std::isnan(number)) return 0x7fff;
        const int sign = std::signbit(number) << 15;
        if (std::isinf(number)) return uint16_t(sign | kInfinity);
        int exponent;  // of the first bit, and one more
        std::frexp(number, &exponent);
        exponent = number == 0 ? 1 - kBias : std::max(exponent - 1, 1 - kBias);
        const double units = std::nearbyint(std::ldexp(std::fabs(number), kFraction - exponent));
        // The fraction's leading one counts up the exponent, and so does what is rounded up to 2.
        const int code = int(units) + ((exponent + kBias - 1) << kFraction);
        return uint16_t(sign | std::min(code, kInfinity));
    }
};
using Float16 = Half<10, 5>;
using BFloat16 = Half<7, 8>;

template <class T>
T divisor(T number) {
    if (number == 0) throw Error("division by zero");
    return number;
}

// "shl" and "shr": amounts beyond the width count as the width.
template <class T>
T shifted_left(T number, uint32_t by) {
    return by < 8 * sizeof(T) ? T(number << by) : T(0);
}
template <class T>
T shifted_right(T number, uint32_t by) {
    if (by < 8 * sizeof(T)) return T(number >> by);
    return number < 0 ? T(-1) : T(0);
}

// "prmt", the default mode: a nibble chooses one of eight bytes, or eight times its sign.
uint32_t permuted(uint32_t a, uint32_t b, uint32_t choice) {
    uint32_t result = 0;
    for (int i = 0; i < 4; ++i) {
        const uint32_t nibble = choice >> (4 * i) & 15;
        uint32_t byte = uint32_t(((uint64_t(b) << 32 | a) >> (8 * (nibble & 7))) & 255);
        if (nibble & 8) byte = byte & 128 ? 255 : 0;
        result |= byte << (8 * i);
    }
    return result;
}

// "lop3": the table is what the function makes of 0xf0, 0xcc and 0xaa, so bit 4 a + 2 b + c of it
// is the result for these bits.
uint32_t logic(uint32_t a, uint32_t b, uint32_t c, uint32_t table) {
    uint32_t result = 0;
    for (int bit = 0; bit < 32; ++bit) {
        const int row = (a >> bit & 1) << 2 | (b >> bit & 1) << 1 | (c >> bit & 1);
        result |= (table >> row & 1) << bit;
    }
    return result;
}

// "bfi": bits of `field` in place of so many of `number`, from a position on.
template <class T>
T with_field(T field, T number, uint32_t position, uint32_t length) {
    for (uint32_t i = 0; i < (length & 255) && i + (position & 255) < 8 * sizeof(T); ++i) {
        const T bit = T(1) << (i + (position & 255));
        number = field >> i & 1 ? number | bit : number & ~bit;
    }
    return number;
}

uint32_t reversed(uint32_t number) {
    uint32_t result = 0;
    for (int bit = 0; bit < 32; ++bit)
        result |= (number >> bit & 1) << (31 - bit);
    return result;
}

// The result of up to four operands.
using Arithmetic = uint64_t (*)(const uint64_t* of);
using Table = std::map<std::string, Arithmetic>;

#define PTX_LANE(T, result)                                                            \
    [](const uint64_t* of) -> uint64_t {                                               \
        [[maybe_unused]] const T a = as<T>(of[0]), b = as<T>(of[1]), c = as<T>(of[2]); \
        return bits(result);                                                           \
    }

// A sum or product of two halves, rounded to double and then again, is what it is rounded at once:
// a double has more than twice their bits. Of fma nvcc makes such sums and products alone.
#define PTX_PAIR(Half, result)                                                    \
    [](const uint64_t* of) -> uint64_t {                                          \
        uint64_t pair = 0;                                                        \
        for (int at = 0; at < 32; at += 16) {                                     \
            [[maybe_unused]] const double a = Half::widen(uint16_t(of[0] >> at)), \
                                          b = Half::widen(uint16_t(of[1] >> at)), \
                                          c = Half::widen(uint16_t(of[2] >> at)); \
            pair |= uint64_t(Half::narrow(result)) << at;                         \
        }                                                                         \
        return pair;                                                              \
    }

template <class T>
Table integers() {
    using Unsigned = std::make_unsigned_t<T>;
    Table table = {{"mov", PTX_LANE(T, a)},
                   {"selp", PTX_LANE(T, as<bool>(of[2]) ? a : b)},
                   {"add", PTX_LANE(T, a + b)},
                   {"sub", PTX_LANE(T, a - b)},
                   {"neg", PTX_LANE(T, -a)},
                   {"mul.lo", PTX_LANE(T, a * b)},
                   {"mad.lo", PTX_LANE(T, a * b + c)},
                   {"div", PTX_LANE(T, a / divisor(b))},
                   {"rem", PTX_LANE(T, a % divisor(b))},
                   {"min", PTX_LANE(T, std::min(a, b))},
                   {"max", PTX_LANE(T, std::max(a, b))},
                   {"and", PTX_LANE(T, a & b)},
                   {"or", PTX_LANE(T, a | b)},
                   {"xor", PTX_LANE(T, a ^ b)},
                   {"not", PTX_LANE(T, ~a)},
                   {"shl", PTX_LANE(T, shifted_left(a, as<uint32_t>(of[1])))},
                   {"shr", PTX_LANE(T, shifted_right(a, as<uint32_t>(of[1])))},
                   {"popc", PTX_LANE(T, __builtin_popcountll(Unsigned(a)))},
                   {"setp.eq", PTX_LANE(T, a == b)},
                   {"setp.ne", PTX_LANE(T, a != b)},
                   {"setp.lt", PTX_LANE(T, a < b)},
                   {"setp.le", PTX_LANE(T, a <= b)},
                   {"setp.gt", PTX_LANE(T, a > b)},
                   {"setp.ge", PTX_LANE(T, a >= b)},
                   {"cvt.s64", PTX_LANE(T, int64_t(a))},
                   {"cvt.u64", PTX_LANE(T, uint64_t(a))},
                   {"cvt.u32", PTX_LANE(T, uint32_t(a))},
                   {"cvt.u16", PTX_LANE(T, uint16_t(a))}};
    if constexpr (sizeof(T) < 8) {
        using Wide = std::conditional_t<std::is_signed<T>::value, int64_t, uint64_t>;
        table["mul.wide"] = PTX_LANE(T, Wide(a) * Wide(b));
    } else {
        table["cvta.to.global"] = PTX_LANE(T, a);
    }
    if constexpr (sizeof(T) == 4) {
        table["prmt"] = PTX_LANE(T, permuted(a, b, c));
        table["lop3"] = PTX_LANE(T, logic(a, b, c, uint32_t(of[3])));
        table["brev"] = PTX_LANE(T, reversed(a));
        table["bfind.shiftamt"] = PTX_LANE(T, a == 0 ? -1 : __builtin_clz(a));
    }
    if constexpr (sizeof(T) >= 4)
        table["bfi"] = PTX_LANE(T, with_field(a, b, uint32_t(of[2]), uint32_t(of[3])));
    return table;
}

template <class T>
Table floats() {
    return {{"mov", PTX_LANE(T, a)},
            {"selp", PTX_LANE(T, as<bool>(of[2]) ? a : b)},
            {"add", PTX_LANE(T, a + b)},
            {"mul", PTX_LANE(T, a * b)},
            {"fma.rn", PTX_LANE(T, std::fma(a, b, c))},
            {"setp.eq", PTX_LANE(T, a == b)},
            {"set.ge.f32", PTX_LANE(T, a >= b ? 1.0f : 0.0f)},
            {"cvt.rn.f16", PTX_LANE(T, Float16::narrow(a))},
            {"cvt.rn.bf16", PTX_LANE(T, BFloat16::narrow(a))}};
}

template <class Half>
Table pairs() {
    return {{"add.rn", PTX_PAIR(Half, a + b)},
            {"mul.rn", PTX_PAIR(Half, a * b)},
            {"fma.rn", PTX_PAIR(Half, a * b + c)}};
}

const Table& arithmetic(const std::string& type) {
    static const std::map<std::string, Table> tables = {
        {"s16", integers<int16_t>()},
        {"s32", integers<int32_t>()},
        {"s64", integers<int64_t>()},
        {"u16", integers<uint16_t>()},
        {"u32", integers<uint32_t>()},
        {"u64", integers<uint64_t>()},
        {"b16", integers<uint16_t>()},
        {"b32", integers<uint32_t>()},
        {"b64", integers<uint64_t>()},
        {"f32", floats<float>()},
        {"f64", floats<double>()},
        {"f16", {{"cvt.f32", PTX_LANE(uint16_t, float(Float16::widen(a)))}}},
        {"f16x2", pairs<Float16>()},
        {"bf16x2", pairs<BFloat16>()},
        {"pred",
         {{"mov", PTX_LANE(bool, a)},
          {"and", PTX_LANE(bool, as<bool>(of[0] & of[1]))},
          {"or", PTX_LANE(bool, as<bool>(of[0] | of[1]))},
          {"not", PTX_LANE(bool, !a)}}},
    };
    static const Table none;
    const auto found = tables.find(type);
    return found == tables.end() ? none : found->second;
}

void compute(Warp& warp, const Instruction& at, int lane, Arithmetic operation) {
    uint64_t of[4] = {};
    for (size_t i = 0; i < at.from.size(); ++i)
        of[i] = warp.row(at.from[i])[lane];
    warp.row(at.to[0])[lane] = operation(of);
}

// "mov": the parts of a number, the lowest first, to registers or from them.
void pack(Warp& warp, const Instruction& at, int lane, int bits_of_part) {
    const uint64_t part = (uint64_t(1) << bits_of_part) - 1;
    const bool packs = at.from.size() > 1;
    uint64_t whole = 0;
    for (size_t i = 0; i < at.from.size(); ++i)
        whole |= (warp.row(at.from[i])[lane] & (packs ? part : ~uint64_t(0))) << (bits_of_part * i);
    for (size_t i = 0; i < at.to.size(); ++i)
        warp.row(at.to[i])[lane] = packs ? whole : whole >> (bits_of_part * i) & part;
}

// Memory ---------------------------------------------------------------------------------------

enum Space { kParameters, kGlobal, kShared };

// The address operand of a lane, with its offset.
uint64_t address(Warp& warp, const Instruction& at, int lane, int operand = 0) {
    return warp.row(at.from[operand])[lane] + at.offsets[operand];
}

uint8_t* place(Warp& warp, Space space, uint64_t address, size_t bytes, Block::Use use) {
    if (address % bytes != 0) throw Error("misaligned address " + hex(address));
    if (space == kGlobal) return global_at(address, bytes);
    if (space == kShared) return warp.block->shared_at(warp.index, uint32_t(address), bytes, use);
    const std::vector<uint8_t>& parameters = warp.block->launch->parameters;
    if (address + bytes > parameters.size()) throw Error("beyond the parameters");
    return const_cast<uint8_t*>(parameters.data() + address);
}

// Elements of a vector are next to each other, and it is aligned as a whole.
void load(Warp& warp, const Instruction& at, int lane, Space space, size_t bytes, bool with_sign) {
    const int unused = 64 - 8 * int(bytes);
    const uint8_t* from =
        place(warp, space, address(warp, at, lane), bytes * at.to.size(), Block::kRead);
    for (const int row : at.to) {
        uint64_t number = 0;
        memcpy(&number, from, bytes);
        if (with_sign) number = uint64_t(int64_t(number << unused) >> unused);
        warp.row(row)[lane] = number;
        from += bytes;
    }
}

void store(Warp& warp, const Instruction& at, int lane, Space space, size_t bytes) {
    const size_t count = at.from.size() - 1;
    uint8_t* const to = place(warp, space, address(warp, at, lane), bytes * count, Block::kWrite);
    for (size_t i = 0; i < count; ++i)
        memcpy(to + i * bytes, &warp.row(at.from[1 + i])[lane], bytes);
}

void atomic(Warp& warp, const Instruction& at, int lane, Space space, size_t bytes, bool adds) {
    uint8_t* const memory = place(warp, space, address(warp, at, lane), bytes, Block::kAtomic);
    uint64_t old = 0, operand = 0;
    memcpy(&old, memory, bytes);
    memcpy(&operand, &warp.row(at.from[1])[lane], bytes);
    const uint64_t fresh = adds ? old + operand : std::min(old, operand);
    memcpy(memory, &fresh, bytes);
    warp.row(at.to[0])[lane] = old;
}

// "cp.async": what is beyond src-size is filled with zeros. Until the wait the place holds neither
// what was there nor what will be.
void copy_later(Warp& warp, const Instruction& at, int lane) {
    const uint64_t to = address(warp, at, lane), from = address(warp, at, lane, 1);
    const uint32_t all = uint32_t(warp.row(at.from[2])[lane]);
    const uint32_t bytes = uint32_t(warp.row(at.from[3])[lane]);
    if (all != 16 || bytes > 16) throw Error("a copy of other than 16 bytes");
    if (from % 16 != 0) throw Error("misaligned address " + hex(from));
    if (bytes > 0) global_at(from, bytes);
    memset(place(warp, kShared, to, 16, Block::kWrite), 0xa5, 16);
    warp.copies[lane].back().push_back({uint32_t(to), from, bytes});
}

// "cp.async.wait_group": until so many of the thread's latest groups are pending, at most.
void wait(Warp& warp, const Instruction& at, int lane) {
    auto& groups = warp.copies[lane];
    for (; groups.size() - 1 > warp.row(at.from[0])[lane]; groups.pop_front()) {
        for (const Warp::Copy& copy : groups.front()) {
            uint8_t* const to = place(warp, kShared, copy.to, 16, Block::kWrite);
            memset(to, 0, 16);
            if (copy.bytes > 0) memcpy(to, global_at(copy.from, copy.bytes), copy.bytes);
        }
    }
}

// Of a warp ------------------------------------------------------------------------------------

// "ldmatrix": thread 8 m + r holds the address of row r of matrix m, eight elements of 16 bits.
// Thread t receives elements 2 (t % 4) and the next one of row t / 4 of each matrix; with .trans,
// of the matrix whose columns are these rows.
template <bool kTransposed>
void load_matrices(Warp& warp, const Instruction& at, Lanes) {
    for (int matrix = 0; matrix < 4; ++matrix) {
        uint16_t element[8][8];
        for (int row = 0; row < 8; ++row) {
            const uint64_t from = address(warp, at, 8 * matrix + row);
            memcpy(element[row], place(warp, kShared, from, 16, Block::kRead), 16);
        }
        for (int thread = 0; thread < kLanes; ++thread) {
            const int row = thread / 4, column = 2 * (thread % 4);
            const auto of = [&](int r, int c) {
                return uint32_t(kTransposed ? element[c][r] : element[r][c]);
            };
            warp.row(at.to[matrix])[thread] = of(row, column) | of(row, column + 1) << 16;
        }
    }
}

// "Matrix Fragments for mma.m16n8k16 with floating point type": with groupID = laneid >> 2 and
// threadID_in_group = laneid % 4,
//   A  row = groupID            for ai where 0 <= i < 2 || 4 <= i < 6
//            groupID + 8        otherwise
//      col = threadID_in_group * 2 + (i & 1)       for ai where i < 4
//            threadID_in_group * 2 + (i & 1) + 8   for ai where i >= 4
//   B  row = threadID_in_group * 2 + (i & 1)       for bi where i < 2
//            threadID_in_group * 2 + (i & 1) + 8   for bi where i >= 2
//      col = groupID
//   C  row = groupID for ci where i < 2, groupID + 8 for ci where i >= 2
//      col = threadID_in_group * 2 + (i & 1)
// Of how the sums are rounded it says only that they have at least single precision.
template <class Half>
void multiply(Warp& warp, const Instruction& at, Lanes) {
    double a[16][16], b[16][8], d[16][8];
    // Two 16-bit elements a register; four registers of A, two of B, four of C.
    const auto half = [&](int first, int i, int lane) {
        return Half::widen(uint16_t(warp.row(at.from[first + i / 2])[lane] >> (16 * (i % 2))));
    };
    for (int lane = 0; lane < kLanes; ++lane) {
        const int group = lane >> 2, pair = lane % 4 * 2;
        for (int i = 0; i < 8; ++i) {
            const bool upper = i < 2 || (i >= 4 && i < 6);
            a[upper ? group : group + 8][pair + (i & 1) + (i < 4 ? 0 : 8)] = half(0, i, lane);
        }
        for (int i = 0; i < 4; ++i) {
            b[pair + (i & 1) + (i < 2 ? 0 : 8)][group] = half(4, i, lane);
            d[i < 2 ? group : group + 8][pair + (i & 1)] =
                as<float>(warp.row(at.from[6 + i])[lane]);
        }
    }
    for (int row = 0; row < 16; ++row)
        for (int k = 0; k < 16; ++k)
            for (int column = 0; column < 8; ++column)
                d[row][column] += a[row][k] * b[k][column];
    for (int lane = 0; lane < kLanes; ++lane)
        for (int i = 0; i < 4; ++i)
            warp.row(at.to[i])[lane] =
                bits(float(d[(lane >> 2) + (i < 2 ? 0 : 8)][lane % 4 * 2 + (i & 1)]));
}

void expect_all(Warp& warp, int members, int lane) {
    if (uint32_t(warp.row(members)[lane]) != ~Lanes(0)) throw Error("a mask of not all lanes");
}

// "shfl.sync": c holds the clamp in its bits 0 to 4 and the mask of a segment in 8 to 12. A lane
// whose source is not within its segment keeps its own, and its predicate is false.
template <bool kUp>
void shuffle(Warp& warp, const Instruction& at, Lanes lanes) {
    uint64_t source[kLanes];
    memcpy(source, warp.row(at.from[0]), sizeof(source));
    each(lanes, [&](int lane) {
        expect_all(warp, at.from[3], lane);
        const int b = int(warp.row(at.from[1])[lane]) & 31, c = int(warp.row(at.from[2])[lane]);
        const int clamp = c & 31, segment = c >> 8 & 31;
        const int farthest = (lane & segment) | (clamp & ~segment);
        int from = kUp ? lane - b : (lane & segment) | (b & ~segment);
        const bool within = kUp ? from >= farthest : from <= farthest;
        if (!within) from = lane;
        warp.row(at.to[0])[lane] = uint32_t(source[from]);
        if (at.beside >= 0) warp.row(at.beside)[lane] = within;
    });
}

void ballot(Warp& warp, const Instruction& at, Lanes lanes) {
    uint32_t found = 0;
    each(lanes, [&](int lane) {
        expect_all(warp, at.from[1], lane);
        found |= uint32_t(as<bool>(warp.row(at.from[0])[lane])) << lane;
    });
    each(lanes, [&](int lane) { warp.row(at.to[0])[lane] = found; });
}

const std::map<std::string, Execute> kOfWarps = {
    {"ldmatrix.sync.aligned.m8n8.x4.shared.b16", load_matrices<false>},
    {"ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16", load_matrices<true>},
    {"mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", multiply<BFloat16>},
    {"mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32", multiply<Float16>},
    {"shfl.sync.up.b32", shuffle<true>},
    {"shfl.sync.idx.b32", shuffle<false>},
    {"vote.sync.ballot.b32", ballot},
};

using OfThread = std::function<void(Warp&, const Instruction&, int lane)>;
using namespace std::placeholders;

const std::map<std::string, OfThread> kOfThreads = {
    {"cp.async.cg.shared.global", copy_later},
    {"cp.async.commit_group",
     [](Warp& warp, const Instruction&, int lane) { warp.copies[lane].emplace_back(); }},
    {"cp.async.wait_group", wait},
    {"membar.gl", [](Warp&, const Instruction&, int) {}},  // stores are seen at once
    {"atom.add.release.gpu.u32", std::bind(atomic, _1, _2, _3, kGlobal, 4, true)},
    {"ld.acquire.gpu.u32", std::bind(load, _1, _2, _3, kGlobal, 4, false)},
    {"trap", [](Warp&, const Instruction&, int) { throw Error("a trap"); }},
};

OfThread find_of_thread(const std::string& opcode, size_t results, size_t operands) {
    if (const auto found = kOfThreads.find(opcode); found != kOfThreads.end()) return found->second;
    static const std::regex memory(
        R"((ld|st)\.(param|global|shared)(\.nc)?(?:\.v([24]))?\.([busf])(8|16|32|64))");
    static const std::regex atomics(R"(atom\.(global|shared)\.(add|min)\.u(32|64))");
    static const std::map<std::string, Space> spaces = {
        {"param", kParameters}, {"global", kGlobal}, {"shared", kShared}};
    std::smatch found;
    if (std::regex_match(opcode, found, memory)) {
        const bool loads = found[1] == "ld";
        const size_t bytes = std::stoul(found[6]) / 8;
        if ((loads ? results : operands - 1) == (found[4].matched ? std::stoul(found[4]) : 1))
            return loads ? OfThread(std::bind(load, _1, _2, _3, spaces.at(found[2]), bytes,
                                              found[5] == "s"))
                         : std::bind(store, _1, _2, _3, spaces.at(found[2]), bytes);
    }
    if (std::regex_match(opcode, found, atomics))
        return std::bind(atomic, _1, _2, _3, spaces.at(found[1]), std::stoul(found[3]) / 8,
                         found[2] == "add");
    const size_t dot = opcode.rfind('.');
    const std::string name = opcode.substr(0, dot), type = opcode.substr(dot + 1);
    if (name == "mov" && results + operands == 3 && (type == "b32" || type == "b64"))
        return std::bind(pack, _1, _2, _3, type == "b32" ? 16 : 32);
    if (results == 1 && operands <= 4 && (name != "mov" || operands == 1)) {
        const Table& table = arithmetic(type);
        const auto operation = table.find(name);
        if (operation != table.end()) return std::bind(compute, _1, _2, _3, operation->second);
    }
    throw Error("an instruction that instructions.cpp does not know");
}

}  // namespace

Execute find(const std::string& opcode, Instruction& instruction) {
    const auto found = kOfWarps.find(opcode);
    instruction.collective = found != kOfWarps.end();
    if (instruction.collective) return found->second;
    instruction.polls = opcode.rfind("ld.acquire", 0) == 0;
    const OfThread made = find_of_thread(opcode, instruction.to.size(), instruction.from.size());
    return [made](Warp& warp, const Instruction& at, Lanes lanes) {
        each(lanes, [&](int lane) { made(warp, at, lane); });
    };
}

}  // namespace ptx

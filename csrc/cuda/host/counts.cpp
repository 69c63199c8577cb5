#include "counts.h"

#include <algorithm>
#include <cstring>
#include <set>
#include <utility>

namespace speft {
namespace cuda {
namespace host {
namespace {

Counts g_counts;

// Cycles in which 32 lanes read or write 16 bytes each, eight lanes at a time: as many as different
// addresses lie in the same four of the 32 banks.
uint64_t cycles_of(const unsigned char* addresses, size_t step) {
    uint64_t cycles = 0;
    for (int first = 0; first < 32; first += 8) {
        std::set<uint64_t> found;
        uint64_t in_banks[8] = {};
        for (int lane = first; lane < first + 8; ++lane) {
            uint64_t address;
            std::memcpy(&address, addresses + size_t(lane) * step, sizeof(address));
            if (address == 0) continue;
            if (found.insert(address).second) ++in_banks[address / 16 % 8];
        }
        cycles += *std::max_element(in_banks, in_banks + 8);
    }
    return cycles;
}

}  // namespace

Counts take_counts() {
    return std::exchange(g_counts, {});
}

void count_copied(bool valid) {
    g_counts.copied_bytes += valid ? 16 : 0;
}

void count_copy(const unsigned char* addresses, size_t step) {
    g_counts.copies += 1;
    g_counts.copy_cycles += cycles_of(addresses, step);
}

void count_product() {
    g_counts.products += 1;
}

void count_matrix_read(const unsigned char* addresses, size_t step) {
    g_counts.matrix_reads += 1;
    g_counts.matrix_cycles += cycles_of(addresses, step);
}

void count_vector_read(const unsigned char* addresses, size_t step) {
    g_counts.vector_reads += 1;
    g_counts.vector_cycles += cycles_of(addresses, step);
}

}  // namespace host
}  // namespace cuda
}  // namespace speft

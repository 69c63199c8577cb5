// What the kernels ask of the hardware through device.h, counted: the tests hold it against what
// the kernels' files say they ask.
#pragma once

#include <cstddef>
#include <cstdint>

namespace speft {
namespace cuda {
namespace host {

struct Counts {
    uint64_t copied_bytes = 0;   // cp_async16's, from global memory
    uint64_t copies = 0;         // cp_async16 of a warp: 512 bytes each into shared memory
    uint64_t copy_cycles = 0;    // four each where no two of eight addresses lie in the same banks
    uint64_t products = 0;       // mma_m16n8k16 of a warp, 4096 operations each
    uint64_t matrix_reads = 0;   // ldmatrix_x4 of a warp, 512 bytes each
    uint64_t matrix_cycles = 0;  // four each where no two rows of a matrix lie in the same banks
    uint64_t vector_reads = 0;   // load_shared16 of a warp, 512 bytes each
    uint64_t vector_cycles = 0;  // four each where no two of eight addresses lie in the same banks
};

// Since the last call.
Counts take_counts();

void count_copied(bool valid);
void count_product();
// `addresses`: each lane's, `step` bytes apart; 0 of a lane that takes no part.
void count_copy(const unsigned char* addresses, size_t step);
void count_matrix_read(const unsigned char* addresses, size_t step);
void count_vector_read(const unsigned char* addresses, size_t step);

}  // namespace host
}  // namespace cuda
}  // namespace speft

// sparse_delta_matmul: x @ (W + D)^T + b and its twin x @ (W + D), where W + D exists in no device
// memory; for 16-bit x over a W of 16, 8 or 4 bits, on the tensor cores.
//
// Many tokens, `multiply_many`: a product of tiles of 256 or 128 tokens, 128 outputs and 32 of what
// is summed over, which come to shared memory through four or six asynchronous stages. Before the
// tensor cores read a tile of W, it gets its entries of D there, rounded to W's dtype as a weight
// that holds D would be; a quantized W is first widened into a second tile. D comes sorted by tiles
// of 32 x 32, which serve both products. The entries of a tile are added between the two halves of
// the products of the one before, one barrier a tile, and were loaded a tile earlier.
//
// Few tokens, `multiply_few`, where rows are whole and aligned for 16 bytes (else as many): bound
// by reading W once. A warp takes 32 of what is summed over and 32 outputs (64 in the twin)
// straight into registers: the order of what is summed over is free, so that 16 neighbouring bytes
// of a lane are fragments of a product. Nothing waits for a barrier until the warps' sums are
// added, in order. Entries are added to the sums in float32, and D's bits that W's dtype lacks
// count.
//
// Count (M tokens, N x K, E entries, q bytes of W an element). Many: 2 M N K operations on the
// tensor cores; from the L2 cache 2 M K bytes for each 128 outputs, and q N K + 6 E for each tile
// of tokens, of which the entries are 1.5 % at 0.5 % and q = 2. The twin over 4 bits reads its
// words once for each of the four columns that they hold: q = 2 there, too. An entry reads and
// writes 2 bytes of shared memory. Of a turn of a tile, q = 2, in cycles of an H200's
// multiprocessor:
//
//   tokens         256   128
//   tensor cores   825   412   512 and 256 products at the rate of mma.sync: 0.62 of wgmma's, a
//                              figure of others
//   L2 cache       813   542   24.6 and 16.4 KB at the 30 bytes that each of 132 has of 7 TB/s
//   shared memory  704   512   192 and 128 on the way in, 512 and 384 on the way out
//   instructions   560   488   280 and 244 of each warp, of which two share a scheduler
//
// So tensor cores and L2 are as one in a tall tile; short ones would bring 4.3 GB for 8192 tokens
// of 4096 x 4096, not 3.2, and wait 1.3 times as long for L2 as for the tensor cores. These take
// 0.47 ms there, and 0.48 as whole waves of 132 tall tiles. A tall tile leaves room for no second
// block that would fill a wait. So after a tile's barrier come the products whose operands were
// loaded before it: barrier and ldmatrix take some 100 cycles by themselves.
//
// Short tiles are for products that would leave multiprocessors without any. A wave of them takes
// two thirds of one of tall tiles, so they are taken where their waves are fewer than three halves
// of the others': up to 512 tokens of 4096 outputs, and 2048 of 1024, where one wave is enough; and
// where an odd number of 128 tokens fills the last tall tiles by half, as 384 tokens of 11008
// outputs do, two waves of either. Both sum in the same order, and the result is the same in every
// bit.
//
// Of a short tile eight warps have 64 x 32 each. Four of 64 x 64 would ask shared memory for 384
// cycles, but each would have a scheduler to itself, where nothing fills the 188 instructions
// between the two halves of its products: 412 and 188 make 600. Up to 64 tokens half of the eight
// multiply, one a scheduler: 206 cycles of the tensor cores, and 420 of instructions, because all
// eight bring and add. Tiles of 64 tokens would have about as many, and are left out.
//
// Few: q N K + 10 E bytes, and 2 M K from the L2 cache for each 32 outputs. For each 2 KB of W a
// warp issues 170 instructions, and 92 for up to eight entries, four at a time of each of its
// halves; 0.5 % are five. That makes 260 where an H200 has time for 440, and for 220 from 17 tokens
// on, when two blocks read W. What waits matters as much: W, its scales, the runs and the entries
// are asked for a turn or two ahead, and nothing is made of them before their turn, for that would
// wait for them. The values are read where they are, 32 bytes from L2 for each, because a launch
// that sorts them would take some 3 us of the 8 in which an H200 reads 4096 x 4096 of W.
//
// Over int8 and int4 it is bound by instructions: 370 for 1 KB of W and 1,170 for 2 KB, where there
// is time for 220 and 440; that is 0.85 and 0.66 of the time of as many numbers of 16 bits. What
// belongs to a tile of D takes 140 of them, however few bits W has: 560 of int4's. Numbers are made
// two at a time in arithmetic of T (`whole_pair`): 80 of int8's instructions (64 of float16) and
// 240 of int4's, half of these for shifts and masks; the rest are products, scales and addresses.
// Scales of float32 make it 430 and 1,410, for with them numbers are multiplied singly. Of many
// tokens a turn of a tall tile has 790 and 820 cycles of instructions, 860 and 900 with scales of
// float32, beside the 825 of the tensor cores.
//
// tests/test_cuda_counts.py holds the counts of copies, shared memory and products.
#include "bring.h"
#include "kernels.h"
#include "multiply_few.h"
#include "multiply_many.h"

namespace speft {
namespace cuda {
namespace {

template <class T, Base kBase, bool kTwin, int kTokens>
int multiply_in_tiles(const DeltaProduct& product, int64_t across, bool x_vectors,
                      bool weight_vectors, void* stream) {
    const int64_t tiles = across * parts_of(product.tokens, kTokens);
    if (tiles > INT32_MAX) return kUnsupported;
    const int64_t y_width = kTwin ? product.cols : product.rows;
    const bool y_vectors = in_vectors<uint16_t>(
        product.y, y_width, kTwin ? product.cols / Stored<kBase>::kParts : y_width);
    return launch(multiply_many<T, kBase, kTwin, kTokens>, dim3(unsigned(tiles)), kThreads,
                  Tiles<kBase, kTwin, kTokens>::kBytes, stream, product, x_vectors, weight_vectors,
                  y_vectors);
}

template <class T, Base kBase, bool kTwin>
int multiply(const DeltaProduct& product, void* stream) {
    using Element = typename Stored<kBase>::Element;
    const int64_t width = product.cols / Stored<kBase>::kParts;
    const bool x_vectors =
        in_vectors<uint16_t>(product.x, product.x_stride, kTwin ? product.rows : width);
    const bool weight_vectors = in_vectors<Element>(product.weight, product.weight_stride, width);
    const bool few =
        product.tokens <= kFewTokens && (kBase == Base::kNone || (x_vectors && weight_vectors));
    const int64_t outputs = few ? kFewOutputs<kTwin> : kOutputs;
    const int64_t across =
        kTwin ? Stored<kBase>::kParts * parts_of(width, outputs) : parts_of(product.rows, outputs);
    const int64_t turns = kTwin ? parts_of(product.rows, kSide) : parts_of(product.cols, kSide);
    if (across > INT32_MAX || turns > INT32_MAX / 4) return kUnsupported;
    if (few) {
        const dim3 grid(unsigned(across), unsigned(parts_of(product.tokens, kRound)));
        return launch(multiply_few<T, kBase, kTwin>, grid, kWarps * kWarp,
                      kWarps * kWarpSums * sizeof(float), stream, product);
    }
    const auto waves = [&](int64_t height) {
        return parts_of(across * parts_of(product.tokens, height), product.multiprocessors);
    };
    const bool shorter = product.tile_tokens == 0 ? 2 * waves(kShort) < 3 * waves(kTall)
                                                  : product.tile_tokens == kShort;
    return shorter ? multiply_in_tiles<T, kBase, kTwin, kShort>(product, across, x_vectors,
                                                                weight_vectors, stream)
                   : multiply_in_tiles<T, kBase, kTwin, kTall>(product, across, x_vectors,
                                                               weight_vectors, stream);
}

template <class T, Base kBase>
int multiply_either(const DeltaProduct& product, bool twin, void* stream) {
    return twin ? multiply<T, kBase, true>(product, stream)
                : multiply<T, kBase, false>(product, stream);
}

template <class T>
int multiply_any(const DeltaProduct& product, Base base, bool twin, void* stream) {
    switch (base) {
        case Base::kNone:
            return multiply_either<T, Base::kNone>(product, twin, stream);
        case Base::kPlain:
            return multiply_either<T, Base::kPlain>(product, twin, stream);
        case Base::kInt8:
            return multiply_either<T, Base::kInt8>(product, twin, stream);
        case Base::kInt4:
            return multiply_either<T, Base::kInt4>(product, twin, stream);
    }
    return kUnsupported;
}

}  // namespace

int sparse_delta_matmul(const DeltaProduct& product, Base base, bool twin, DType dtype,
                        void* stream) {
    if (product.tokens == 0) return 0;
    if (dtype == DType::kBFloat16) return multiply_any<BFloat16>(product, base, twin, stream);
    if (dtype == DType::kFloat16) return multiply_any<Float16>(product, base, twin, stream);
    return kUnsupported;
}

}  // namespace cuda
}  // namespace speft

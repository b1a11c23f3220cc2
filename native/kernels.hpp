// What a set of kernels offers, and the memory it works on. This header is the contract: `portable.cpp` is
// the readable version of every function, the other files hold the same for one instruction set each.
//
// All memory belongs to the caller. Nothing is aligned beyond its element. No function throws or keeps state.
// A file compiled for an instruction set must define nothing that the linker could share with other files
// (inline functions and templates outside an unnamed namespace): the copy it keeps might not run on the
// processor at hand.
//
// Lanes. Products are computed on 32-bit lanes: a float, or a pair of bf16 numbers that stand next to each
// other along the summed dimension (the first in the low half). A panel is a (depth, kPanel) matrix of lanes.
#pragma once

#include <bit>
#include <cstdint>

namespace halfbyte {

enum class Type : int { f32 = 0, bf16 = 1, f16 = 2 };

namespace {

// Bytes of a number.
[[maybe_unused]] constexpr std::int64_t size_of(Type type) { return type == Type::f32 ? 4 : 2; }

}  // namespace

constexpr int kPanel = 64;         // columns of a panel: 4 vectors of 16 lanes at AVX-512
constexpr int kNestedBlock = 256;  // scales per nested scale
constexpr int kFewRows = 8;        // most rows of activations that `multiply_rows` takes at once

// A quantised (rows, cols) matrix. Element e = row * cols + col: its code is the high nibble of codes[e / 2]
// for even e, the low one for odd e; its value is codebook[code] * scale[e / blocksize]. `scales` holds uint8
// when nested_scales is set, and then scale[g] = nested_codebook[scales[g]] * nested_scales[g / 256] + offset
// with every operation rounded to float; otherwise it holds float.
struct Weight {
    const std::uint8_t* codes;
    const void* scales;
    const float* codebook;         // 16
    const float* nested_scales;    // or null
    const float* nested_codebook;  // 256, or null
    float offset;
    std::int64_t blocksize;  // a power of two, at least 64
    std::int64_t rows, cols;
    int shift = std::countr_zero(static_cast<std::uint64_t>(blocksize));  // element >> shift is its block
};

// A codebook for encoding: entry r in ascending order of value is values[r] with code order[r]; a number
// belongs to the entry whose r is the count of thresholds below it. Unused thresholds are +infinity.
struct Codebook {
    float thresholds[16];  // 15 used
    float values[16];
    std::uint8_t order[16];
};

// Trial scales: `trials` fractions of the largest magnitude from `first` to `last`, then `refinements` moves
// to the least-squares scale of the codes.
struct Search {
    float first, last;
    int trials, refinements;
};

struct ElementwiseKernels;  // elementwise.hpp
struct AdamStep;            // adamw.hpp

// What a model does to its logits before they count: x -> cap · tanh(scale · x / cap); cap 0: x -> scale · x.
struct Bend {
    float scale, cap;
};

// What the loss of a row of bent logits is made of.
struct RowSums {
    float largest, target;  // logits
    double exponentials;    // sum of exp(logit - largest)
    double logits;          // sum, where asked for
};

// The gradient of a row's loss for its bent logits: probability · exp(logit - largest) - everywhere, and at
// the target less `target`. A factor common to the three is folded into them: rounded before, p - 1 would be
// lost.
struct Slopes {
    float probability, everywhere, target;
};

// Attention's work between its products, on tiles of scores: row i of a tile is a key, column j a query, at
// i * kPanel + j. `columns` is a multiple of 16; what stands to the right of it is neither read nor written.
// A score of -infinity is a key that the query does not see: its weight is exactly 0. NaN is kept.
struct SoftmaxKernels {
    // most[j] = the larger of most[j] and every scale * scores[i][j].
    void (*column_max)(const float* scores, std::int64_t rows, std::int64_t columns, float scale,
                       float* most);

    // scores[i][j] = 2^(scale * scores[i][j] - shift[j]), added to sums[j]; the exponent must be below 127.
    void (*exponentials)(float* scores, std::int64_t rows, std::int64_t columns, float scale,
                         const float* shift, float* sums);

    // The same, written instead as a panel of bf16 pairs: rows 2p and 2p + 1 at panel[p * kPanel + j]. A last
    // row without partner is paired with 0.
    void (*exponential_pairs)(const float* scores, std::int64_t rows, std::int64_t columns, float scale,
                              const float* shift, float* sums, std::uint32_t* panel);

    // weight = 2^(scale * scores[i][j] - shift[j]), grad = weight * (grads[i][j] - delta[j]): scores become
    // the weights, grads the gradients of the scores.
    void (*score_gradients)(float* scores, float* grads, std::int64_t rows, std::int64_t columns, float scale,
                            const float* shift, const float* delta);

    // The same, rounded to bf16: weights and score gradients row by row (kPanel numbers apart), and the
    // gradients once more as a panel of pairs of rows as above. Scores and grads are left as they are.
    void (*score_gradient_pairs)(const float* scores, const float* grads, std::int64_t rows,
                                 std::int64_t columns, float scale, const float* shift, const float* delta,
                                 std::uint16_t* weights, std::uint16_t* score_grads, std::uint32_t* panel);

    // sums[i][j] *= factors[j].
    void (*scale_columns)(float* sums, std::int64_t rows, std::int64_t columns, const float* factors);
};

struct Kernels {
    const char* name;

    // scales[b] = largest magnitude of block b of `count` consecutive numbers, for blocks first … last-1; not
    // finite where the block holds something not finite.
    void (*block_scales)(const void* numbers, Type type, std::int64_t count, std::int64_t blocksize,
                         std::int64_t first, std::int64_t last, float* scales);

    // scales[b] = the scale of least squared error found for block b.
    void (*search_scales)(const void* numbers, Type type, std::int64_t count, std::int64_t blocksize,
                          const Codebook& codebook, const Search& search, std::int64_t first,
                          std::int64_t last, float* scales);

    // The codes of blocks first … last-1, two to a byte.
    void (*encode)(const void* numbers, Type type, std::int64_t count, std::int64_t blocksize,
                   const Codebook& codebook, const float* scales, std::int64_t first, std::int64_t last,
                   std::uint8_t* codes);

    // `count` values from element `begin` on, rounded to `type` and written in that type.
    void (*decode)(const Weight& weight, std::int64_t begin, std::int64_t count, Type type, void* out);

    // The same values, rounded to `type`, written as floats.
    void (*decode_wide)(const Weight& weight, std::int64_t begin, std::int64_t count, Type type, float* out);

    // The values of `count` columns from `col` on in rows `row` and `row + 1` as pairs of bf16: lanes[j] is
    // column col + j, row `row` in the low half. Zeros stand for a row below the last.
    void (*decode_pairs)(const Weight& weight, std::int64_t row, std::int64_t col, std::int64_t count,
                         std::uint32_t* lanes);

    // lanes[j] = low[j] | high[j] << 16 for j < count; a null `high` stands for zeros.
    void (*interleave)(const std::uint16_t* low, const std::uint16_t* high, std::int64_t count,
                       std::uint32_t* lanes);

    // panel[d * kPanel + j] = rows[j * stride + d] for d < depth, j < columns; the columns above get zeros.
    void (*transpose)(const std::uint32_t* rows, std::int64_t stride, std::int64_t columns,
                      std::int64_t depth, std::uint32_t* panel);

    // sums[i * kPanel + j] (+)= sum over d < depth of a[i * stride + d] · panel[d * kPanel + j], for i < rows
    // and j < columns rounded up to a whole vector. Lanes are floats.
    void (*multiply)(const std::uint32_t* a, std::int64_t stride, std::int64_t rows,
                     const std::uint32_t* panel, std::int64_t columns, std::int64_t depth, bool add,
                     float* sums);

    // The same with lanes of bf16 pairs, or null where the instruction set has no such product.
    void (*multiply_pairs)(const std::uint32_t* a, std::int64_t stride, std::int64_t rows,
                           const std::uint32_t* panel, std::int64_t columns, std::int64_t depth, bool add,
                           float* sums);

    // sums[i] += sum over k < count of a[i * stride + k] * w[k], i < rows <= kFewRows. Numbers are floats.
    void (*dot)(const float* w, const float* a, std::int64_t stride, int rows, std::int64_t count,
                float* sums);

    // The same with bf16 numbers, or null where the instruction set has no such product.
    void (*dot_bf16)(const std::uint16_t* w, const std::uint16_t* a, std::int64_t stride, int rows,
                     std::int64_t count, float* sums);

    // `rows` rows of `cols` activations in the form that `multiply_rows` reads: rows * cols floats or less.
    void (*prepare_rows)(const void* numbers, Type type, int rows, std::int64_t cols, void* prepared);

    // sums[(n - first) * rows + i] = row n of the weight times row i of the prepared activations, n from
    // `first` to last - 1, i < rows <= kFewRows. The weight's values are rounded to `type` first.
    void (*multiply_rows)(const Weight& weight, Type type, std::int64_t first, std::int64_t last,
                          const void* prepared, int rows, float* sums);

    // sums[i] += numbers[i].
    void (*add)(const void* numbers, Type type, std::int64_t count, float* sums);

    // Products on registers alone, the most arithmetic there is: `rounds` rounds of them, of bf16 pairs where
    // `pairs` is set (never for a set without them). Returns how many operations that was, a product and a
    // sum being two.
    std::int64_t (*arithmetic)(std::int64_t rounds, bool pairs, float* out);

    // Adds `bias` (or null) to a row of `count` logits, bends them in place and sums them up.
    RowSums (*loss_sums)(float* row, std::int64_t count, const float* bias, std::int64_t target,
                         const Bend& bend, bool sum_logits);

    // The gradient of the row's loss for its logits before bending, from those after it: computed in float
    // and rounded once to `type`. `out` may be the row itself. It lacks the factor `bend.scale`.
    void (*loss_gradient)(const float* row, std::int64_t count, std::int64_t target, const Bend& bend,
                          const RowSums& sums, const Slopes& slopes, Type type, void* out);

    // Plain conversions of `count` numbers; to_type rounds to nearest even.
    void (*to_float)(const void* numbers, Type type, std::int64_t count, float* out);
    void (*from_float)(const float* numbers, Type type, std::int64_t count, void* out);

    // The element-wise and row-wise operations.
    const ElementwiseKernels* elementwise;
    SoftmaxKernels softmax;

    // Blocks first … last-1 of a step of AdamW.
    void (*adamw_8bit)(const AdamStep& step, std::int64_t first, std::int64_t last);
};

// One set per instruction set; null where the compiler or the processor family does not have it.
const Kernels* portable_kernels();
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();
const Kernels* avx512_bf16_kernels();
const Kernels* neon_kernels();

}  // namespace halfbyte

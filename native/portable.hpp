// The plain versions that an instruction set's file falls back to for tails and odd alignments. Everything is
// in an unnamed namespace, so that each file compiles its own copy with its own flags and the linker never
// merges them.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels.hpp"

#if defined(_MSC_VER)
#define HALFBYTE_INLINE __forceinline
#define HALFBYTE_OPAQUE(pointer)
#else
#define HALFBYTE_INLINE __attribute__((always_inline)) inline
#define HALFBYTE_OPAQUE(pointer) asm("" : "+r"(pointer))  // what it points to is unknown from here on
#endif

namespace halfbyte {
namespace {
namespace plain {

// std::bit_cast would be shared between files, see kernels.hpp.
template <class To, class From>
inline To bits_as(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

[[maybe_unused]] inline float scale_of(const Weight& weight, std::int64_t element) {
    const std::int64_t g = element >> weight.shift;
    if (weight.nested_scales == nullptr) return static_cast<const float*>(weight.scales)[g];
    const std::uint8_t code = static_cast<const std::uint8_t*>(weight.scales)[g];
    const float product = weight.nested_codebook[code] * weight.nested_scales[g / kNestedBlock];
    return product + weight.offset;
}

// Conversions choose between results instead of branching, so that loops over them become vectors.
[[maybe_unused]] inline std::uint16_t bf16_from_float(float number) {
    const std::uint32_t bits = bits_as<std::uint32_t>(number);
    const std::uint32_t quiet = (bits >> 16) | 0x40u;
    const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return static_cast<std::uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded);
}

[[maybe_unused]] inline float float_from_bf16(std::uint16_t bits) {
    return bits_as<float>(static_cast<std::uint32_t>(bits) << 16);
}

[[maybe_unused]] inline float float_from_f16(std::uint16_t bits) {
    const std::uint32_t sign = static_cast<std::uint32_t>(bits & 0x8000u) << 16;
    const std::uint32_t magnitude = bits & 0x7fffu;
    const std::uint32_t subnormal =
        bits_as<std::uint32_t>(static_cast<float>(static_cast<int>(magnitude)) * 0x1p-24f);
    const std::uint32_t normal = (magnitude << 13) + (magnitude >= 0x7c00u ? 0x70000000u : 0x38000000u);
    return bits_as<float>(sign | (magnitude >= 0x0400u ? normal : subnormal));
}

[[maybe_unused]] inline std::uint16_t f16_from_float(float number) {
    const std::uint32_t bits = bits_as<std::uint32_t>(number);
    const std::uint32_t magnitude = bits & 0x7fffffffu;
    // Adding 0.5 leaves the result, in units of 2^-24 rounded to nearest even, in the low bits of the sum.
    const std::uint32_t subnormal = bits_as<std::uint32_t>(bits_as<float>(magnitude) + 0.5f) - 0x3f000000u;
    const std::uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    std::uint32_t result = magnitude >= 0x38800000u ? normal : subnormal;
    result = magnitude >= 0x477ff000u ? 0x7c00u : result;  // rounds to infinity
    result = magnitude > 0x7f800000u ? 0x7e00u : result;
    return static_cast<std::uint16_t>(((bits >> 16) & 0x8000u) | result);
}

[[maybe_unused]] inline float load(const void* numbers, Type type, std::int64_t i) {
    switch (type) {
        case Type::f32:
            return static_cast<const float*>(numbers)[i];
        case Type::bf16:
            return float_from_bf16(static_cast<const std::uint16_t*>(numbers)[i]);
        case Type::f16:
            return float_from_f16(static_cast<const std::uint16_t*>(numbers)[i]);
    }
    return 0.0f;
}

[[maybe_unused]] inline float rounded(float number, Type type) {
    switch (type) {
        case Type::f32:
            return number;
        case Type::bf16:
            return float_from_bf16(bf16_from_float(number));
        case Type::f16:
            return float_from_f16(f16_from_float(number));
    }
    return 0.0f;
}

[[maybe_unused]] inline void store(void* out, Type type, std::int64_t i, float number) {
    switch (type) {
        case Type::f32:
            static_cast<float*>(out)[i] = number;
            return;
        case Type::bf16:
            static_cast<std::uint16_t*>(out)[i] = bf16_from_float(number);
            return;
        case Type::f16:
            static_cast<std::uint16_t*>(out)[i] = f16_from_float(number);
            return;
    }
}

[[maybe_unused]] inline void to_float(const void* numbers, Type type, std::int64_t count, float* out) {
    const auto* words = static_cast<const std::uint16_t*>(numbers);
    if (type == Type::f32)
        std::memcpy(out, numbers, static_cast<std::size_t>(count) * sizeof(float));
    else if (type == Type::bf16)
        for (std::int64_t i = 0; i < count; ++i) out[i] = float_from_bf16(words[i]);
    else
        for (std::int64_t i = 0; i < count; ++i) out[i] = float_from_f16(words[i]);
}

[[maybe_unused]] inline void from_float(const float* numbers, Type type, std::int64_t count, void* out) {
    auto* words = static_cast<std::uint16_t*>(out);
    if (type == Type::f32)
        std::memcpy(out, numbers, static_cast<std::size_t>(count) * sizeof(float));
    else if (type == Type::bf16)
        for (std::int64_t i = 0; i < count; ++i) words[i] = bf16_from_float(numbers[i]);
    else
        for (std::int64_t i = 0; i < count; ++i) words[i] = f16_from_float(numbers[i]);
}

// A scale below the smallest normal number has no finite inverse: its block becomes zeros.
[[maybe_unused]] inline float inverse(float scale) { return scale >= 0x1p-126f ? 1.0f / scale : 0.0f; }

[[maybe_unused]] inline int rank(const Codebook& codebook, float normalised) {
    int r = normalised > codebook.thresholds[7] ? 8 : 0;
    r += normalised > codebook.thresholds[r + 3] ? 4 : 0;
    r += normalised > codebook.thresholds[r + 1] ? 2 : 0;
    r += normalised > codebook.thresholds[r] ? 1 : 0;
    return r;
}

struct Block {
    std::int64_t begin, end;
};

[[maybe_unused]] inline Block block_of(std::int64_t b, std::int64_t count, std::int64_t blocksize) {
    const std::int64_t begin = b * blocksize;
    return {begin, begin + blocksize < count ? begin + blocksize : count};
}

[[maybe_unused]] inline void block_scales(const void* numbers, Type type, std::int64_t count,
                                          std::int64_t blocksize, std::int64_t first, std::int64_t last,
                                          float* scales) {
    for (std::int64_t b = first; b < last; ++b) {
        const Block block = block_of(b, count, blocksize);
        std::uint32_t largest = 0;  // as bits without sign, NaN and infinity are larger than every number
        for (std::int64_t i = block.begin; i < block.end; ++i) {
            const std::uint32_t bits = bits_as<std::uint32_t>(load(numbers, type, i)) & 0x7fffffffu;
            largest = bits > largest ? bits : largest;
        }
        scales[b] = bits_as<float>(largest);
    }
}

// The squared error of a block at a scale, and the least-squares scale of the codes it gets there.
struct Fit {
    float error, scale;
};

[[maybe_unused]] inline Fit fit_at(const void* numbers, Type type, Block block, const Codebook& codebook,
                                   float scale) {
    const float inv = inverse(scale);
    float error = 0, along = 0, norm = 0;
    for (std::int64_t i = block.begin; i < block.end; ++i) {
        const float number = load(numbers, type, i);
        const float value = codebook.values[rank(codebook, number * inv)];
        const float off = number - value * scale;
        error += off * off;
        along += number * value;
        norm += value * value;
    }
    return {error, norm > 0 ? along / norm : scale};
}

// Searches with `fit`, any function from a scale to a Fit, so that every instruction set walks the same way.
template <class FitAt>
inline float search_block(float largest, const Search& search, FitAt&& fit_at_scale) {
    if (!(largest <= 3.4028234664e38f)) return largest;  // NaN or infinity
    float best = largest;
    Fit least = fit_at_scale(best);
    for (int trial = 0; trial < search.trials; ++trial) {
        const float part = static_cast<float>(trial) / static_cast<float>(search.trials - 1);
        const float scale = largest * (search.first + (search.last - search.first) * part);
        const Fit fit = fit_at_scale(scale);
        if (fit.error < least.error) best = scale, least = fit;
    }
    for (int step = 0; step < search.refinements; ++step) {
        const float scale = least.scale;
        const Fit fit = fit_at_scale(scale);
        if (!(fit.error < least.error)) break;
        best = scale, least = fit;
    }
    return best;
}

[[maybe_unused]] inline void search_scales(const void* numbers, Type type, std::int64_t count,
                                           std::int64_t blocksize, const Codebook& codebook,
                                           const Search& search, std::int64_t first, std::int64_t last,
                                           float* scales) {
    block_scales(numbers, type, count, blocksize, first, last, scales);
    for (std::int64_t b = first; b < last; ++b) {
        const Block block = block_of(b, count, blocksize);
        scales[b] = search_block(scales[b], search,
                                 [&](float scale) { return fit_at(numbers, type, block, codebook, scale); });
    }
}

[[maybe_unused]] inline void encode(const void* numbers, Type type, std::int64_t count,
                                    std::int64_t blocksize, const Codebook& codebook, const float* scales,
                                    std::int64_t first, std::int64_t last, std::uint8_t* codes) {
    for (std::int64_t b = first; b < last; ++b) {
        const Block block = block_of(b, count, blocksize);
        const float inv = inverse(scales[b]);
        for (std::int64_t i = block.begin; i < block.end; i += 2) {
            const float second = i + 1 < block.end ? load(numbers, type, i + 1) : 0.0f;
            const int high = codebook.order[rank(codebook, load(numbers, type, i) * inv)];
            const int low = codebook.order[rank(codebook, second * inv)];
            codes[i / 2] = static_cast<std::uint8_t>(high << 4 | low);
        }
    }
}

[[maybe_unused]] inline float value_at(const Weight& weight, std::int64_t e, float scale) {
    const int pair = weight.codes[e / 2];
    return weight.codebook[e % 2 == 0 ? pair >> 4 : pair & 15] * scale;
}

// Calls `piece(begin, end, scale)` for the part of each block in elements begin … begin+count-1.
template <class Piece>
inline void for_each_block(const Weight& weight, std::int64_t begin, std::int64_t count, Piece&& piece) {
    for (std::int64_t e = begin; e < begin + count;) {
        const std::int64_t block_end = ((e >> weight.shift) + 1) << weight.shift;
        const std::int64_t end = block_end < begin + count ? block_end : begin + count;
        piece(e, end, scale_of(weight, e));
        e = end;
    }
}

[[maybe_unused]] inline void decode(const Weight& weight, std::int64_t begin, std::int64_t count, Type type,
                                    void* out) {
    for_each_block(weight, begin, count, [&](std::int64_t e, std::int64_t end, float scale) {
        for (; e < end; ++e) store(out, type, e - begin, value_at(weight, e, scale));
    });
}

[[maybe_unused]] inline void decode_wide(const Weight& weight, std::int64_t begin, std::int64_t count,
                                         Type type, float* out) {
    for_each_block(weight, begin, count, [&](std::int64_t e, std::int64_t end, float scale) {
        for (; e < end; ++e) out[e - begin] = rounded(value_at(weight, e, scale), type);
    });
}

[[maybe_unused]] inline void decode_pairs(const Weight& weight, std::int64_t row, std::int64_t col,
                                          std::int64_t count, std::uint32_t* lanes) {
    const std::int64_t begin = row * weight.cols + col;
    for_each_block(weight, begin, count, [&](std::int64_t e, std::int64_t end, float scale) {
        for (; e < end; ++e) lanes[e - begin] = bf16_from_float(value_at(weight, e, scale));
    });
    if (row + 1 == weight.rows) return;
    const std::int64_t next = begin + weight.cols;
    for_each_block(weight, next, count, [&](std::int64_t e, std::int64_t end, float scale) {
        for (; e < end; ++e)
            lanes[e - next] |= static_cast<std::uint32_t>(bf16_from_float(value_at(weight, e, scale))) << 16;
    });
}

[[maybe_unused]] inline void interleave(const std::uint16_t* low, const std::uint16_t* high,
                                        std::int64_t count, std::uint32_t* lanes) {
    for (std::int64_t j = 0; j < count; ++j)
        lanes[j] = low[j] | (high == nullptr ? 0u : static_cast<std::uint32_t>(high[j]) << 16);
}

[[maybe_unused]] inline void add(const void* numbers, Type type, std::int64_t count, float* sums) {
    for (std::int64_t i = 0; i < count; ++i) sums[i] += load(numbers, type, i);
}

// `multiply_rows` by way of floats, for the conversions and products of an instruction set.
using Wide = void (*)(const Weight&, std::int64_t begin, std::int64_t count, Type, float* out);
using Dot = void (*)(const float* w, const float* a, std::int64_t stride, int rows, std::int64_t count,
                     float* sums);

[[maybe_unused]] inline void multiply_rows(Wide wide, Dot dot, const Weight& weight, Type type,
                                           std::int64_t first, std::int64_t last, const float* a, int rows,
                                           float* sums) {
    constexpr std::int64_t kChunk = 1024;
    float weights[kChunk];
    for (std::int64_t n = first; n < last; ++n) {
        float* sum = sums + (n - first) * rows;
        for (int i = 0; i < rows; ++i) sum[i] = 0;
        for (std::int64_t k = 0; k < weight.cols; k += kChunk) {
            const std::int64_t count = weight.cols - k < kChunk ? weight.cols - k : kChunk;
            wide(weight, n * weight.cols + k, count, type, weights);
            dot(weights, a + k, weight.cols, rows, count, sum);
        }
    }
}

}  // namespace plain
}  // namespace
}  // namespace halfbyte

// How numbers become the lanes of a product, for both of its directions. It owns the forms of the operands;
// it must not know which side is broadcast.
#pragma once

#include <algorithm>

#include "aligned.hpp"
#include "product.hpp"

namespace halfbyte {
namespace {

constexpr std::int64_t kDepth = 128;  // lanes at a time: a panel of 32 KiB, which stays in the L1 cache

inline std::int64_t groups_of(std::int64_t count, std::int64_t size) { return (count + size - 1) / size; }

inline const void* element(const void* numbers, Type type, std::int64_t index) {
    return static_cast<const char*>(numbers) + index * size_of(type);
}

inline void* element(void* numbers, Type type, std::int64_t index) {
    return static_cast<char*>(numbers) + index * size_of(type);
}

// How numbers of a type become lanes with a set of kernels.
struct Lanes {
    const Kernels& kernels;
    Type type;
    bool pairs;
    decltype(Kernels::multiply) multiply;

    Lanes(const Kernels& k, Type t)
        : kernels(k), type(t), pairs(t == Type::bf16 && k.multiply_pairs != nullptr) {
        multiply = pairs ? k.multiply_pairs : k.multiply;
    }

    std::int64_t depth(std::int64_t inner) const { return pairs ? groups_of(inner, 2) : inner; }

    // Whether rows of `inner` numbers, `stride` apart, are lanes where they lie.
    bool in_place(const void* numbers, std::int64_t inner, std::int64_t stride) const {
        if (type == Type::f32) return true;
        return pairs && inner % 2 == 0 && stride % 2 == 0 &&
               reinterpret_cast<std::uintptr_t>(numbers) % 4 == 0;
    }

    // Distance between such rows, in lanes.
    std::int64_t stride(std::int64_t stride) const { return pairs ? stride / 2 : stride; }

    // Lanes d0 … d0+depth-1 of a row of `inner` numbers; the missing half of a last pair is zero.
    void convert(const void* row, std::int64_t inner, std::int64_t d0, std::int64_t depth,
                 std::uint32_t* lanes) const {
        const std::int64_t per_lane = pairs ? 2 : 1, first = d0 * per_lane;
        const std::int64_t count = std::min(depth * per_lane, inner - first);
        if (!pairs)
            return kernels.to_float(element(row, type, first), type, count, reinterpret_cast<float*>(lanes));
        if (count % 2 != 0) lanes[depth - 1] = 0;
        std::copy_n(static_cast<const std::uint16_t*>(row) + first, count,
                    reinterpret_cast<std::uint16_t*>(lanes));
    }

    // The same of row n of a weight in 4 bits.
    void decode(const Weight& weight, std::int64_t n, std::int64_t d0, std::int64_t depth,
                std::uint32_t* lanes) const {
        const std::int64_t per_lane = pairs ? 2 : 1, first = d0 * per_lane;
        const std::int64_t count = std::min(depth * per_lane, weight.cols - first);
        const std::int64_t begin = n * weight.cols + first;
        if (!pairs) return kernels.decode_wide(weight, begin, count, type, reinterpret_cast<float*>(lanes));
        if (count % 2 != 0) lanes[depth - 1] = 0;
        kernels.decode(weight, begin, count, type, lanes);
    }
};

}  // namespace
}  // namespace halfbyte

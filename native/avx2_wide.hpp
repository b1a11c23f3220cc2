// 8 numbers of any type as a vector of floats, and back. Included by the AVX2 file alone; see kernels.hpp for
// why everything is in an unnamed namespace.
#pragma once

#include <immintrin.h>

#include "portable.hpp"
#include "vector_math.hpp"

namespace halfbyte {
namespace {

__m256 load8(const void* numbers, Type type, std::int64_t i) {
    if (type == Type::f32) return _mm256_loadu_ps(static_cast<const float*>(numbers) + i);
    const __m128i words =
        _mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const std::uint16_t*>(numbers) + i));
    if (type == Type::f16) return _mm256_cvtph_ps(words);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(words), 16));
}

// Rounds to nearest even at bit 16, leaving the low half undefined. NaN is not kept.
__m256i round_at_16(__m256 numbers) {
    const __m256i bits = _mm256_castps_si256(numbers);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    return _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
}

__m256 rounded8(__m256 numbers, Type type) {
    if (type == Type::f32) return numbers;
    if (type == Type::f16)
        return _mm256_cvtph_ps(_mm256_cvtps_ph(numbers, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    return _mm256_castsi256_ps(
        _mm256_and_si256(round_at_16(numbers), _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
}

// Two bf16 of 16 bits each from two vectors of floats that are finite.
__m256i bf16_of(__m256 first, __m256 second) {
    const __m256i low = _mm256_srli_epi32(round_at_16(first), 16),
                  high = _mm256_srli_epi32(round_at_16(second), 16);
    return _mm256_permute4x64_epi64(_mm256_packus_epi32(low, high), 0xd8);
}

// The bits of bf16 in the upper halves, NaN kept.
__m256i bf16_bits(__m256 numbers) {
    const __m256 nan = _mm256_cmp_ps(numbers, numbers, _CMP_UNORD_Q);
    const __m256i quiet = _mm256_or_si256(_mm256_castps_si256(numbers), _mm256_set1_epi32(1 << 22));
    return _mm256_blendv_epi8(round_at_16(numbers), quiet, _mm256_castps_si256(nan));
}

float sum_of(__m256 v) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

// 8 lanes, see vector::One.
struct Wide {
    static constexpr int kLanes = 8;
    using Mask = __m256;
    __m256 v;

    Wide() = default;
    Wide(__m256 numbers) : v(numbers) {}
    Wide(float number) : v(_mm256_set1_ps(number)) {}

    template <Type type>
    static Wide load(const void* numbers, std::int64_t i) {
        return load8(numbers, type, i);
    }
    template <Type type>
    void store(void* numbers, std::int64_t i) const {
        if constexpr (type == Type::f32) return _mm256_storeu_ps(static_cast<float*>(numbers) + i, v);
        __m128i words;
        if constexpr (type == Type::f16) {
            words = _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        } else {
            const __m256i bits = _mm256_srli_epi32(bf16_bits(v), 16);
            words = _mm_packus_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
        }
        _mm_storeu_si128(reinterpret_cast<__m128i*>(static_cast<std::uint16_t*>(numbers) + i), words);
    }
    template <Type type>
    Wide rounded() const {
        if constexpr (type != Type::bf16) return rounded8(v, type);
        return _mm256_castsi256_ps(
            _mm256_and_si256(bf16_bits(v), _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
    }

    friend Wide operator+(Wide a, Wide b) { return _mm256_add_ps(a.v, b.v); }
    friend Wide operator-(Wide a, Wide b) { return _mm256_sub_ps(a.v, b.v); }
    friend Wide operator*(Wide a, Wide b) { return _mm256_mul_ps(a.v, b.v); }
    friend Wide operator/(Wide a, Wide b) { return _mm256_div_ps(a.v, b.v); }
    friend Mask operator<(Wide a, Wide b) { return _mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ); }
    friend Wide select(Mask condition, Wide yes, Wide no) { return _mm256_blendv_ps(no.v, yes.v, condition); }
    // The second operand is the result where either is NaN.
    friend Wide at_least(Wide a, float limit) { return _mm256_max_ps(_mm256_set1_ps(limit), a.v); }
    friend Wide at_most(Wide a, float limit) { return _mm256_min_ps(_mm256_set1_ps(limit), a.v); }
    float total() const { return sum_of(v); }
    friend Wide magnitude(Wide a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v); }
    friend Wide larger(Wide a, Wide b) { return _mm256_max_ps(a.v, b.v); }
    friend Wide smaller(Wide a, Wide b) { return _mm256_min_ps(a.v, b.v); }
    friend Wide square_root(Wide a) { return _mm256_sqrt_ps(a.v); }
    static bool any(Mask mask) { return _mm256_movemask_ps(mask) != 0; }
    static Wide lookup(const float* table, const std::uint8_t* codes, std::int64_t i) {
        const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + i));
        return _mm256_i32gather_ps(table, _mm256_cvtepu8_epi32(bytes), 4);
    }
    using Table = __m256;
    static Table table(const float* eight) { return _mm256_loadu_ps(eight); }
    static Wide entries(Table table, Wide which) {
        return _mm256_permutevar8x32_ps(table, _mm256_cvtps_epi32(which.v));
    }
    void store_bytes(std::uint8_t* bytes, std::int64_t i) const {
        const __m256i words = _mm256_cvtps_epi32(v);
        const __m128i halves =
            _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
        _mm_storel_epi64(reinterpret_cast<__m128i*>(bytes + i), _mm_packus_epi16(halves, halves));
    }
    friend Wide scaled(Wide a, Wide shifted, Wide) {
        const __m256i biased =
            _mm256_sub_epi32(_mm256_castps_si256(shifted.v), _mm256_set1_epi32(0x4b400000 - 254));
        const __m256i half = _mm256_srli_epi32(biased, 1);
        const __m256 first = _mm256_castsi256_ps(_mm256_slli_epi32(half, 23));
        const __m256 second = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_sub_epi32(biased, half), 23));
        return _mm256_mul_ps(_mm256_mul_ps(a.v, first), second);
    }
};

}  // namespace
}  // namespace halfbyte

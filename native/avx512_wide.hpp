// 16 numbers of any type as a vector of floats, and back. Included by the AVX-512 files alone; see
// kernels.hpp for why everything is in an unnamed namespace.
#pragma once

#include <immintrin.h>

#include "portable.hpp"
#include "vector_math.hpp"

namespace halfbyte {
namespace {

__m512 load16(const void* numbers, Type type, std::int64_t i) {
    if (type == Type::f32) return _mm512_loadu_ps(static_cast<const float*>(numbers) + i);
    const __m256i words =
        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(static_cast<const std::uint16_t*>(numbers) + i));
    if (type == Type::f16) return _mm512_cvtph_ps(words);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16));
}

// Rounds to nearest even at bit 16, leaving the low half undefined. NaN is not kept: scales are finite.
__m512i round_at_16(__m512 numbers) {
    const __m512i bits = _mm512_castps_si512(numbers);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    return _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
}

__m512 rounded16(__m512 numbers, Type type) {
    if (type == Type::f32) return numbers;
    if (type == Type::f16)
        return _mm512_cvtph_ps(_mm512_cvtps_ph(numbers, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    return _mm512_castsi512_ps(
        _mm512_and_si512(round_at_16(numbers), _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}

// The bits of bf16 in the upper halves, rounded to nearest even, NaN kept.
__m512i bf16_bits(__m512 numbers) {
    const __m512i bits = _mm512_castps_si512(numbers);
    const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
    __m512i rounded = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff));
    rounded = _mm512_mask_add_epi32(rounded, odd, bits, _mm512_set1_epi32(0x8000));
    constexpr int kQuiet = 0x22;  // of both kinds of NaN the quiet one, of all else the rounded
    return _mm512_castps_si512(
        _mm512_fixupimm_ps(_mm512_castsi512_ps(rounded), numbers, _mm512_set1_epi32(kQuiet), 0));
}

__m256i upper_halves(__m512i lanes) {
    const __m512i odd_words = _mm512_setr_epi32(0x00030001, 0x00070005, 0x000b0009, 0x000f000d, 0x00130011,
                                                0x00170015, 0x001b0019, 0x001f001d, 0, 0, 0, 0, 0, 0, 0, 0);
    return _mm512_castsi512_si256(_mm512_permutexvar_epi16(odd_words, lanes));
}

// 16 lanes, see vector::One.
struct Wide {
    static constexpr int kLanes = 16;
    using Mask = __mmask16;
    __m512 v;

    Wide() = default;
    Wide(__m512 numbers) : v(numbers) {}
    Wide(float number) : v(_mm512_set1_ps(number)) {}

    template <Type type>
    static Wide load(const void* numbers, std::int64_t i) {
        return load16(numbers, type, i);
    }
    template <Type type>
    void store(void* numbers, std::int64_t i) const {
        if constexpr (type == Type::f32) return _mm512_storeu_ps(static_cast<float*>(numbers) + i, v);
        __m256i words;
        if constexpr (type == Type::f16)
            words = _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        else
            words = upper_halves(bf16_bits(v));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(static_cast<std::uint16_t*>(numbers) + i), words);
    }
    template <Type type>
    Wide rounded() const {
        if constexpr (type != Type::bf16) return rounded16(v, type);
        return _mm512_castsi512_ps(
            _mm512_and_si512(bf16_bits(v), _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
    }

    friend Wide operator+(Wide a, Wide b) { return _mm512_add_ps(a.v, b.v); }
    friend Wide operator-(Wide a, Wide b) { return _mm512_sub_ps(a.v, b.v); }
    friend Wide operator*(Wide a, Wide b) { return _mm512_mul_ps(a.v, b.v); }
    friend Wide operator/(Wide a, Wide b) { return _mm512_div_ps(a.v, b.v); }
    friend Mask operator<(Wide a, Wide b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ); }
    friend Wide select(Mask condition, Wide yes, Wide no) {
        return _mm512_mask_blend_ps(condition, no.v, yes.v);
    }
    // The second operand is the result where either is NaN.
    friend Wide at_least(Wide a, float limit) { return _mm512_max_ps(_mm512_set1_ps(limit), a.v); }
    friend Wide at_most(Wide a, float limit) { return _mm512_min_ps(_mm512_set1_ps(limit), a.v); }
    friend Wide magnitude(Wide a) { return _mm512_abs_ps(a.v); }
    float total() const { return _mm512_reduce_add_ps(v); }
    friend Wide larger(Wide a, Wide b) { return _mm512_max_ps(a.v, b.v); }
    friend Wide smaller(Wide a, Wide b) { return _mm512_min_ps(a.v, b.v); }
    friend Wide square_root(Wide a) { return _mm512_sqrt_ps(a.v); }
    static bool any(Mask mask) { return mask != 0; }
    // Eight permutations of 32 entries each, of which three bits choose: a gather takes twice as long.
    static Wide lookup(const float* table, const std::uint8_t* codes, std::int64_t i) {
        const __m512i index =
            _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i)));
        const __mmask16 bit5 = _mm512_test_epi32_mask(index, _mm512_set1_epi32(32));
        const __mmask16 bit6 = _mm512_test_epi32_mask(index, _mm512_set1_epi32(64));
        const __mmask16 bit7 = _mm512_test_epi32_mask(index, _mm512_set1_epi32(128));
        const auto entries = [&](int first) {
            return _mm512_permutex2var_ps(_mm512_loadu_ps(table + first), index,
                                          _mm512_loadu_ps(table + first + 16));
        };
        const auto half = [&](int first) {
            return _mm512_mask_blend_ps(bit6, _mm512_mask_blend_ps(bit5, entries(first), entries(first + 32)),
                                        _mm512_mask_blend_ps(bit5, entries(first + 64), entries(first + 96)));
        };
        return _mm512_mask_blend_ps(bit7, half(0), half(128));
    }
    using Table = __m512;
    static Table table(const float* eight) { return _mm512_castps256_ps512(_mm256_loadu_ps(eight)); }
    static Wide entries(Table table, Wide which) {
        return _mm512_permutexvar_ps(_mm512_cvtps_epi32(which.v), table);
    }
    void store_bytes(std::uint8_t* bytes, std::int64_t i) const {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(bytes + i), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v)));
    }
    friend Wide scaled(Wide a, Wide, Wide n) { return _mm512_scalef_ps(a.v, n.v); }
};

void to_float(const void* numbers, Type type, std::int64_t count, float* out) {
    std::int64_t i = 0;
    for (; i + 16 <= count; i += 16) _mm512_storeu_ps(out + i, load16(numbers, type, i));
    for (; i < count; ++i) out[i] = plain::load(numbers, type, i);
}

void from_float(const float* numbers, Type type, std::int64_t count, void* out) {
    std::int64_t i = 0;
    if (type == Type::f32) {
        std::memcpy(out, numbers, static_cast<std::size_t>(count) * sizeof(float));
        return;
    }
    auto* words = static_cast<std::uint16_t*>(out);
    for (; i + 16 <= count; i += 16) {
        const __m512 wide = _mm512_loadu_ps(numbers + i);
        __m256i narrow = _mm512_cvtps_ph(wide, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        if (type == Type::bf16) narrow = upper_halves(bf16_bits(wide));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(words + i), narrow);
    }
    for (; i < count; ++i) plain::store(out, type, i, numbers[i]);
}

}  // namespace
}  // namespace halfbyte

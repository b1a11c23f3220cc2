// `SoftmaxKernels` for 512-bit vectors, 32 columns at a time with their statistics in registers. Each
// function does what its namesake in softmax_rows.hpp does. Rounding<…>::words(low, high) turns 32 floats
// into bf16.
#pragma once

#include <immintrin.h>

#include "softmax_rows.hpp"

namespace halfbyte {
namespace {
namespace softmax512 {

struct Two {
    __m512 low, high;
};

inline Two load(const float* numbers) { return {_mm512_loadu_ps(numbers), _mm512_loadu_ps(numbers + 16)}; }

inline void store(float* numbers, Two two) {
    _mm512_storeu_ps(numbers, two.low);
    _mm512_storeu_ps(numbers + 16, two.high);
}

inline Two operator+(Two a, Two b) { return {_mm512_add_ps(a.low, b.low), _mm512_add_ps(a.high, b.high)}; }
inline Two operator-(Two a, Two b) { return {_mm512_sub_ps(a.low, b.low), _mm512_sub_ps(a.high, b.high)}; }
inline Two operator*(Two a, Two b) { return {_mm512_mul_ps(a.low, b.low), _mm512_mul_ps(a.high, b.high)}; }

// See softmax::exp2.
inline __m512 exp2(__m512 x) {
    const __m512 whole = _mm512_set1_ps(12582912.0f + 127.0f);
    const __m512 sum = _mm512_add_ps(x, whole);
    const __m512 f = _mm512_sub_ps(x, _mm512_sub_ps(sum, whole));
    __m512 power = _mm512_set1_ps(0x1.5bba14p-10f);
    power = _mm512_fmadd_ps(power, f, _mm512_set1_ps(0x1.3cea88p-7f));
    power = _mm512_fmadd_ps(power, f, _mm512_set1_ps(0x1.c6b752p-5f));
    power = _mm512_fmadd_ps(power, f, _mm512_set1_ps(0x1.ebf9bcp-3f));
    power = _mm512_fmadd_ps(power, f, _mm512_set1_ps(0x1.62e42ap-1f));
    power = _mm512_fmadd_ps(power, f, _mm512_set1_ps(1.0f));
    const __m512 scale = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(sum), 23));
    const __mmask16 counts = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
    return _mm512_maskz_mul_ps(counts, power, scale);
}

inline Two weights_of(const float* scores, __m512 scale, Two shift) {
    const Two score = load(scores);
    return {exp2(_mm512_fmsub_ps(score.low, scale, shift.low)),
            exp2(_mm512_fmsub_ps(score.high, scale, shift.high))};
}

inline void column_max(const float* scores, std::int64_t rows, std::int64_t columns, float scale,
                       float* most) {
    const __m512 factor = _mm512_set1_ps(scale);
    for (std::int64_t j = 0; j < columns; j += 32) {
        Two largest = load(most + j);
        for (std::int64_t i = 0; i < rows; ++i) {
            const Two score = load(scores + i * kPanel + j);
            largest.low = _mm512_max_ps(_mm512_mul_ps(score.low, factor), largest.low);
            largest.high = _mm512_max_ps(_mm512_mul_ps(score.high, factor), largest.high);
        }
        store(most + j, largest);
    }
}

inline void exponentials(float* scores, std::int64_t rows, std::int64_t columns, float scale,
                         const float* shift, float* sums) {
    const __m512 factor = _mm512_set1_ps(scale);
    for (std::int64_t j = 0; j < columns; j += 32) {
        const Two shifts = load(shift + j);
        Two sum = load(sums + j);
        for (std::int64_t i = 0; i < rows; ++i) {
            const Two weight = weights_of(scores + i * kPanel + j, factor, shifts);
            store(scores + i * kPanel + j, weight);
            sum = sum + weight;
        }
        store(sums + j, sum);
    }
}

// Words 0, 32, 1, 33, … and 16, 48, 17, 49, … of two vectors.
inline __m512i low_pairs() {
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return _mm512_or_si512(lanes, _mm512_slli_epi32(_mm512_add_epi32(lanes, _mm512_set1_epi32(32)), 16));
}
inline __m512i high_pairs() { return _mm512_add_epi16(low_pairs(), _mm512_set1_epi16(16)); }

template <class Rounding>
void exponential_pairs(const float* scores, std::int64_t rows, std::int64_t columns, float scale,
                       const float* shift, float* sums, std::uint32_t* panel) {
    const __m512 factor = _mm512_set1_ps(scale);
    const __m512i low = low_pairs(), high = high_pairs();
    for (std::int64_t j = 0; j < columns; j += 32) {
        const Two shifts = load(shift + j);
        Two sum = load(sums + j);
        for (std::int64_t i = 0; i < rows; i += 2) {
            const Two first = weights_of(scores + i * kPanel + j, factor, shifts);
            Two second = {_mm512_setzero_ps(), _mm512_setzero_ps()};
            if (i + 1 < rows) second = weights_of(scores + (i + 1) * kPanel + j, factor, shifts);
            sum = sum + (first + second);
            const __m512i a = Rounding::words(first.low, first.high);
            const __m512i b = Rounding::words(second.low, second.high);
            std::uint32_t* lanes = panel + i / 2 * kPanel + j;
            _mm512_storeu_si512(lanes, _mm512_permutex2var_epi16(a, low, b));
            _mm512_storeu_si512(lanes + 16, _mm512_permutex2var_epi16(a, high, b));
        }
        store(sums + j, sum);
    }
}

inline void score_gradients(float* scores, float* grads, std::int64_t rows, std::int64_t columns, float scale,
                            const float* shift, const float* delta) {
    const __m512 factor = _mm512_set1_ps(scale);
    for (std::int64_t j = 0; j < columns; j += 32) {
        const Two shifts = load(shift + j), deltas = load(delta + j);
        for (std::int64_t i = 0; i < rows; ++i) {
            const std::int64_t at = i * kPanel + j;
            const Two weight = weights_of(scores + at, factor, shifts);
            store(scores + at, weight);
            store(grads + at, weight * (load(grads + at) - deltas));
        }
    }
}

template <class Rounding>
void score_gradient_pairs(const float* scores, const float* grads, std::int64_t rows, std::int64_t columns,
                          float scale, const float* shift, const float* delta, std::uint16_t* weights,
                          std::uint16_t* score_grads, std::uint32_t* panel) {
    const __m512 factor = _mm512_set1_ps(scale);
    const __m512i low = low_pairs(), high = high_pairs();
    for (std::int64_t j = 0; j < columns; j += 32) {
        const Two shifts = load(shift + j), deltas = load(delta + j);
        for (std::int64_t i = 0; i < rows; i += 2) {
            __m512i words[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
            for (int r = 0; r < 2 && i + r < rows; ++r) {
                const std::int64_t at = (i + r) * kPanel + j;
                const Two weight = weights_of(scores + at, factor, shifts);
                const Two grad = weight * (load(grads + at) - deltas);
                _mm512_storeu_si512(weights + at, Rounding::words(weight.low, weight.high));
                words[r] = Rounding::words(grad.low, grad.high);
                _mm512_storeu_si512(score_grads + at, words[r]);
            }
            std::uint32_t* lanes = panel + i / 2 * kPanel + j;
            _mm512_storeu_si512(lanes, _mm512_permutex2var_epi16(words[0], low, words[1]));
            _mm512_storeu_si512(lanes + 16, _mm512_permutex2var_epi16(words[0], high, words[1]));
        }
    }
}

}  // namespace softmax512
}  // namespace
}  // namespace halfbyte

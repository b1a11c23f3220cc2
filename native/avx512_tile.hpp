// The register tile of `Kernels::multiply` for 512-bit vectors, for any lane type. Lanes::fma(c, a, b) adds
// the product of the lanes of a and b to c. See `multiply` in portable.cpp.
#pragma once

#include <immintrin.h>

#include "kernels.hpp"

namespace halfbyte {
namespace {

template <class Lanes, int R, int V>
void tile(const std::uint32_t* a, std::int64_t stride, const std::uint32_t* panel, std::int64_t depth,
          bool add, float* sums) {
    __m512 c[R][V];
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v)
            c[r][v] = add ? _mm512_loadu_ps(sums + r * kPanel + 16 * v) : _mm512_setzero_ps();
    for (std::int64_t d = 0; d < depth; ++d) {
        __m512i b[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) b[v] = _mm512_loadu_si512(panel + d * kPanel + 16 * v);
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r) {
            const __m512i factor = _mm512_set1_epi32(static_cast<int>(a[r * stride + d]));
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) c[r][v] = Lanes::fma(c[r][v], factor, b[v]);
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) _mm512_storeu_ps(sums + r * kPanel + 16 * v, c[r][v]);
}

// Steps of R rows, which with V vectors of columns keep enough sums in flight to hide the product's latency.
template <class Lanes, int R, int V>
void multiply_columns(const std::uint32_t* a, std::int64_t stride, std::int64_t rows,
                      const std::uint32_t* panel, std::int64_t depth, bool add, float* sums) {
    std::int64_t i = 0;
    for (; i + R <= rows; i += R)
        tile<Lanes, R, V>(a + i * stride, stride, panel, depth, add, sums + i * kPanel);
    for (; i + 4 <= rows; i += 4)
        tile<Lanes, 4, V>(a + i * stride, stride, panel, depth, add, sums + i * kPanel);
    for (; i < rows; ++i) tile<Lanes, 1, V>(a + i * stride, stride, panel, depth, add, sums + i * kPanel);
}

template <class Lanes>
void multiply_tiles(const std::uint32_t* a, std::int64_t stride, std::int64_t rows,
                    const std::uint32_t* panel, std::int64_t columns, std::int64_t depth, bool add,
                    float* sums) {
    switch ((columns + 15) / 16) {
        case 1:
            return multiply_columns<Lanes, 12, 1>(a, stride, rows, panel, depth, add, sums);
        case 2:
            return multiply_columns<Lanes, 12, 2>(a, stride, rows, panel, depth, add, sums);
        case 3:
            return multiply_columns<Lanes, 8, 3>(a, stride, rows, panel, depth, add, sums);
        default:
            return multiply_columns<Lanes, 6, 4>(a, stride, rows, panel, depth, add, sums);
    }
}

// See `arithmetic`; a lane is `width` products wide.
template <class Lanes>
std::int64_t burn(std::int64_t rounds, std::int64_t width, float* out) {
    constexpr int kSums = 24;
    // Read from memory that the compiler cannot know: else it might do equal sums once, or leave rounds out.
    volatile float unknown[kSums + 2] = {};
    __m512 c[kSums];
#pragma GCC unroll 24
    for (int i = 0; i < kSums; ++i) c[i] = _mm512_set1_ps(unknown[i]);
    const __m512i a = _mm512_castps_si512(_mm512_set1_ps(unknown[kSums]));
    const __m512i b = _mm512_castps_si512(_mm512_set1_ps(unknown[kSums + 1]));
    for (std::int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 24
        for (int i = 0; i < kSums; ++i) c[i] = Lanes::fma(c[i], a, b);
    }
    __m512 sum = c[0];
#pragma GCC unroll 24
    for (int i = 1; i < kSums; ++i) sum = _mm512_add_ps(sum, c[i]);
    *out = _mm512_reduce_add_ps(sum);
    return rounds * kSums * 16 * width * 2;
}

}  // namespace
}  // namespace halfbyte

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
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v)
            c[r][v] = add ? _mm512_loadu_ps(sums + r * kPanel + 16 * v) : _mm512_setzero_ps();
    for (std::int64_t d = 0; d < depth; ++d) {
        __m512i b[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) b[v] = _mm512_loadu_si512(panel + d * kPanel + 16 * v);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const __m512i factor = _mm512_set1_epi32(static_cast<int>(a[r * stride + d]));
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) c[r][v] = Lanes::fma(c[r][v], factor, b[v]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) _mm512_storeu_ps(sums + r * kPanel + 16 * v, c[r][v]);
}

template <class Lanes, int V>
void multiply_columns(const std::uint32_t* a, std::int64_t stride, std::int64_t rows,
                      const std::uint32_t* panel, std::int64_t depth, bool add, float* sums) {
    std::int64_t i = 0;
    for (; i + 6 <= rows; i += 6)
        tile<Lanes, 6, V>(a + i * stride, stride, panel, depth, add, sums + i * kPanel);
    a += i * stride;
    sums += i * kPanel;
    switch (rows - i) {
        case 5:
            return tile<Lanes, 5, V>(a, stride, panel, depth, add, sums);
        case 4:
            return tile<Lanes, 4, V>(a, stride, panel, depth, add, sums);
        case 3:
            return tile<Lanes, 3, V>(a, stride, panel, depth, add, sums);
        case 2:
            return tile<Lanes, 2, V>(a, stride, panel, depth, add, sums);
        case 1:
            return tile<Lanes, 1, V>(a, stride, panel, depth, add, sums);
        default:
            return;
    }
}

template <class Lanes>
void multiply_tiles(const std::uint32_t* a, std::int64_t stride, std::int64_t rows,
                    const std::uint32_t* panel, std::int64_t columns, std::int64_t depth, bool add,
                    float* sums) {
    switch ((columns + 15) / 16) {
        case 1:
            return multiply_columns<Lanes, 1>(a, stride, rows, panel, depth, add, sums);
        case 2:
            return multiply_columns<Lanes, 2>(a, stride, rows, panel, depth, add, sums);
        case 3:
            return multiply_columns<Lanes, 3>(a, stride, rows, panel, depth, add, sums);
        default:
            return multiply_columns<Lanes, 4>(a, stride, rows, panel, depth, add, sums);
    }
}

}  // namespace
}  // namespace halfbyte

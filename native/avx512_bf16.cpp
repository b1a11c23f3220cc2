// AVX-512-BF16: products of bf16 pairs. Everything else is AVX-512's.
#include <immintrin.h>

#include "avx512_tile.hpp"
#include "kernels.hpp"

namespace halfbyte {
namespace {

struct Pairs {
    static __m512 fma(__m512 c, __m512i a, __m512i b) {
        return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b);
    }
};

// See `dot` in portable.cpp.
void dot_bf16(const std::uint16_t* w, const std::uint16_t* a, std::int64_t stride, int rows,
              std::int64_t count, float* sums) {
    for (int i = 0; i < rows; ++i) {
        const std::uint16_t* row = a + i * stride;
        __m512 sum0 = _mm512_setzero_ps(), sum1 = sum0;
        std::int64_t k = 0;
        for (; k + 64 <= count; k += 64) {
            sum0 = Pairs::fma(sum0, _mm512_loadu_si512(w + k), _mm512_loadu_si512(row + k));
            sum1 = Pairs::fma(sum1, _mm512_loadu_si512(w + k + 32), _mm512_loadu_si512(row + k + 32));
        }
        for (; k < count; k += 32) {
            const auto mask = static_cast<__mmask32>(count - k >= 32 ? ~0u : (1u << (count - k)) - 1u);
            sum0 = Pairs::fma(sum0, _mm512_maskz_loadu_epi16(mask, w + k),
                              _mm512_maskz_loadu_epi16(mask, row + k));
        }
        sums[i] += _mm512_reduce_add_ps(_mm512_add_ps(sum0, sum1));
    }
}

}  // namespace

const Kernels* avx512_bf16_kernels() {
    static const Kernels kernels = [] {
        Kernels k = *avx512_kernels();
        k.name = "avx512_bf16";
        k.multiply_pairs = multiply_tiles<Pairs>;
        k.dot_bf16 = dot_bf16;
        return k;
    }();
    return &kernels;
}

}  // namespace halfbyte

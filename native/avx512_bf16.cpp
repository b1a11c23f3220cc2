// AVX-512-BF16: products of bf16 pairs. Everything else is AVX-512's.
#include <immintrin.h>

#include "avx512_softmax.hpp"
#include "avx512_tile.hpp"
#include "portable.hpp"

namespace halfbyte {
namespace {

struct Pairs {
    static __m512 fma(__m512 c, __m512i a, __m512i b) {
        return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b);
    }
};

struct Rounding {
    static __m512i words(__m512 low, __m512 high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }
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

// Rows of whole blocks of 64 are multiplied as bf16; others as floats, as AVX-512 does.
bool as_words(Type type, std::int64_t cols) { return type == Type::bf16 && cols % 64 == 0; }

// Each run of 64 numbers: its 32 even ones, then its 32 odd ones, as `look_up` leaves the weights.
void prepare_rows(const void* numbers, Type type, int rows, std::int64_t cols, void* prepared) {
    if (!as_words(type, cols)) return avx512_kernels()->prepare_rows(numbers, type, rows, cols, prepared);
    std::uint16_t twice[32];
    for (int i = 0; i < 32; ++i) twice[i] = static_cast<std::uint16_t>(2 * i);
    const __m512i evens = _mm512_loadu_si512(twice);
    const __m512i odds = _mm512_add_epi16(evens, _mm512_set1_epi16(1));
    const auto* words = static_cast<const std::uint16_t*>(numbers);
    auto* out = static_cast<std::uint16_t*>(prepared);
    for (std::int64_t k = 0; k < rows * cols; k += 64) {
        const __m512i first = _mm512_loadu_si512(words + k), second = _mm512_loadu_si512(words + k + 32);
        _mm512_storeu_si512(out + k, _mm512_permutex2var_epi16(first, evens, second));
        _mm512_storeu_si512(out + k + 32, _mm512_permutex2var_epi16(first, odds, second));
    }
}

struct Run {
    __m512i even, odd;
};

// The 64 weights of a run from e on. A subnormal becomes zero in `cvtneps`, as it would in the product.
HALFBYTE_INLINE Run look_up(const Weight& weight, __m512 codebook, std::int64_t e, float scale) {
    const __m256i half = (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(codebook, _mm512_set1_ps(scale)));
    const __m512i table = _mm512_broadcast_i64x4(half);  // twice, so that bit 4 of an index does not matter
    const auto* bytes = reinterpret_cast<const __m256i*>(weight.codes + e / 2);
    const __m512i index = _mm512_cvtepu8_epi16(_mm256_loadu_si256(bytes));
    return {_mm512_permutexvar_epi16(_mm512_srli_epi16(index, 4), table),
            _mm512_permutexvar_epi16(index, table)};
}

constexpr int kRuns = 16;  // whose scales are decoded together

// The scales of `runs` runs from element e on. See `scale_of` in portable.hpp.
HALFBYTE_INLINE void run_scales(const Weight& weight, std::int64_t e, std::int64_t runs, float* scales) {
    const std::int64_t g = e / 64;
    if (runs == kRuns && weight.blocksize == 64 && weight.nested_scales != nullptr && g % 256 <= 240) {
        const auto* codes =
            reinterpret_cast<const __m128i*>(static_cast<const std::uint8_t*>(weight.scales) + g);
        const __m512i index = _mm512_cvtepu8_epi32(_mm_loadu_si128(codes));
        const __m512 values = _mm512_i32gather_ps(index, weight.nested_codebook, 4);
        const __m512 product = _mm512_mul_ps(values, _mm512_set1_ps(weight.nested_scales[g / kNestedBlock]));
        return _mm512_storeu_ps(scales, _mm512_add_ps(product, _mm512_set1_ps(weight.offset)));
    }
    for (std::int64_t i = 0; i < runs; ++i) scales[i] = plain::scale_of(weight, e + 64 * i);
}

constexpr int kAhead = 640;  // bytes; the processor itself does not look beyond a page

// R rows of the weight from n on by M rows of activations.
template <int R, int M>
void few_rows(const Weight& weight, std::int64_t n, const std::uint16_t* a, float* sums) {
    const __m512 codebook = _mm512_loadu_ps(weight.codebook);
    const std::int64_t cols = weight.cols;
    __m512 c[R][M];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) c[r][m] = _mm512_setzero_ps();
    for (std::int64_t k0 = 0; k0 < cols; k0 += 64 * kRuns) {
        const std::int64_t runs = (cols - k0) / 64 < kRuns ? (cols - k0) / 64 : kRuns;
        float scales[R][kRuns];
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) run_scales(weight, (n + r) * cols + k0, runs, scales[r]);
        for (std::int64_t run = 0; run < runs; ++run) {
            const std::int64_t k = k0 + 64 * run;
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) {
                const std::int64_t e = (n + r) * cols + k;
                if (run % 2 == 0)
                    _mm_prefetch(reinterpret_cast<const char*>(weight.codes + e / 2) + kAhead, _MM_HINT_T0);
                const Run values = look_up(weight, codebook, e, scales[r][run]);
#pragma GCC unroll 8
                for (int m = 0; m < M; ++m) {
                    const std::uint16_t* row = a + m * cols + k;
                    c[r][m] = Pairs::fma(c[r][m], values.even, _mm512_loadu_si512(row));
                    c[r][m] = Pairs::fma(c[r][m], values.odd, _mm512_loadu_si512(row + 32));
                }
            }
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) sums[r * M + m] = _mm512_reduce_add_ps(c[r][m]);
}

template <int R, int M>
void all_rows(const Weight& weight, std::int64_t first, std::int64_t last, const std::uint16_t* a,
              float* sums) {
    std::int64_t n = first;
    for (; n + R <= last; n += R) few_rows<R, M>(weight, n, a, sums + (n - first) * M);
    for (; n < last; ++n) few_rows<1, M>(weight, n, a, sums + (n - first) * M);
}

void multiply_rows(const Weight& weight, Type type, std::int64_t first, std::int64_t last,
                   const void* prepared, int rows, float* sums) {
    if (!as_words(type, weight.cols))
        return avx512_kernels()->multiply_rows(weight, type, first, last, prepared, rows, sums);
    const auto* a = static_cast<const std::uint16_t*>(prepared);
    switch (rows) {
        case 1:
            return all_rows<8, 1>(weight, first, last, a, sums);
        case 2:
            return all_rows<4, 2>(weight, first, last, a, sums);
        case 3:
            return all_rows<4, 3>(weight, first, last, a, sums);
        case 4:
            return all_rows<4, 4>(weight, first, last, a, sums);
        case 5:
            return all_rows<3, 5>(weight, first, last, a, sums);
        case 6:
            return all_rows<3, 6>(weight, first, last, a, sums);
        case 7:
            return all_rows<3, 7>(weight, first, last, a, sums);
        default:
            return all_rows<3, 8>(weight, first, last, a, sums);
    }
}

std::int64_t arithmetic(std::int64_t rounds, bool pairs, float* out) {
    return pairs ? burn<Pairs>(rounds, 2, out) : avx512_kernels()->arithmetic(rounds, pairs, out);
}

}  // namespace

const Kernels* avx512_bf16_kernels() {
    static const Kernels kernels = [] {
        Kernels k = *avx512_kernels();
        k.name = "avx512_bf16";
        k.multiply_pairs = multiply_tiles<Pairs>;
        k.dot_bf16 = dot_bf16;
        k.prepare_rows = prepare_rows;
        k.multiply_rows = multiply_rows;
        k.arithmetic = arithmetic;
        k.softmax.exponential_pairs = softmax512::exponential_pairs<Rounding>;
        k.softmax.score_gradient_pairs = softmax512::score_gradient_pairs<Rounding>;
        return k;
    }();
    return &kernels;
}

}  // namespace halfbyte

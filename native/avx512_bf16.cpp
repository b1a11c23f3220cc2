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

constexpr std::int64_t kStrip = 128;  // weights that one load of codes holds: two runs of 64

constexpr int kGroup = 4;  // most rows of activations at a time

std::int64_t strips(std::int64_t cols) { return (cols + kStrip - 1) / kStrip; }

// Rows in groups of four, a group's strips of 128 numbers of each row in turn, a strip in four parts as
// `Strip` leaves the weights: its numbers 4 i, 4 i + 1, 4 i + 2 and 4 i + 3. The last strip is filled up with
// zeros.
void prepare_rows(const void* numbers, Type type, int rows, std::int64_t cols, void* prepared) {
    if (!as_words(type, cols)) return avx512_kernels()->prepare_rows(numbers, type, rows, cols, prepared);
    std::uint16_t twice[32];
    for (int i = 0; i < 32; ++i) twice[i] = static_cast<std::uint16_t>(2 * i);
    const __m512i evens = _mm512_loadu_si512(twice), zero = _mm512_setzero_si512();
    const __m512i odds = _mm512_add_epi16(evens, _mm512_set1_epi16(1));
    auto* out = static_cast<std::uint16_t*>(prepared);
    const auto strip = [&](const std::uint16_t* words, bool whole) {
        const __m512i a = _mm512_loadu_si512(words), b = _mm512_loadu_si512(words + 32);
        const __m512i c = whole ? _mm512_loadu_si512(words + 64) : zero;
        const __m512i d = whole ? _mm512_loadu_si512(words + 96) : zero;
        const __m512i even0 = _mm512_permutex2var_epi16(a, evens, b);
        const __m512i even1 = _mm512_permutex2var_epi16(c, evens, d);
        const __m512i odd0 = _mm512_permutex2var_epi16(a, odds, b);
        const __m512i odd1 = _mm512_permutex2var_epi16(c, odds, d);
        _mm512_storeu_si512(out, _mm512_permutex2var_epi16(even0, evens, even1));
        _mm512_storeu_si512(out + 32, _mm512_permutex2var_epi16(odd0, evens, odd1));
        _mm512_storeu_si512(out + 64, _mm512_permutex2var_epi16(even0, odds, even1));
        _mm512_storeu_si512(out + 96, _mm512_permutex2var_epi16(odd0, odds, odd1));
        out += kStrip;
    };
    for (int first = 0; first < rows; first += kGroup)
        for (std::int64_t k = 0; k < cols; k += kStrip)
            for (int m = first; m < first + kGroup && m < rows; ++m)
                strip(static_cast<const std::uint16_t*>(numbers) + m * cols + k, k + kStrip <= cols);
}

// 128 weights of a row. The two runs have a scale each, so the codebook times either fills one half of the
// table; bit 4 of an index tells the halves apart. A subnormal becomes zero in `cvtne2ps`, as it would in the
// product.
struct Strip {
    __m512i parts[4];

    HALFBYTE_INLINE Strip(__m512i codes, __m512 codebook, float first, float second) {
        const __m512 low = _mm512_mul_ps(codebook, _mm512_set1_ps(first));
        const __m512 high = _mm512_mul_ps(codebook, _mm512_set1_ps(second));
        const __m512i table = (__m512i)_mm512_cvtne2ps_pbh(high, low);
        const __m512i nibble = _mm512_set1_epi16(15);
        const __m512i half = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(16), 1);
        const auto look_up = [&](__m512i index) {  // (index & nibble) | half
            return _mm512_permutexvar_epi16(_mm512_ternarylogic_epi32(index, nibble, half, 0xEA), table);
        };
        parts[0] = look_up(_mm512_srli_epi16(codes, 4));
        parts[1] = look_up(codes);
        parts[2] = look_up(_mm512_srli_epi16(codes, 12));
        parts[3] = look_up(_mm512_srli_epi16(codes, 8));
    }
};

// The 256 scales that codes can stand for under one nested scale, made when the nested scale changes. See
// `scale_of` in portable.hpp.
struct NestedTable {
    std::int64_t block = -1;
    float scales[256];

    const float* of(const Weight& weight, std::int64_t wanted) {
        if (wanted != block) {
            const __m512 nested = _mm512_set1_ps(weight.nested_scales[wanted]);
            const __m512 offset = _mm512_set1_ps(weight.offset);
            for (int i = 0; i < 256; i += 16) {
                const __m512 product = _mm512_mul_ps(_mm512_loadu_ps(weight.nested_codebook + i), nested);
                _mm512_storeu_ps(scales + i, _mm512_add_ps(product, offset));
            }
            block = wanted;
        }
        return scales;
    }
};

// The scales of the runs from element e on, all under one nested scale.
struct NestedScales {
    const std::uint8_t* codes;
    const float* table;

    static bool suit(const Weight& weight, std::int64_t e, std::int64_t runs) {
        return weight.nested_scales != nullptr && weight.blocksize == 64 &&
               e / 64 % kNestedBlock + runs <= kNestedBlock;
    }
    void begin(const Weight& weight, std::int64_t e, std::int64_t, NestedTable& nested) {
        codes = static_cast<const std::uint8_t*>(weight.scales) + e / 64;
        table = nested.of(weight, e / 64 / kNestedBlock);
    }
    float operator[](std::int64_t run) const { return table[codes[run]]; }
};

constexpr std::int64_t kRuns = 64;    // of a row, before those of the next rows; even
constexpr std::int64_t kAhead = 640;  // bytes; the processor itself does not look beyond a page

// The same for any other block size or form of the scales.
struct AnyScales {
    float scales[kRuns];

    void begin(const Weight& weight, std::int64_t e, std::int64_t runs, NestedTable&) {
        for (std::int64_t i = 0; i < runs; ++i) scales[i] = plain::scale_of(weight, e + 64 * i);
    }
    float operator[](std::int64_t run) const { return scales[run]; }
};

// Sums of R rows of the weight by M rows of activations.
template <int R, int M>
struct RowSums {
    __m512 sums[R][M];

    HALFBYTE_INLINE RowSums() {
        for (auto& row : sums)
            for (__m512& sum : row) sum = _mm512_setzero_ps();
    }
    HALFBYTE_INLINE void add(int r, const Strip& strip, const std::uint16_t* a) {
        HALFBYTE_OPAQUE(a);  // read again for each row: kept in registers the activations would displace sums
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
            for (int part = 0; part < 4; ++part)
                sums[r][m] =
                    Pairs::fma(sums[r][m], strip.parts[part], _mm512_loadu_si512(a + m * kStrip + 32 * part));
    }
    // out[r][m], with the rows of out `stride` apart.
    HALFBYTE_INLINE void store(float* out, int stride) const {
        for (int r = 0; r < R; ++r)
            for (int m = 0; m < M; ++m) out[r * stride + m] = _mm512_reduce_add_ps(sums[r][m]);
    }
};

// Adds the product of `runs` runs of R rows, from element e of the first on, by M rows of activations. From
// run `turn` on what is fetched ahead lies in the next R rows.
template <class Scales, int R, int M>
HALFBYTE_INLINE void add_runs(const Weight& weight, std::int64_t e, std::int64_t runs, std::int64_t turn,
                              const std::uint16_t* a, NestedTable* tables, RowSums<R, M>& sums) {
    const __m512 codebook = _mm512_loadu_ps(weight.codebook);
    const std::int64_t bytes = weight.cols / 2;
    Scales scales[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) scales[r].begin(weight, e + r * weight.cols, runs, tables[r]);
    const std::uint8_t* codes = weight.codes + e / 2;
    std::int64_t run = 0;
    for (; run + 2 <= runs; run += 2, codes += 64, a += M * kStrip) {
        const std::int64_t ahead = run < turn ? kAhead : kAhead + (R - 1) * bytes;
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const auto& of = scales[r];
            const std::uint8_t* here = codes + r * bytes;
            _mm_prefetch(reinterpret_cast<const char*>(here) + ahead, _MM_HINT_T0);
            sums.add(r, Strip(_mm512_loadu_si512(here), codebook, of[run], of[run + 1]), a);
        }
    }
    if (run == runs) return;
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
        const float scale = scales[r][run];
        const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + r * bytes));
        sums.add(r, Strip(_mm512_zextsi256_si512(half), codebook, scale, scale), a);
    }
}

// R rows of the weight from n on by M rows of activations.
template <int R, int M>
void few_rows(const Weight& weight, std::int64_t n, const std::uint16_t* a, NestedTable* tables, float* out,
              int stride) {
    const std::int64_t cols = weight.cols;
    RowSums<R, M> sums;
    for (std::int64_t k = 0; k < cols; k += 64 * kRuns) {
        const std::int64_t left = (cols - k) / 64, runs = left < kRuns ? left : kRuns, e = n * cols + k;
        const std::int64_t turn = left - kAhead / 32;
        bool nested = true;
        for (int r = 0; r < R; ++r) nested &= NestedScales::suit(weight, e + r * cols, runs);
        if (nested)
            add_runs<NestedScales>(weight, e, runs, turn, a + M * k, tables, sums);
        else
            add_runs<AnyScales>(weight, e, runs, turn, a + M * k, tables, sums);
    }
    sums.store(out, stride);
}

// Rows [first, last) of the weight by M rows of activations.
template <int M>
void group_of_rows(const Weight& weight, std::int64_t first, std::int64_t last, const std::uint16_t* a,
                   float* out, int stride) {
    constexpr int R = M <= 2 ? 8 : 4;  // streams of codes; one alone leaves memory idle
    NestedTable tables[R];
    std::int64_t n = first;
    for (; n + R <= last; n += R, out += R * stride) few_rows<R, M>(weight, n, a, tables, out, stride);
    for (; n < last; ++n, out += stride) few_rows<1, M>(weight, n, a, tables, out, stride);
}

void multiply_rows(const Weight& weight, Type type, std::int64_t first, std::int64_t last,
                   const void* prepared, int rows, float* sums) {
    if (!as_words(type, weight.cols))
        return avx512_kernels()->multiply_rows(weight, type, first, last, prepared, rows, sums);
    constexpr decltype(&group_of_rows<1>) groups[] = {group_of_rows<1>, group_of_rows<2>, group_of_rows<3>,
                                                      group_of_rows<4>};
    const std::int64_t step = rows <= kGroup ? last - first : 8;  // a second group finds codes in the cache
    for (std::int64_t n = first; n < last; n += step) {
        const std::int64_t end = n + step < last ? n + step : last;
        for (int m = 0; m < rows; m += kGroup) {
            const auto* group =
                static_cast<const std::uint16_t*>(prepared) + m * strips(weight.cols) * kStrip;
            const int of = rows - m < kGroup ? rows - m : kGroup;
            groups[of - 1](weight, n, end, group, sums + (n - first) * rows + m, rows);
        }
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

// AVX-512 (F, BW, DQ, VL, with F16C and FMA). Each function does what its namesake in portable.hpp or
// portable.cpp does, 16 numbers at a time.
#include <immintrin.h>

#include "adamw_kernels.hpp"
#include "avx512_softmax.hpp"
#include "avx512_tile.hpp"
#include "avx512_wide.hpp"
#include "elementwise_kernels.hpp"
#include "loss_rows.hpp"
#include "portable.hpp"

namespace halfbyte {
namespace {

struct Floats {
    static __m512 fma(__m512 c, __m512i a, __m512i b) {
        return _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), c);
    }
};

void block_scales(const void* numbers, Type type, std::int64_t count, std::int64_t blocksize,
                  std::int64_t first, std::int64_t last, float* scales) {
    for (std::int64_t b = first; b < last; ++b) {
        const plain::Block block = plain::block_of(b, count, blocksize);
        if (block.end - block.begin < blocksize) {
            plain::block_scales(numbers, type, count, blocksize, b, b + 1, scales);
            continue;
        }
        __m512i largest = _mm512_setzero_si512();
        for (std::int64_t i = block.begin; i < block.end; i += 16) {
            const __m512i bits = _mm512_castps_si512(load16(numbers, type, i));
            largest = _mm512_max_epu32(largest, _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff)));
        }
        scales[b] = plain::bits_as<float>(_mm512_reduce_max_epu32(largest));
    }
}

// The tables of a codebook in registers.
struct Tables {
    __m512 half, quarter, eighth, last, values;
    __m512i order;

    explicit Tables(const Codebook& codebook) {
        float shifted[3][16];
        for (int i = 0; i < 16; ++i) {
            shifted[0][i] = codebook.thresholds[(i + 3) & 15];
            shifted[1][i] = codebook.thresholds[(i + 1) & 15];
            shifted[2][i] = codebook.thresholds[i];
        }
        half = _mm512_set1_ps(codebook.thresholds[7]);
        quarter = _mm512_loadu_ps(shifted[0]);
        eighth = _mm512_loadu_ps(shifted[1]);
        last = _mm512_loadu_ps(shifted[2]);
        values = _mm512_loadu_ps(codebook.values);
        order = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codebook.order)));
    }

    // Binary search, as `plain::rank`.
    __m512i rank(__m512 x) const {
        __m512i r = _mm512_maskz_set1_epi32(_mm512_cmp_ps_mask(x, half, _CMP_GT_OQ), 8);
        r = step(r, x, quarter, 4);
        r = step(r, x, eighth, 2);
        return step(r, x, last, 1);
    }

  private:
    static __m512i step(__m512i r, __m512 x, __m512 table, int size) {
        const __mmask16 above = _mm512_cmp_ps_mask(x, _mm512_permutexvar_ps(r, table), _CMP_GT_OQ);
        return _mm512_mask_add_epi32(r, above, r, _mm512_set1_epi32(size));
    }
};

void encode(const void* numbers, Type type, std::int64_t count, std::int64_t blocksize,
            const Codebook& codebook, const float* scales, std::int64_t first, std::int64_t last,
            std::uint8_t* codes) {
    const Tables tables(codebook);
    for (std::int64_t b = first; b < last; ++b) {
        const plain::Block block = plain::block_of(b, count, blocksize);
        if (block.end - block.begin < blocksize) {
            plain::encode(numbers, type, count, blocksize, codebook, scales, b, b + 1, codes);
            continue;
        }
        const __m512 inv = _mm512_set1_ps(plain::inverse(scales[b]));
        for (std::int64_t i = block.begin; i < block.end; i += 16) {
            const __m512i rank = tables.rank(_mm512_mul_ps(load16(numbers, type, i), inv));
            const __m512i code = _mm512_permutexvar_epi32(rank, tables.order);
            const __m512i pairs = _mm512_or_si512(_mm512_slli_epi64(code, 4), _mm512_srli_epi64(code, 32));
            _mm_storel_epi64(reinterpret_cast<__m128i*>(codes + i / 2), _mm512_cvtepi64_epi8(pairs));
        }
    }
}

plain::Fit fit_at(const float* block, std::int64_t blocksize, const Tables& tables, float scale) {
    const __m512 inv = _mm512_set1_ps(plain::inverse(scale)), minus = _mm512_set1_ps(-scale);
    __m512 error = _mm512_setzero_ps(), along = error, norm = error;
    for (std::int64_t i = 0; i < blocksize; i += 16) {
        const __m512 number = _mm512_loadu_ps(block + i);
        const __m512 value = _mm512_permutexvar_ps(tables.rank(_mm512_mul_ps(number, inv)), tables.values);
        const __m512 off = _mm512_fmadd_ps(value, minus, number);
        error = _mm512_fmadd_ps(off, off, error);
        along = _mm512_fmadd_ps(number, value, along);
        norm = _mm512_fmadd_ps(value, value, norm);
    }
    const float total = _mm512_reduce_add_ps(norm);
    return {_mm512_reduce_add_ps(error), total > 0 ? _mm512_reduce_add_ps(along) / total : scale};
}

void search_scales(const void* numbers, Type type, std::int64_t count, std::int64_t blocksize,
                   const Codebook& codebook, const Search& search, std::int64_t first, std::int64_t last,
                   float* scales) {
    const Tables tables(codebook);
    block_scales(numbers, type, count, blocksize, first, last, scales);
    float block[4096];
    for (std::int64_t b = first; b < last; ++b) {
        const plain::Block span = plain::block_of(b, count, blocksize);
        const std::int64_t size = span.end - span.begin;
        const std::int64_t element = size_of(type);
        to_float(static_cast<const char*>(numbers) + span.begin * element, type, size, block);
        // Zeros add nothing to any of the three sums: the value nearest to zero is zero.
        for (std::int64_t i = size; i < blocksize; ++i) block[i] = 0.0f;
        scales[b] = plain::search_block(scales[b], search,
                                        [&](float scale) { return fit_at(block, blocksize, tables, scale); });
    }
}

// The values of a block: each product rounded to `type` here, once per block instead of once per weight.
__m512 scaled_table(const Weight& weight, float scale, Type type) {
    return rounded16(_mm512_mul_ps(_mm512_loadu_ps(weight.codebook), _mm512_set1_ps(scale)), type);
}

// 32 values (or as many pairs as `mask` has) from 16 bytes: even elements, odd elements.
struct Values {
    __m512 even, odd;
};

Values values_of(const std::uint8_t* bytes, __mmask16 mask, __m512 table) {
    const __m512i byte = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, bytes));
    return {_mm512_permutexvar_ps(_mm512_srli_epi32(byte, 4), table), _mm512_permutexvar_ps(byte, table)};
}

// A pair of 16-bit numbers per lane, the even element in the low half. The values are of `type` already.
__m512i words_of(Values values, Type type) {
    if (type == Type::f16) {
        constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        const __m512i even = _mm512_cvtepu16_epi32(_mm512_cvtps_ph(values.even, mode));
        const __m512i odd = _mm512_cvtepu16_epi32(_mm512_cvtps_ph(values.odd, mode));
        return _mm512_or_si512(even, _mm512_slli_epi32(odd, 16));
    }
    return _mm512_mask_blend_epi16(0xaaaaaaaau, _mm512_srli_epi32(_mm512_castps_si512(values.even), 16),
                                   _mm512_castps_si512(values.odd));
}

void store_floats(float* out, __mmask16 mask, Values values) {
    const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    const std::uint32_t both = _pdep_u32(mask, 0x55555555u) * 3u;
    _mm512_mask_storeu_ps(out, static_cast<__mmask16>(both),
                          _mm512_permutex2var_ps(values.even, low, values.odd));
    _mm512_mask_storeu_ps(out + 16, static_cast<__mmask16>(both >> 16),
                          _mm512_permutex2var_ps(values.even, high, values.odd));
}

// Calls `vector(element, mask, values)` for up to 16 pairs at a time, with their values rounded to `type`,
// and `single(element, value)` with the unrounded value of an element that shares its byte with one outside.
template <class Vector, class Single>
void decode_span(const Weight& weight, std::int64_t begin, std::int64_t count, Type type, Vector&& vector,
                 Single&& single) {
    plain::for_each_block(weight, begin, count, [&](std::int64_t e, std::int64_t end, float scale) {
        if (e % 2 != 0) {
            single(e, plain::value_at(weight, e, scale));
            ++e;
        }
        const __m512 table = scaled_table(weight, scale, type);
        while (e + 1 < end) {
            const std::int64_t pairs = (end - e) / 2;
            const auto mask = static_cast<__mmask16>(pairs >= 16 ? 0xffff : (1 << pairs) - 1);
            vector(e, mask, values_of(weight.codes + e / 2, mask, table));
            e += pairs >= 16 ? 32 : 2 * pairs;
        }
        if (e < end) single(e, plain::value_at(weight, e, scale));
    });
}

void decode_wide(const Weight& weight, std::int64_t begin, std::int64_t count, Type type, float* out) {
    decode_span(
        weight, begin, count, type,
        [&](std::int64_t e, __mmask16 mask, Values values) { store_floats(out + (e - begin), mask, values); },
        [&](std::int64_t e, float value) { out[e - begin] = plain::rounded(value, type); });
}

// Whether elements begin … begin+count-1 are whole runs of 64, none of which crosses a block.
bool whole_runs(const Weight& weight, std::int64_t begin, std::int64_t count) {
    return begin % 64 == 0 && count % 64 == 0 && weight.blocksize % 64 == 0;
}

// The codebook times two scales, as 2 x 16 bf16 words: bit 4 of an index tells the scales apart.
HALFBYTE_INLINE __m512i word_table(const Weight& weight, float first, float second) {
    const __m512 codebook = _mm512_loadu_ps(weight.codebook);
    const __m512i upper = _mm512_set_epi16(63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33, 31,
                                           29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
    return _mm512_permutex2var_epi16(round_at_16(_mm512_mul_ps(codebook, _mm512_set1_ps(first))), upper,
                                     round_at_16(_mm512_mul_ps(codebook, _mm512_set1_ps(second))));
}

// The words of the low nibbles of `codes`, looked up in the half of the table that bit 4 of `half` names.
HALFBYTE_INLINE __m512i look_up(__m512i codes, __m512i half, __m512i table) {
    const __m512i index = _mm512_ternarylogic_epi32(codes, _mm512_set1_epi16(15), half, 0xEA);
    return _mm512_permutexvar_epi16(index, table);
}

// The 64 bf16 values of a run, even and odd elements apart. The order of the 32 bytes is the caller's.
struct Words {
    __m512i even, odd;

    HALFBYTE_INLINE Words(__m256i bytes, __m512i half, __m512i table) {
        const __m512i codes = _mm512_cvtepu8_epi16(bytes);
        even = look_up(_mm512_srli_epi16(codes, 4), half, table);
        odd = look_up(codes, half, table);
    }
};

__m256i load32(const std::uint8_t* bytes) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes));
}

// Asks for codes that are decoded soon. The processor finds no pattern by itself in steps of whole rows.
template <_mm_hint kCache>
void prefetch(const Weight& weight, std::int64_t e) {
    _mm_prefetch(reinterpret_cast<const char*>(weight.codes + e / 2), kCache);
}

constexpr std::int64_t kAhead = 256;     // weights along a row, what a product decodes of it at a time
constexpr std::int64_t kRowsAhead = 64;  // in L2: rows a power of two apart share a few lines of L1

// Unpacking works within 128 bits: groups of four bytes take turns, so that the result is in order.
void one_run(const Weight& weight, std::int64_t e, std::uint16_t* words) {
    const __m256i turns = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    const float scale = plain::scale_of(weight, e);
    const Words run(_mm256_permutevar8x32_epi32(load32(weight.codes + e / 2), turns), _mm512_setzero_si512(),
                    word_table(weight, scale, scale));
    _mm512_storeu_si512(words, _mm512_unpacklo_epi16(run.even, run.odd));
    _mm512_storeu_si512(words + 32, _mm512_unpackhi_epi16(run.even, run.odd));
}

void two_runs(const Weight& weight, std::int64_t e, std::uint16_t* words) {
    const __m512i turns = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i half = _mm512_set4_epi32(0x100010, 0x100010, 0, 0);
    const __m512i table = word_table(weight, plain::scale_of(weight, e), plain::scale_of(weight, e + 64));
    const __m512i codes = _mm512_permutexvar_epi32(turns, _mm512_loadu_si512(weight.codes + e / 2));
    // Elements 4 i, 4 i + 1, 4 i + 2 and 4 i + 3.
    const __m512i part0 = look_up(_mm512_srli_epi16(codes, 4), half, table),
                  part1 = look_up(codes, half, table),
                  part2 = look_up(_mm512_srli_epi16(codes, 12), half, table),
                  part3 = look_up(_mm512_srli_epi16(codes, 8), half, table);
    const __m512i low01 = _mm512_unpacklo_epi16(part0, part1), high01 = _mm512_unpackhi_epi16(part0, part1),
                  low23 = _mm512_unpacklo_epi16(part2, part3), high23 = _mm512_unpackhi_epi16(part2, part3);
    _mm512_storeu_si512(words, _mm512_unpacklo_epi32(low01, low23));
    _mm512_storeu_si512(words + 32, _mm512_unpackhi_epi32(low01, low23));
    _mm512_storeu_si512(words + 64, _mm512_unpacklo_epi32(high01, high23));
    _mm512_storeu_si512(words + 96, _mm512_unpackhi_epi32(high01, high23));
}

void decode(const Weight& weight, std::int64_t begin, std::int64_t count, Type type, void* out) {
    if (type == Type::f32) return decode_wide(weight, begin, count, type, static_cast<float*>(out));
    auto* words = static_cast<std::uint16_t*>(out);
    if (type == Type::bf16 && whole_runs(weight, begin, count)) {
        for (std::int64_t e = begin; e < begin + count; e += 128) {
            prefetch<_MM_HINT_T0>(weight, e + kAhead);
            if (e + 128 <= begin + count)
                two_runs(weight, e, words + (e - begin));
            else
                one_run(weight, e, words + (e - begin));
        }
        return;
    }
    decode_span(
        weight, begin, count, type,
        [&](std::int64_t e, __mmask16 mask, Values values) {
            _mm512_mask_storeu_epi32(words + (e - begin), mask, words_of(values, type));
        },
        [&](std::int64_t e, float value) { plain::store(out, type, e - begin, value); });
}

void interleave(const std::uint16_t* low, const std::uint16_t* high, std::int64_t count,
                std::uint32_t* lanes) {
    std::int64_t j = 0;
    for (; j + 16 <= count; j += 16) {
        const auto* above = reinterpret_cast<const __m256i*>(high + j);
        const __m256i words = high == nullptr ? _mm256_setzero_si256() : _mm256_loadu_si256(above);
        const __m512i low_half =
            _mm512_cvtepu16_epi32(load32(reinterpret_cast<const std::uint8_t*>(low + j)));
        const __m512i high_half = _mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16);
        _mm512_storeu_si512(lanes + j, _mm512_or_si512(low_half, high_half));
    }
    if (j < count) plain::interleave(low + j, high == nullptr ? high : high + j, count - j, lanes + j);
}

void decode_pairs(const Weight& weight, std::int64_t row, std::int64_t col, std::int64_t count,
                  std::uint32_t* lanes) {
    const std::int64_t begin = row * weight.cols + col, next = begin + weight.cols;
    if (row + 1 == weight.rows || !whole_runs(weight, begin, count) || next % 64 != 0)
        return plain::decode_pairs(weight, row, col, count, lanes);
    // Two levels of unpacking within 128 bits: the 4 x 4 pairs of bytes are transposed beforehand.
    const __m256i turns = _mm256_setr_epi16(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    for (std::int64_t j = 0; j < count; j += 64) {
        prefetch<_MM_HINT_T1>(weight, begin + j + kRowsAhead * weight.cols);
        prefetch<_MM_HINT_T1>(weight, next + j + kRowsAhead * weight.cols);
        const __m512i table =
            word_table(weight, plain::scale_of(weight, begin + j), plain::scale_of(weight, next + j));
        const Words low(_mm256_permutexvar_epi16(turns, load32(weight.codes + (begin + j) / 2)),
                        _mm512_setzero_si512(), table);
        const Words high(_mm256_permutexvar_epi16(turns, load32(weight.codes + (next + j) / 2)),
                         _mm512_set1_epi16(16), table);
        const __m512i low0 = _mm512_unpacklo_epi16(low.even, low.odd),
                      low1 = _mm512_unpackhi_epi16(low.even, low.odd),
                      high0 = _mm512_unpacklo_epi16(high.even, high.odd),
                      high1 = _mm512_unpackhi_epi16(high.even, high.odd);
        _mm512_storeu_si512(lanes + j, _mm512_unpacklo_epi16(low0, high0));
        _mm512_storeu_si512(lanes + j + 16, _mm512_unpackhi_epi16(low0, high0));
        _mm512_storeu_si512(lanes + j + 32, _mm512_unpacklo_epi16(low1, high1));
        _mm512_storeu_si512(lanes + j + 48, _mm512_unpackhi_epi16(low1, high1));
    }
}

void add(const void* numbers, Type type, std::int64_t count, float* sums) {
    std::int64_t i = 0;
    for (; i + 16 <= count; i += 16)
        _mm512_storeu_ps(sums + i, _mm512_add_ps(_mm512_loadu_ps(sums + i), load16(numbers, type, i)));
    for (; i < count; ++i) sums[i] += plain::load(numbers, type, i);
}

// 16 rows of 16 lanes to 16 columns.
void transpose16(const std::uint32_t* rows, std::int64_t stride, std::uint32_t* panel) {
    __m512i r[16], t[16];
    for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(rows + i * stride);
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 8; ++i) {
        _mm512_storeu_si512(panel + i * kPanel, _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88));
        _mm512_storeu_si512(panel + (i + 8) * kPanel, _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd));
    }
}

void transpose(const std::uint32_t* rows, std::int64_t stride, std::int64_t columns, std::int64_t depth,
               std::uint32_t* panel) {
    const std::int64_t whole_columns = columns / 16 * 16, whole_depth = depth / 16 * 16;
    for (std::int64_t j = 0; j < whole_columns; j += 16)
        for (std::int64_t d = 0; d < whole_depth; d += 16)
            transpose16(rows + j * stride + d, stride, panel + d * kPanel + j);
    for (std::int64_t d = 0; d < depth; ++d) {
        const std::int64_t done = d < whole_depth ? whole_columns : 0;
        for (std::int64_t j = done; j < columns; ++j) panel[d * kPanel + j] = rows[j * stride + d];
        for (std::int64_t j = columns; j < kPanel; ++j) panel[d * kPanel + j] = 0;
    }
}

void dot(const float* w, const float* a, std::int64_t stride, int rows, std::int64_t count, float* sums) {
    for (int i = 0; i < rows; ++i) {
        const float* row = a + i * stride;
        __m512 sum0 = _mm512_setzero_ps(), sum1 = sum0;
        std::int64_t k = 0;
        for (; k + 32 <= count; k += 32) {
            sum0 = _mm512_fmadd_ps(_mm512_loadu_ps(w + k), _mm512_loadu_ps(row + k), sum0);
            sum1 = _mm512_fmadd_ps(_mm512_loadu_ps(w + k + 16), _mm512_loadu_ps(row + k + 16), sum1);
        }
        for (; k < count; k += 16) {
            const auto mask = static_cast<__mmask16>(count - k >= 16 ? 0xffff : (1 << (count - k)) - 1);
            sum0 = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(mask, w + k), _mm512_maskz_loadu_ps(mask, row + k),
                                   sum0);
        }
        sums[i] += _mm512_reduce_add_ps(_mm512_add_ps(sum0, sum1));
    }
}

void prepare_rows(const void* numbers, Type type, int rows, std::int64_t cols, void* prepared) {
    to_float(numbers, type, rows * cols, static_cast<float*>(prepared));
}

void multiply_rows(const Weight& weight, Type type, std::int64_t first, std::int64_t last,
                   const void* prepared, int rows, float* sums) {
    plain::multiply_rows(decode_wide, dot, weight, type, first, last, static_cast<const float*>(prepared),
                         rows, sums);
}

std::int64_t arithmetic(std::int64_t rounds, bool, float* out) { return burn<Floats>(rounds, 1, out); }

constexpr Kernels kAvx512 = {
    .name = "avx512",
    .block_scales = block_scales,
    .search_scales = search_scales,
    .encode = encode,
    .decode = decode,
    .decode_wide = decode_wide,
    .decode_pairs = decode_pairs,
    .interleave = interleave,
    .transpose = transpose,
    .multiply = multiply_tiles<Floats>,
    .multiply_pairs = nullptr,
    .dot = dot,
    .dot_bf16 = nullptr,
    .prepare_rows = prepare_rows,
    .multiply_rows = multiply_rows,
    .add = add,
    .arithmetic = arithmetic,
    .loss_sums = loss::loss_sums,
    .loss_gradient = loss::loss_gradient<from_float>,
    .to_float = to_float,
    .from_float = from_float,
    .elementwise = &rows::Elementwise<Wide, rows::Twice<rows::Twice<Wide>>>::kKernels,
    .softmax = {.column_max = softmax512::column_max,
                .exponentials = softmax512::exponentials,
                .exponential_pairs = softmax::exponential_pairs,
                .score_gradients = softmax512::score_gradients,
                .score_gradient_pairs = softmax::score_gradient_pairs,
                .scale_columns = softmax::scale_columns},
    .adamw_8bit = adam::adamw_8bit<Wide, rows::Twice<Wide>>,
};

}  // namespace

const Kernels* avx512_kernels() { return &kAvx512; }

}  // namespace halfbyte

// AVX2 with FMA and F16C. Each function does what its namesake in portable.hpp or portable.cpp does, 8
// numbers at a time; what is missing here is portable's.
#include <immintrin.h>

#include "adamw_kernels.hpp"
#include "avx2_wide.hpp"
#include "elementwise_kernels.hpp"
#include "loss_rows.hpp"
#include "portable.hpp"
#include "softmax_rows.hpp"

namespace halfbyte {
namespace {

void to_float(const void* numbers, Type type, std::int64_t count, float* out) {
    std::int64_t i = 0;
    for (; i + 8 <= count; i += 8) _mm256_storeu_ps(out + i, load8(numbers, type, i));
    for (; i < count; ++i) out[i] = plain::load(numbers, type, i);
}

void from_float(const float* numbers, Type type, std::int64_t count, void* out) {
    std::int64_t i = 0;
    auto* words = static_cast<std::uint16_t*>(out);
    if (type == Type::f16)
        for (; i + 8 <= count; i += 8)
            _mm_storeu_si128(reinterpret_cast<__m128i*>(words + i),
                             _mm256_cvtps_ph(_mm256_loadu_ps(numbers + i), _MM_FROUND_TO_NEAREST_INT));
    if (type == Type::bf16)
        for (; i + 16 <= count; i += 16) {
            const __m256 first = _mm256_loadu_ps(numbers + i), second = _mm256_loadu_ps(numbers + i + 8);
            const __m256 nan = _mm256_or_ps(_mm256_cmp_ps(first, first, _CMP_UNORD_Q),
                                            _mm256_cmp_ps(second, second, _CMP_UNORD_Q));
            if (_mm256_movemask_ps(nan) != 0)
                for (int j = 0; j < 16; ++j) plain::store(out, type, i + j, numbers[i + j]);
            else
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(words + i), bf16_of(first, second));
        }
    for (; i < count; ++i) plain::store(out, type, i, numbers[i]);
}

void block_scales(const void* numbers, Type type, std::int64_t count, std::int64_t blocksize,
                  std::int64_t first, std::int64_t last, float* scales) {
    for (std::int64_t b = first; b < last; ++b) {
        const plain::Block block = plain::block_of(b, count, blocksize);
        if (block.end - block.begin < blocksize) {
            plain::block_scales(numbers, type, count, blocksize, b, b + 1, scales);
            continue;
        }
        __m256i largest = _mm256_setzero_si256();
        for (std::int64_t i = block.begin; i < block.end; i += 8) {
            const __m256i bits = _mm256_castps_si256(load8(numbers, type, i));
            largest = _mm256_max_epi32(largest, _mm256_and_si256(bits, _mm256_set1_epi32(0x7fffffff)));
        }
        std::uint32_t each[8], most = 0;
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(each), largest);
        for (const std::uint32_t bits : each) most = bits > most ? bits : most;
        scales[b] = plain::bits_as<float>(most);
    }
}

// A table of 16 floats looked up by the low four bits of each lane.
struct Table {
    __m256 low, high;

    explicit Table(const float* values) : low(_mm256_loadu_ps(values)), high(_mm256_loadu_ps(values + 8)) {}

    // The values of a block: each product rounded to `type` here, once per block instead of once per weight.
    Table scaled(float scale, Type type) const {
        Table table = *this;
        table.low = rounded8(_mm256_mul_ps(low, _mm256_set1_ps(scale)), type);
        table.high = rounded8(_mm256_mul_ps(high, _mm256_set1_ps(scale)), type);
        return table;
    }

    __m256 at(__m256i index) const {
        const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));  // bit 3 is the sign
        return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, index), _mm256_permutevar8x32_ps(high, index),
                                upper);
    }
};

__m256i rank8(const Codebook& codebook, __m256 x) {
    __m256i r = _mm256_setzero_si256();
    for (int t = 0; t < 15; ++t) {
        const __m256 above = _mm256_cmp_ps(x, _mm256_broadcast_ss(codebook.thresholds + t), _CMP_GT_OQ);
        r = _mm256_sub_epi32(r, _mm256_castps_si256(above));
    }
    return r;
}

void encode(const void* numbers, Type type, std::int64_t count, std::int64_t blocksize,
            const Codebook& codebook, const float* scales, std::int64_t first, std::int64_t last,
            std::uint8_t* codes) {
    const __m128i order = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codebook.order));
    for (std::int64_t b = first; b < last; ++b) {
        const plain::Block block = plain::block_of(b, count, blocksize);
        if (block.end - block.begin < blocksize) {
            plain::encode(numbers, type, count, blocksize, codebook, scales, b, b + 1, codes);
            continue;
        }
        const __m256 inv = _mm256_set1_ps(plain::inverse(scales[b]));
        for (std::int64_t i = block.begin; i < block.end; i += 16) {
            const __m256i r0 = rank8(codebook, _mm256_mul_ps(load8(numbers, type, i), inv));
            const __m256i r1 = rank8(codebook, _mm256_mul_ps(load8(numbers, type, i + 8), inv));
            const __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(r0, r1), 0xd8);
            const __m128i ranks =
                _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
            const __m128i code = _mm_shuffle_epi8(order, ranks);
            // The first of two codes counts 16, the second 1.
            const __m128i pairs = _mm_maddubs_epi16(code, _mm_set1_epi16(0x0110));
            _mm_storel_epi64(reinterpret_cast<__m128i*>(codes + i / 2), _mm_packus_epi16(pairs, pairs));
        }
    }
}

plain::Fit fit_at(const float* block, std::int64_t blocksize, const Codebook& codebook, const Table& values,
                  float scale) {
    const __m256 inv = _mm256_set1_ps(plain::inverse(scale)), scales = _mm256_set1_ps(scale);
    __m256 error = _mm256_setzero_ps(), along = error, norm = error;
    for (std::int64_t i = 0; i < blocksize; i += 8) {
        const __m256 number = _mm256_loadu_ps(block + i);
        const __m256 value = values.at(rank8(codebook, _mm256_mul_ps(number, inv)));
        const __m256 off = _mm256_fnmadd_ps(value, scales, number);
        error = _mm256_fmadd_ps(off, off, error);
        along = _mm256_fmadd_ps(number, value, along);
        norm = _mm256_fmadd_ps(value, value, norm);
    }
    const float total = sum_of(norm);
    return {sum_of(error), total > 0 ? sum_of(along) / total : scale};
}

void search_scales(const void* numbers, Type type, std::int64_t count, std::int64_t blocksize,
                   const Codebook& codebook, const Search& search, std::int64_t first, std::int64_t last,
                   float* scales) {
    const Table values(codebook.values);
    block_scales(numbers, type, count, blocksize, first, last, scales);
    float block[4096];
    for (std::int64_t b = first; b < last; ++b) {
        const plain::Block span = plain::block_of(b, count, blocksize);
        const std::int64_t size = span.end - span.begin;
        const std::int64_t element = size_of(type);
        to_float(static_cast<const char*>(numbers) + span.begin * element, type, size, block);
        // Zeros add nothing to any of the three sums: the value nearest to zero is zero.
        for (std::int64_t i = size; i < blocksize; ++i) block[i] = 0.0f;
        scales[b] = plain::search_block(scales[b], search, [&](float scale) {
            return fit_at(block, blocksize, codebook, values, scale);
        });
    }
}

// Calls `vector(element, even, odd)` for 16 elements at a time (in order: even[0], odd[0], even[1], …), with
// their values rounded to `type`, and `single(element, value)` with unrounded values for the rest.
template <class Vector, class Single>
void decode_span(const Weight& weight, std::int64_t begin, std::int64_t count, Type type, Vector&& vector,
                 Single&& single) {
    const Table codebook(weight.codebook);
    plain::for_each_block(weight, begin, count, [&](std::int64_t e, std::int64_t end, float scale) {
        if (e % 2 != 0) {
            single(e, plain::value_at(weight, e, scale));
            ++e;
        }
        const Table table = codebook.scaled(scale, type);
        for (; e + 16 <= end; e += 16) {
            const __m256i bytes =
                _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(weight.codes + e / 2)));
            vector(e, table.at(_mm256_srli_epi32(bytes, 4)), table.at(bytes));
        }
        for (; e < end; ++e) single(e, plain::value_at(weight, e, scale));
    });
}

void decode_wide(const Weight& weight, std::int64_t begin, std::int64_t count, Type type, float* out) {
    decode_span(
        weight, begin, count, type,
        [&](std::int64_t e, __m256 even, __m256 odd) {
            const __m256 low = _mm256_unpacklo_ps(even, odd), high = _mm256_unpackhi_ps(even, odd);
            _mm256_storeu_ps(out + (e - begin), _mm256_permute2f128_ps(low, high, 0x20));
            _mm256_storeu_ps(out + (e - begin) + 8, _mm256_permute2f128_ps(low, high, 0x31));
        },
        [&](std::int64_t e, float value) { out[e - begin] = plain::rounded(value, type); });
}

void decode(const Weight& weight, std::int64_t begin, std::int64_t count, Type type, void* out) {
    if (type == Type::f32) return decode_wide(weight, begin, count, type, static_cast<float*>(out));
    auto* words = static_cast<std::uint16_t*>(out);
    decode_span(
        weight, begin, count, type,
        [&](std::int64_t e, __m256 even, __m256 odd) {
            __m256i lanes;
            if (type == Type::f16) {
                const __m256i low = _mm256_cvtepu16_epi32(_mm256_cvtps_ph(even, _MM_FROUND_TO_NEAREST_INT));
                const __m256i high = _mm256_cvtepu16_epi32(_mm256_cvtps_ph(odd, _MM_FROUND_TO_NEAREST_INT));
                lanes = _mm256_or_si256(low, _mm256_slli_epi32(high, 16));
            } else {
                lanes = _mm256_blend_epi16(_mm256_srli_epi32(_mm256_castps_si256(even), 16),
                                           _mm256_castps_si256(odd), 0xaa);
            }
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(words + (e - begin)), lanes);
        },
        [&](std::int64_t e, float value) { plain::store(out, type, e - begin, value); });
}

// 8 rows of 8 lanes to 8 columns.
void transpose8(const std::uint32_t* rows, std::int64_t stride, std::uint32_t* panel) {
    __m256 r[8], t[8];
    for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_ps(reinterpret_cast<const float*>(rows + i * stride));
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
        r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
        r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
        r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
    for (int i = 0; i < 4; ++i) {
        auto* column = reinterpret_cast<float*>(panel + i * kPanel);
        _mm256_storeu_ps(column, _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
        _mm256_storeu_ps(column + 4 * kPanel, _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
    }
}

void transpose(const std::uint32_t* rows, std::int64_t stride, std::int64_t columns, std::int64_t depth,
               std::uint32_t* panel) {
    const std::int64_t whole_columns = columns / 8 * 8, whole_depth = depth / 8 * 8;
    for (std::int64_t j = 0; j < whole_columns; j += 8)
        for (std::int64_t d = 0; d < whole_depth; d += 8)
            transpose8(rows + j * stride + d, stride, panel + d * kPanel + j);
    for (std::int64_t d = 0; d < depth; ++d) {
        const std::int64_t done = d < whole_depth ? whole_columns : 0;
        for (std::int64_t j = done; j < columns; ++j) panel[d * kPanel + j] = rows[j * stride + d];
        for (std::int64_t j = columns; j < kPanel; ++j) panel[d * kPanel + j] = 0;
    }
}

// R rows by two vectors of columns.
template <int R>
void tile(const float* a, std::int64_t stride, const float* panel, std::int64_t depth, bool add,
          float* sums) {
    __m256 c[R][2];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < 2; ++v)
            c[r][v] = add ? _mm256_loadu_ps(sums + r * kPanel + 8 * v) : _mm256_setzero_ps();
    for (std::int64_t d = 0; d < depth; ++d) {
        const __m256 b0 = _mm256_loadu_ps(panel + d * kPanel), b1 = _mm256_loadu_ps(panel + d * kPanel + 8);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const __m256 factor = _mm256_broadcast_ss(a + r * stride + d);
            c[r][0] = _mm256_fmadd_ps(factor, b0, c[r][0]);
            c[r][1] = _mm256_fmadd_ps(factor, b1, c[r][1]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < 2; ++v) _mm256_storeu_ps(sums + r * kPanel + 8 * v, c[r][v]);
}

void multiply(const std::uint32_t* lanes, std::int64_t stride, std::int64_t rows,
              const std::uint32_t* panel_lanes, std::int64_t columns, std::int64_t depth, bool add,
              float* sums) {
    const auto* a = reinterpret_cast<const float*>(lanes);
    const auto* panel = reinterpret_cast<const float*>(panel_lanes);
    for (std::int64_t j = 0; j < columns; j += 16) {
        std::int64_t i = 0;
        for (; i + 6 <= rows; i += 6)
            tile<6>(a + i * stride, stride, panel + j, depth, add, sums + i * kPanel + j);
        for (; i + 2 <= rows; i += 2)
            tile<2>(a + i * stride, stride, panel + j, depth, add, sums + i * kPanel + j);
        if (i < rows) tile<1>(a + i * stride, stride, panel + j, depth, add, sums + i * kPanel + j);
    }
}

void dot(const float* w, const float* a, std::int64_t stride, int rows, std::int64_t count, float* sums) {
    for (int i = 0; i < rows; ++i) {
        const float* row = a + i * stride;
        __m256 sum0 = _mm256_setzero_ps(), sum1 = sum0;
        std::int64_t k = 0;
        for (; k + 16 <= count; k += 16) {
            sum0 = _mm256_fmadd_ps(_mm256_loadu_ps(w + k), _mm256_loadu_ps(row + k), sum0);
            sum1 = _mm256_fmadd_ps(_mm256_loadu_ps(w + k + 8), _mm256_loadu_ps(row + k + 8), sum1);
        }
        float rest = 0;
        for (; k < count; ++k) rest += w[k] * row[k];
        sums[i] += sum_of(_mm256_add_ps(sum0, sum1)) + rest;
    }
}

void multiply_rows(const Weight& weight, Type type, std::int64_t first, std::int64_t last,
                   const void* prepared, int rows, float* sums) {
    plain::multiply_rows(decode_wide, dot, weight, type, first, last, static_cast<const float*>(prepared),
                         rows, sums);
}

std::int64_t arithmetic(std::int64_t rounds, bool, float* out) {
    constexpr int kSums = 12;
    volatile float unknown[kSums + 2] = {};  // as in avx512_tile.hpp
    __m256 c[kSums];
#pragma GCC unroll 12
    for (int i = 0; i < kSums; ++i) c[i] = _mm256_set1_ps(unknown[i]);
    const __m256 a = _mm256_set1_ps(unknown[kSums]), b = _mm256_set1_ps(unknown[kSums + 1]);
    for (std::int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 12
        for (int i = 0; i < kSums; ++i) c[i] = _mm256_fmadd_ps(a, b, c[i]);
    }
    __m256 sum = c[0];
#pragma GCC unroll 12
    for (int i = 1; i < kSums; ++i) sum = _mm256_add_ps(sum, c[i]);
    *out = sum_of(sum);
    return rounds * kSums * 8 * 2;
}

}  // namespace

const Kernels* avx2_kernels() {
    static const Kernels kernels = [] {
        Kernels k = *portable_kernels();
        k.name = "avx2";
        k.block_scales = block_scales;
        k.search_scales = search_scales;
        k.encode = encode;
        k.decode = decode;
        k.decode_wide = decode_wide;
        k.transpose = transpose;
        k.multiply = multiply;
        k.dot = dot;
        k.interleave = plain::interleave;
        k.add = plain::add;
        k.multiply_rows = multiply_rows;
        k.arithmetic = arithmetic;
        k.loss_sums = loss::loss_sums;
        k.loss_gradient = loss::loss_gradient<from_float>;
        k.softmax = softmax::kSoftmax;
        k.to_float = to_float;
        k.from_float = from_float;
        k.adamw_8bit = adam::adamw_8bit<Wide, Wide>;
        k.elementwise = &rows::Elementwise<Wide, rows::Twice<Wide>>::kKernels;
        return k;
    }();
    return &kernels;
}

}  // namespace halfbyte

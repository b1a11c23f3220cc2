// NEON (AArch64). Each function does what its namesake in portable.hpp or portable.cpp does, 4 numbers at a
// time; what is missing here is portable's, which the compiler turns into NEON by itself.
#include <arm_neon.h>

#include "adamw_kernels.hpp"
#include "elementwise_kernels.hpp"
#include "loss_rows.hpp"
#include "portable.hpp"
#include "softmax_rows.hpp"

namespace halfbyte {
namespace {

// Four floats of the 16-entry table, by four indices below 16.
float32x4_t look_up(uint8x16x4_t table, uint32x4_t index) {
    // Byte b of entry i is at 4 i + b: 0x04040404 * i + 0x03020100, no carry crosses a byte.
    const uint32x4_t bytes = vmlaq_u32(vdupq_n_u32(0x03020100u), index, vdupq_n_u32(0x04040404u));
    return vreinterpretq_f32_u8(vqtbl4q_u8(table, vreinterpretq_u8_u32(bytes)));
}

// Rounds to nearest even at bit 16, leaving the low half undefined. NaN is not kept: scales are finite.
uint32x4_t round_at_16(float32x4_t numbers) {
    const uint32x4_t bits = vreinterpretq_u32_f32(numbers);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    return vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7fff)), odd);
}

float32x4_t rounded4(float32x4_t numbers, Type type) {
    if (type == Type::f32) return numbers;
    if (type == Type::f16) return vcvt_f32_f16(vcvt_f16_f32(numbers));
    return vreinterpretq_f32_u32(vandq_u32(round_at_16(numbers), vdupq_n_u32(0xffff0000u)));
}

// The 16 values of a block, each product rounded to `type` here, once per block instead of once per weight.
uint8x16x4_t scaled_table(const float* codebook, float scale, Type type) {
    uint8x16x4_t table;
    for (int i = 0; i < 4; ++i)
        table.val[i] = vreinterpretq_u8_f32(rounded4(vmulq_n_f32(vld1q_f32(codebook + 4 * i), scale), type));
    return table;
}

// Calls `vector(element, even, odd)` for 8 elements at a time (in order: even[0], odd[0], even[1], …), with
// their values rounded to `type`, and `single(element, value)` with unrounded values for the rest.
template <class Vector, class Single>
void decode_span(const Weight& weight, std::int64_t begin, std::int64_t count, Type type, Vector&& vector,
                 Single&& single) {
    plain::for_each_block(weight, begin, count, [&](std::int64_t e, std::int64_t end, float scale) {
        if (e % 2 != 0) {
            single(e, plain::value_at(weight, e, scale));
            ++e;
        }
        const uint8x16x4_t table = scaled_table(weight.codebook, scale, type);
        for (; e + 8 <= end; e += 8) {
            std::uint32_t packed;
            std::memcpy(&packed, weight.codes + e / 2, sizeof packed);
            const uint32x4_t pairs =
                vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(static_cast<std::uint64_t>(packed)))));
            vector(e, look_up(table, vshrq_n_u32(pairs, 4)),
                   look_up(table, vandq_u32(pairs, vdupq_n_u32(15))));
        }
        for (; e < end; ++e) single(e, plain::value_at(weight, e, scale));
    });
}

// The bits of bf16 in the upper halves, NaN kept.
uint32x4_t bf16_bits(float32x4_t numbers) {
    const uint32x4_t quiet = vorrq_u32(vreinterpretq_u32_f32(numbers), vdupq_n_u32(1u << 22));
    return vbslq_u32(vceqq_f32(numbers, numbers), round_at_16(numbers), quiet);
}

// 4 lanes, see vector::One.
struct Wide {
    static constexpr int kLanes = 4;
    using Mask = uint32x4_t;
    float32x4_t v;

    Wide() = default;
    Wide(float32x4_t numbers) : v(numbers) {}
    Wide(float number) : v(vdupq_n_f32(number)) {}

    template <Type type>
    static Wide load(const void* numbers, std::int64_t i) {
        if constexpr (type == Type::f32) return vld1q_f32(static_cast<const float*>(numbers) + i);
        const uint16x4_t words = vld1_u16(static_cast<const std::uint16_t*>(numbers) + i);
        if constexpr (type == Type::f16) return vcvt_f32_f16(vreinterpret_f16_u16(words));
        return vreinterpretq_f32_u32(vshll_n_u16(words, 16));
    }
    template <Type type>
    void store(void* numbers, std::int64_t i) const {
        if constexpr (type == Type::f32) return vst1q_f32(static_cast<float*>(numbers) + i, v);
        uint16x4_t words;
        if constexpr (type == Type::f16)
            words = vreinterpret_u16_f16(vcvt_f16_f32(v));
        else
            words = vshrn_n_u32(bf16_bits(v), 16);
        vst1_u16(static_cast<std::uint16_t*>(numbers) + i, words);
    }
    template <Type type>
    Wide rounded() const {
        if constexpr (type != Type::bf16) return rounded4(v, type);
        return vreinterpretq_f32_u32(vandq_u32(bf16_bits(v), vdupq_n_u32(0xffff0000u)));
    }

    friend Wide operator+(Wide a, Wide b) { return vaddq_f32(a.v, b.v); }
    friend Wide operator-(Wide a, Wide b) { return vsubq_f32(a.v, b.v); }
    friend Wide operator*(Wide a, Wide b) { return vmulq_f32(a.v, b.v); }
    friend Wide operator/(Wide a, Wide b) { return vdivq_f32(a.v, b.v); }
    friend Mask operator<(Wide a, Wide b) { return vcltq_f32(a.v, b.v); }
    friend Wide select(Mask condition, Wide yes, Wide no) { return vbslq_f32(condition, yes.v, no.v); }
    friend Wide at_least(Wide a, float limit) { return vmaxq_f32(a.v, vdupq_n_f32(limit)); }
    friend Wide at_most(Wide a, float limit) { return vminq_f32(a.v, vdupq_n_f32(limit)); }
    float total() const {
        const float32x2_t two = vadd_f32(vget_low_f32(v), vget_high_f32(v));
        return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
    }
    friend Wide magnitude(Wide a) { return vabsq_f32(a.v); }
    friend Wide larger(Wide a, Wide b) { return vmaxq_f32(a.v, b.v); }
    friend Wide smaller(Wide a, Wide b) { return vminq_f32(a.v, b.v); }
    friend Wide square_root(Wide a) { return vsqrtq_f32(a.v); }
    static bool any(Mask mask) { return vmaxvq_u32(mask) != 0; }
    static Wide lookup(const float* table, const std::uint8_t* codes, std::int64_t i) {
        const float values[4] = {table[codes[i]], table[codes[i + 1]], table[codes[i + 2]],
                                 table[codes[i + 3]]};
        return vld1q_f32(values);
    }
    using Table = const float*;
    static Table table(const float* eight) { return eight; }
    static Wide entries(Table table, Wide which) {
        std::uint32_t places[4];
        vst1q_u32(places, vcvtq_u32_f32(which.v));
        const float values[4] = {table[places[0]], table[places[1]], table[places[2]], table[places[3]]};
        return vld1q_f32(values);
    }
    void store_bytes(std::uint8_t* bytes, std::int64_t i) const {
        const uint16x4_t words = vmovn_u32(vcvtnq_u32_f32(v));
        const uint8x8_t all = vmovn_u16(vcombine_u16(words, words));
        vst1_lane_u32(reinterpret_cast<std::uint32_t*>(bytes + i), vreinterpret_u32_u8(all), 0);
    }
    friend Wide scaled(Wide a, Wide shifted, Wide) {
        const uint32x4_t biased =
            vsubq_u32(vreinterpretq_u32_f32(shifted.v), vdupq_n_u32(0x4b400000u - 254u));
        const uint32x4_t half = vshrq_n_u32(biased, 1);
        const float32x4_t first = vreinterpretq_f32_u32(vshlq_n_u32(half, 23));
        const float32x4_t second = vreinterpretq_f32_u32(vshlq_n_u32(vsubq_u32(biased, half), 23));
        return vmulq_f32(vmulq_f32(a.v, first), second);
    }
};

void decode_wide(const Weight& weight, std::int64_t begin, std::int64_t count, Type type, float* out) {
    decode_span(
        weight, begin, count, type,
        [&](std::int64_t e, float32x4_t even, float32x4_t odd) {
            vst2q_f32(out + (e - begin), (float32x4x2_t{{even, odd}}));
        },
        [&](std::int64_t e, float value) { out[e - begin] = plain::rounded(value, type); });
}

void decode(const Weight& weight, std::int64_t begin, std::int64_t count, Type type, void* out) {
    if (type == Type::f32) return decode_wide(weight, begin, count, type, static_cast<float*>(out));
    auto* words = static_cast<std::uint16_t*>(out);
    decode_span(
        weight, begin, count, type,
        [&](std::int64_t e, float32x4_t even, float32x4_t odd) {
            if (type == Type::f16)
                vst2_u16(words + (e - begin), (uint16x4x2_t{{vreinterpret_u16_f16(vcvt_f16_f32(even)),
                                                             vreinterpret_u16_f16(vcvt_f16_f32(odd))}}));
            else
                vst2_u16(words + (e - begin), (uint16x4x2_t{{vshrn_n_u32(vreinterpretq_u32_f32(even), 16),
                                                             vshrn_n_u32(vreinterpretq_u32_f32(odd), 16)}}));
        },
        [&](std::int64_t e, float value) { plain::store(out, type, e - begin, value); });
}

// R rows by four vectors of columns.
template <int R>
void tile(const float* a, std::int64_t stride, const float* panel, std::int64_t depth, bool add,
          float* sums) {
    float32x4_t c[R][4];
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < 4; ++v) c[r][v] = add ? vld1q_f32(sums + r * kPanel + 4 * v) : vdupq_n_f32(0);
    for (std::int64_t d = 0; d < depth; ++d) {
        float32x4_t b[4];
        for (int v = 0; v < 4; ++v) b[v] = vld1q_f32(panel + d * kPanel + 4 * v);
        for (int r = 0; r < R; ++r)
            for (int v = 0; v < 4; ++v) c[r][v] = vfmaq_n_f32(c[r][v], b[v], a[r * stride + d]);
    }
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < 4; ++v) vst1q_f32(sums + r * kPanel + 4 * v, c[r][v]);
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
        for (; i < rows; ++i) tile<1>(a + i * stride, stride, panel + j, depth, add, sums + i * kPanel + j);
    }
}

void dot(const float* w, const float* a, std::int64_t stride, int rows, std::int64_t count, float* sums) {
    for (int i = 0; i < rows; ++i) {
        const float* row = a + i * stride;
        float32x4_t sum[4] = {vdupq_n_f32(0), vdupq_n_f32(0), vdupq_n_f32(0), vdupq_n_f32(0)};
        std::int64_t k = 0;
        for (; k + 16 <= count; k += 16)
            for (int v = 0; v < 4; ++v)
                sum[v] = vfmaq_f32(sum[v], vld1q_f32(w + k + 4 * v), vld1q_f32(row + k + 4 * v));
        float rest = 0;
        for (; k < count; ++k) rest += w[k] * row[k];
        sums[i] += vaddvq_f32(vaddq_f32(vaddq_f32(sum[0], sum[1]), vaddq_f32(sum[2], sum[3]))) + rest;
    }
}

void multiply_rows(const Weight& weight, Type type, std::int64_t first, std::int64_t last,
                   const void* prepared, int rows, float* sums) {
    plain::multiply_rows(decode_wide, dot, weight, type, first, last, static_cast<const float*>(prepared),
                         rows, sums);
}

std::int64_t arithmetic(std::int64_t rounds, bool, float* out) {
    constexpr int kSums = 24;
    volatile float unknown[kSums + 2] = {};  // the compiler may neither join equal sums nor leave rounds out
    float32x4_t c[kSums];
    for (int i = 0; i < kSums; ++i) c[i] = vdupq_n_f32(unknown[i]);
    const float32x4_t a = vdupq_n_f32(unknown[kSums]), b = vdupq_n_f32(unknown[kSums + 1]);
    for (std::int64_t round = 0; round < rounds; ++round)
        for (float32x4_t& sum : c) sum = vfmaq_f32(sum, a, b);
    float32x4_t sum = c[0];
    for (int i = 1; i < kSums; ++i) sum = vaddq_f32(sum, c[i]);
    *out = vaddvq_f32(sum);
    return rounds * kSums * 4 * 2;
}

}  // namespace

const Kernels* neon_kernels() {
    static const Kernels kernels = [] {
        Kernels k = *portable_kernels();
        k.name = "neon";
        k.decode = decode;
        k.decode_wide = decode_wide;
        k.multiply = multiply;
        k.dot = dot;
        k.decode_pairs = plain::decode_pairs;
        k.interleave = plain::interleave;
        k.add = plain::add;
        k.multiply_rows = multiply_rows;
        k.arithmetic = arithmetic;
        k.adamw_8bit = adam::adamw_8bit<Wide, rows::Twice<Wide>>;
        k.elementwise = &rows::Elementwise<Wide, rows::Twice<rows::Twice<Wide>>>::kKernels;
        k.loss_sums = loss::loss_sums;
        k.loss_gradient = loss::loss_gradient<plain::from_float>;
        k.softmax = softmax::kSoftmax;
        return k;
    }();
    return &kernels;
}

}  // namespace halfbyte

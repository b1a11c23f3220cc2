// `Kernels::adamw_8bit`, once for all instruction sets: W is the vector of the file that includes this, see
// `vector::One`. Everything is in an unnamed namespace, see kernels.hpp.
#pragma once

#include <algorithm>
#include <cfloat>

#include "adamw.hpp"
#include "row_loops.hpp"

namespace halfbyte {
namespace {
namespace adam {

template <class W>
inline float largest(const float* numbers) {
    W most = 0.0f;
    for (std::int64_t i = 0; i < kStateBlock; i += W::kLanes) {
        const W size = magnitude(W::template load<Type::f32>(numbers, i));
        most = select(most < size, size, most);
    }
    float lanes[W::kLanes];
    most.template store<Type::f32>(lanes, 0);
    return *std::max_element(lanes, lanes + W::kLanes);
}

inline float reciprocal(float scale) { return scale < FLT_MIN ? 0.0f : 1.0f / scale; }

// The index of a magnitude, told from all thresholds, beginning with one that is nearly right.
inline float index_of(const DynamicMap& map, float x, float guess) {
    int index = static_cast<int>(guess);
    while (index > 0 && !(map.thresholds[index - 1] < x)) --index;
    while (index < map.last && map.thresholds[index] < x) ++index;
    return static_cast<float>(index);
}

// Indices of magnitudes.
//
// Adding 1.5·2^23 rounds to an integer. The line of a piece and the roundings on the way are off by less than
// 2^-13 of an index, tests/kernels/test_adamw.py holds every threshold and its neighbours against this.
template <class W>
inline W indices(const DynamicMap& map, W x) {
    constexpr float kInteger = 12582912.0f, kSure = 0.5f - 1.0f / 2048.0f;
    const auto upper = W(map.end[3]) < x;
    const auto third = select(upper, W(map.end[5]), W(map.end[1])) < x;
    W piece = select(upper, W(4.0f), W(0.0f)) + select(third, W(2.0f), W(0.0f));
    piece = piece + select(W::entries(map.end, piece) < x, W(1.0f), W(0.0f));
    const W most = W::entries(map.most, piece);
    W place = x * W::entries(map.slope, piece) + W::entries(map.shift, piece);
    place = select(most < place, most, place);
    W index = (place + W(kInteger)) - W(kInteger);
    if (W::any(W(kSure) < magnitude(place - index))) {
        float numbers[W::kLanes], guesses[W::kLanes];
        x.template store<Type::f32>(numbers, 0);
        index.template store<Type::f32>(guesses, 0);
        for (int lane = 0; lane < W::kLanes; ++lane)
            guesses[lane] = index_of(map, numbers[lane], guesses[lane]);
        index = W::template load<Type::f32>(guesses, 0);
    }
    return select(W(map.thresholds[map.last - 1]) < x, W(static_cast<float>(map.last)), index);
}

// Codes of a block of m: 0 lies at kZero, the negative magnitudes below it. On a threshold a number has the
// lower code, which for a negative one is the larger magnitude: the next float lies beyond. x + kNext · x is
// that float, for kNext · x is between 0.6 and 1.3 of the distance to it.
constexpr float kNext = 0x1.4p-24f;

template <class W>
inline void encode_signed(const DynamicMap& map, const float* numbers, float scale, std::uint8_t* codes) {
    const W factor = reciprocal(scale);
    for (std::int64_t i = 0; i < kStateBlock; i += W::kLanes) {
        const W x = W::template load<Type::f32>(numbers, i) * factor;
        const auto negative = x < W(0.0f);
        const W size = magnitude(x);
        const W index = indices(map, select(negative, size + size * kNext, size));
        const W below = W(float{kZero}) - at_most(index, kZero);
        select(negative, below, W(float{kZero}) + index).store_bytes(codes, i);
    }
}

template <class W>
inline void encode_unsigned(const DynamicMap& map, const float* numbers, float scale, std::uint8_t* codes) {
    const W factor = reciprocal(scale);
    for (std::int64_t i = 0; i < kStateBlock; i += W::kLanes)
        indices(map, W::template load<Type::f32>(numbers, i) * factor).store_bytes(codes, i);
}

// Whole blocks, of which the arrays may be copies; `scale` are the two scales.
template <class W>
inline void block(const AdamStep& s, float* p, const float* g, std::uint8_t* m_codes, std::uint8_t* v_codes,
                  float* m_scale, float* v_scale) {
    alignas(64) float m[kStateBlock], v[kStateBlock];
    const W m_old = *m_scale, v_old = *v_scale;
    for (std::int64_t i = 0; i < kStateBlock; i += W::kLanes) {
        const W value = W::lookup(s.m_values, m_codes, i) * m_old;
        const W gradient = W::template load<Type::f32>(g, i);
        (value * W(s.beta1) + gradient * W(s.m_share)).template store<Type::f32>(m, i);
    }
    for (std::int64_t i = 0; i < kStateBlock; i += W::kLanes) {
        const W value = W::lookup(s.v_values, v_codes, i) * v_old;
        const W gradient = W::template load<Type::f32>(g, i);
        (value * W(s.beta2) + gradient * W(s.v_share) * gradient).template store<Type::f32>(v, i);
    }
    for (std::int64_t i = 0; i < kStateBlock; i += W::kLanes) {
        const W size = square_root(W::template load<Type::f32>(v, i)) + W(s.eps);
        const W move = W::template load<Type::f32>(m, i) / size;
        (W::template load<Type::f32>(p, i) * W(s.decay) + move * W(s.step)).template store<Type::f32>(p, i);
    }
    *m_scale = largest<W>(m);
    *v_scale = largest<W>(v);
    encode_signed<W>(s.m_map, m, *m_scale, m_codes);
    encode_unsigned<W>(s.v_map, v, *v_scale, v_codes);
}

// The last block where it is not whole: zeros behind it change neither scale nor codes.
template <class W>
inline void rest(const AdamStep& s, std::int64_t at, std::int64_t count) {
    float p[kStateBlock] = {}, g[kStateBlock] = {};
    std::uint8_t m[kStateBlock] = {}, v[kStateBlock] = {};
    std::fill_n(m, kStateBlock, static_cast<std::uint8_t>(kZero));
    std::copy_n(s.p + at, count, p);
    std::copy_n(s.g + at, count, g);
    std::copy_n(s.m + at, count, m);
    std::copy_n(s.v + at, count, v);
    block<W>(s, p, g, m, v, s.m_scale + at / kStateBlock, s.v_scale + at / kStateBlock);
    std::copy_n(p, count, s.p + at);
    std::copy_n(m, count, s.m + at);
    std::copy_n(v, count, s.v + at);
}

template <class W>
void adamw_8bit(const AdamStep& s, std::int64_t first, std::int64_t last) {
    for (std::int64_t b = first; b < last; ++b) {
        const std::int64_t at = b * kStateBlock, count = std::min(kStateBlock, s.count - at);
        if (count < kStateBlock)
            rest<W>(s, at, count);
        else
            block<W>(s, s.p + at, s.g + at, s.m + at, s.v + at, s.m_scale + b, s.v_scale + b);
    }
}

}  // namespace adam
}  // namespace
}  // namespace halfbyte

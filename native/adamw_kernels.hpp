// `Kernels::adamw_8bit`, once for all instruction sets: W is the vector of the file that includes this, see
// `vector::One`. Everything is in an unnamed namespace, see kernels.hpp.
#pragma once

#include <cfloat>
#include <cstring>

#include "adamw.hpp"
#include "row_loops.hpp"

namespace halfbyte {
namespace {
namespace adam {

template <class W>
inline float largest(W sizes) {
    float lanes[W::kLanes];
    sizes.template store<Type::f32>(lanes, 0);
    float most = lanes[0];
    for (const float lane : lanes) most = most < lane ? lane : most;
    return most;
}

inline float reciprocal(float scale) { return scale < FLT_MIN ? 0.0f : 1.0f / scale; }

// The index of a magnitude, told from all thresholds, beginning with one that is nearly right.
inline float index_of(const DynamicMap& map, float x, float guess) {
    int index = static_cast<int>(guess);
    while (index > 0 && !(map.thresholds[index - 1] < x)) --index;
    while (index < map.last && map.thresholds[index] < x) ++index;
    return static_cast<float>(index);
}

// Indices near the middle between two are told from the thresholds. The line of a piece and the roundings on
// the way are off by less than 2^-14 of an index; tests/kernels/test_adamw.py asks for every threshold and
// its neighbours.
template <class W>
inline W settled(const DynamicMap& map, W x, W place, W index) {
    constexpr float kSure = 0.5f - 1.0f / 4096.0f;
    const W off = magnitude(place - index);
    if (!W::any(W(kSure) < off)) return index;
    float numbers[W::kLanes], guesses[W::kLanes], offs[W::kLanes];
    x.template store<Type::f32>(numbers, 0);
    index.template store<Type::f32>(guesses, 0);
    off.template store<Type::f32>(offs, 0);
    for (int lane = 0; lane < W::kLanes; ++lane)
        if (kSure < offs[lane]) guesses[lane] = index_of(map, numbers[lane], guesses[lane]);
    return W::template load<Type::f32>(guesses, 0);
}

template <class W>
inline rows::Twice<W> settled(const DynamicMap& map, rows::Twice<W> x, rows::Twice<W> place,
                              rows::Twice<W> index) {
    return {settled(map, x.a, place.a, index.a), settled(map, x.b, place.b, index.b)};
}

// A map in registers.
template <class W>
struct Indices {
    const DynamicMap& map;
    typename W::Table end, slope, shift, most;
    W ends[3], last_threshold, last;

    explicit Indices(const DynamicMap& m)
        : map(m),
          end(W::table(m.end)),
          slope(W::table(m.slope)),
          shift(W::table(m.shift)),
          most(W::table(m.most)),
          ends{m.end[1], m.end[3], m.end[5]},
          last_threshold(m.thresholds[m.last - 1]),
          last(static_cast<float>(m.last)) {}

    // Indices of magnitudes. Adding 1.5·2^23 rounds to an integer.
    W of(W x) const {
        const W integer = 12582912.0f;
        const auto upper = ends[1] < x;
        const auto third = select(upper, ends[2], ends[0]) < x;
        W piece = select(upper, W(4.0f), W(0.0f)) + select(third, W(2.0f), W(0.0f));
        piece = piece + select(W::entries(end, piece) < x, W(1.0f), W(0.0f));
        const W place =
            smaller(x * W::entries(slope, piece) + W::entries(shift, piece), W::entries(most, piece));
        const W index = settled(map, x, place, (place + integer) - integer);
        return select(last_threshold < x, last, index);
    }
};

// Codes of a block of m: 0 lies at kZero, the negative magnitudes below it. On a threshold a number has the
// lower code, which for a negative one is the larger magnitude: the next float lies beyond. x + kNext · x is
// that float, for kNext · x is between 0.6 and 1.3 of the distance to it.
constexpr float kNext = 0x1.4p-24f;

template <class W>
inline void encode_signed(const DynamicMap& map, const float* numbers, float scale, std::uint8_t* codes) {
    const W factor = reciprocal(scale);
    const Indices<W> indices(map);
    for (std::int64_t i = 0; i < kStateBlock; i += W::kLanes) {
        const W x = W::template load<Type::f32>(numbers, i) * factor;
        const auto negative = x < W(0.0f);
        const W size = magnitude(x);
        const W index = indices.of(select(negative, size + size * kNext, size));
        const W below = W(float{kZero}) - at_most(index, kZero);
        select(negative, below, W(float{kZero}) + index).store_bytes(codes, i);
    }
}

// `beside` is called for each place that is encoded: roots and quotients, which keep no other unit waiting.
template <class W, class Beside>
inline void encode_unsigned(const DynamicMap& map, const float* numbers, float scale, std::uint8_t* codes,
                            const Beside& beside) {
    const W factor = reciprocal(scale);
    const Indices<W> indices(map);
    for (std::int64_t i = 0; i < kStateBlock; i += W::kLanes) {
        beside(i);
        indices.of(W::template load<Type::f32>(numbers, i) * factor).store_bytes(codes, i);
    }
}

// A whole block, whose arrays may be copies. Many is several of W, for the loops that are one long chain of
// dependent operations.
template <class W, class Many>
inline void block(const AdamStep& s, float* p, const float* g, std::uint8_t* m_codes, std::uint8_t* v_codes,
                  float* m_scale, float* v_scale) {
    alignas(64) float m[kStateBlock], v[kStateBlock];
    const W m_old = *m_scale, v_old = *v_scale;
    W m_most = 0.0f, v_most = 0.0f;
    for (std::int64_t i = 0; i < kStateBlock; i += W::kLanes) {
        const W gradient = W::template load<Type::f32>(g, i);
        const W average = W::lookup(s.m_values, m_codes, i) * m_old * W(s.beta1) + gradient * W(s.m_share);
        const W squares =
            W::lookup(s.v_values, v_codes, i) * v_old * W(s.beta2) + gradient * W(s.v_share) * gradient;
        average.template store<Type::f32>(m, i);
        squares.template store<Type::f32>(v, i);
        m_most = larger(m_most, magnitude(average));
        v_most = larger(v_most, squares);
    }
    *m_scale = largest(m_most);
    *v_scale = largest(v_most);
    encode_signed<Many>(s.m_map, m, *m_scale, m_codes);
    encode_unsigned<Many>(s.v_map, v, *v_scale, v_codes, [&](std::int64_t i) {
        const Many move = Many::template load<Type::f32>(m, i) /
                          (square_root(Many::template load<Type::f32>(v, i)) + Many(s.eps));
        (Many::template load<Type::f32>(p, i) * Many(s.decay) + move * Many(s.step))
            .template store<Type::f32>(p, i);
    });
}

// The last block where it is not whole: zeros behind it change neither scale nor codes.
template <class W, class Many>
inline void rest(const AdamStep& s, std::int64_t at, std::int64_t count) {
    float p[kStateBlock] = {}, g[kStateBlock] = {};
    std::uint8_t m[kStateBlock], v[kStateBlock] = {};
    std::memset(m, kZero, sizeof m);
    const auto codes = static_cast<std::size_t>(count), floats = codes * sizeof(float);
    std::memcpy(p, s.p + at, floats);
    std::memcpy(g, s.g + at, floats);
    std::memcpy(m, s.m + at, codes);
    std::memcpy(v, s.v + at, codes);
    block<W, Many>(s, p, g, m, v, s.m_scale + at / kStateBlock, s.v_scale + at / kStateBlock);
    std::memcpy(s.p + at, p, floats);
    std::memcpy(s.m + at, m, codes);
    std::memcpy(s.v + at, v, codes);
}

template <class W, class Many>
void adamw_8bit(const AdamStep& s, std::int64_t first, std::int64_t last) {
    for (std::int64_t b = first; b < last; ++b) {
        const std::int64_t at = b * kStateBlock, left = s.count - at;
        if (left < kStateBlock)
            rest<W, Many>(s, at, left);
        else
            block<W, Many>(s, s.p + at, s.g + at, s.m + at, s.v + at, s.m_scale + b, s.v_scale + b);
    }
}

}  // namespace adam
}  // namespace
}  // namespace halfbyte

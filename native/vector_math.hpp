// Functions of floats as plain arithmetic without branches or calls, for one number or for a vector of them.
// F is any type with the operators + - * / and those listed at `One`; each instruction set has one of its
// own. Everything is in an unnamed namespace, see kernels.hpp; nothing is fused and every choice is a select,
// so all instruction sets get the same bits. NaN stays NaN; infinities give the limit.
//
// The polynomials are minimax (Remez exchange at 40 digits, then rounded to float); the error of each whole
// function is measured by tests/native/vector_math.cpp against double precision. u is 2^-24, half a unit in
// the last place of a number just above 1.
#pragma once

#include <math.h>

#include <cstdint>

#include "portable.hpp"

namespace halfbyte {
namespace {
namespace vector {

// A vector of one lane: the operations that a wider one must have, in the words of scalars.
struct One {
    static constexpr int kLanes = 1;
    using Mask = bool;
    float v;

    One() = default;
    One(float number) : v(number) {}  // the same number in every lane

    template <Type type>
    static One load(const void* numbers, std::int64_t i) {
        return plain::load(numbers, type, i);
    }
    // Rounds to nearest even.
    template <Type type>
    void store(void* numbers, std::int64_t i) const {
        plain::store(numbers, type, i, v);
    }
    template <Type type>
    One rounded() const {
        return plain::rounded(v, type);
    }

    // The lanes folded in halves: 0 with n / 2, 1 with n / 2 + 1, …
    float total() const { return v; }

    friend One operator+(One a, One b) { return a.v + b.v; }
    friend One operator-(One a, One b) { return a.v - b.v; }
    friend One operator*(One a, One b) { return a.v * b.v; }
    friend One operator/(One a, One b) { return a.v / b.v; }
    friend bool operator<(One a, One b) { return a.v < b.v; }
    friend One select(bool condition, One yes, One no) { return condition ? yes : no; }
    // NaN stays NaN; the limit is a number.
    friend One at_least(One a, float limit) { return a.v < limit ? limit : a.v; }
    friend One at_most(One a, float limit) { return a.v > limit ? limit : a.v; }
    friend One larger(One a, One b) { return a.v < b.v ? b.v : a.v; }
    friend One smaller(One a, One b) { return b.v < a.v ? b.v : a.v; }
    friend One square_root(One a) { return sqrtf(a.v); }
    static bool any(bool condition) { return condition; }
    // Entries of a table, by codes i, i + 1, …
    static One lookup(const float* table, const std::uint8_t* codes, std::int64_t i) {
        return table[codes[i]];
    }
    // Entries of a table of 8, by whole numbers.
    using Table = const float*;
    static Table table(const float* eight) { return eight; }
    static One entries(Table table, One which) { return table[static_cast<int>(which.v)]; }
    // Whole numbers from 0 to 255.
    void store_bytes(std::uint8_t* bytes, std::int64_t i) const { bytes[i] = static_cast<std::uint8_t>(v); }
    friend One magnitude(One a) {
        return plain::bits_as<float>(plain::bits_as<std::uint32_t>(a.v) & 0x7fffffffu);
    }
    // a · 2^n rounded once, for 0.5 < a < 2 and -152 < n < 130, where `shifted` is n + 1.5·2^23. In two
    // factors, so that the result may be subnormal or infinite.
    friend One scaled(One a, One shifted, One) {
        const std::uint32_t biased = plain::bits_as<std::uint32_t>(shifted.v) - 0x4b400000u + 2u * 127u;
        const std::uint32_t half = biased >> 1;
        return a.v * plain::bits_as<float>(half << 23) * plain::bits_as<float>((biased - half) << 23);
    }
};

// e^x to 1.5 u, subnormal results to one spacing of theirs.
//
// x = n ln 2 + r with |r| <= ln(2)/2; e^r = 1 + r + r² P(r), P to 2^-28. Adding 1.5·2^23 rounds to an integer
// and leaves it in the low bits, without a conversion that NaN would make undefined. ln 2 is subtracted in
// two parts; n times the first is exact.
template <class F>
inline F exp(F x) {
    constexpr float kInteger = 12582912.0f;
    x = at_least(x, -104.0f);  // e^-104 is below half the smallest subnormal number
    x = at_most(x, 89.0f);     // e^89 is infinity
    const F shifted = x * 1.44269504f + kInteger;
    const F n = shifted - kInteger;
    const F r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
    F p = 1.381454e-3f;
    p = p * r + 8.368745e-3f;
    p = p * r + 4.166839e-2f;
    p = p * r + 0.16666521f;
    p = p * r + 0.49999994f;
    p = p * (r * r) + r;
    return scaled(p + 1.0f, shifted, n);
}

// 1 / (1 + e^-x) to 3 u, relative also where it is near 0: neither side cancels.
template <class F>
inline F sigmoid(F x) {
    const F z = exp(F(0.0f) - magnitude(x));
    return select(x < F(0.0f), z, F(1.0f)) / (z + 1.0f);
}

// tanh x to 2.5 u. Below 0.625 an odd polynomial to 2^-27.
template <class F>
inline F tanh(F x) {
    const F size = magnitude(x), square = x * x;
    F p = -5.704987e-3f;
    p = p * square + 2.0639088e-2f;
    p = p * square + -5.3739715e-2f;
    p = p * square + 0.13331442f;
    p = p * square + -0.3333328f;
    const F near = p * square * x + x;
    const F far = F(1.0f) - F(2.0f) / (exp(size + size) + 1.0f);
    return select(size < F(0.625f), near, select(x < F(0.0f), F(0.0f) - far, far));
}

// The standard normal distribution: F(x) = (1 + erf(x / √2)) / 2 and its density.
template <class F>
struct Normal {
    F cumulative, density;
};

// F to (9 + x²) u and the density to (2 + x²) u, relative also where they are near 0: rounding x² costs x² u.
//
// F(-a) = e^(-a²/2) t Q(t) with t = 1 / (1 + 0.27 a) and Q to 2^-25 for 0 <= a <= 14.5; beyond, the
// exponential is 0.
template <class F>
inline Normal<F> normal(F x) {
    const F bell = exp(x * x * -0.5f);
    const F t = F(1.0f) / (magnitude(x) * 0.27f + 1.0f);
    F q = 2.8961094e-2f;
    q = q * t + -0.12648581f;
    q = q * t + 0.16978602f;
    q = q * t + -6.921062e-2f;
    q = q * t + 0.10782553f;
    q = q * t + 7.2049655e-2f;
    q = q * t + 0.101810604f;
    q = q * t + 0.10754288f;
    q = q * t + 0.10772066f;
    const F tail = bell * (t * q);
    return {select(x < F(0.0f), tail, F(1.0f) - tail), bell * 0.3989423f};
}

// The same for a number by itself.
[[maybe_unused]] inline float exp(float x) { return exp(One(x)).v; }
[[maybe_unused]] inline float sigmoid(float x) { return sigmoid(One(x)).v; }
[[maybe_unused]] inline float tanh(float x) { return tanh(One(x)).v; }

}  // namespace vector
}  // namespace
}  // namespace halfbyte

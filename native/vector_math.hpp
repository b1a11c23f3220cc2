// Functions of one float as plain arithmetic without branches or calls, so that a loop over them becomes
// vectors of any width. Everything is in an unnamed namespace, see kernels.hpp; nothing is fused and every
// choice is a select, so all instruction sets get the same bits. NaN stays NaN; infinities give the limit.
//
// The polynomials are minimax (Remez exchange at 40 digits, then rounded to float); the error of each whole
// function is measured by tests/native/vector_math.cpp against double precision. u is 2^-24, half a unit in
// the last place of a number just above 1.
#pragma once

#include <cstdint>

#include "portable.hpp"

namespace halfbyte {
namespace {
namespace vector {

// e^x to 1.5 u, subnormal results to one spacing of theirs.
//
// x = n ln 2 + r with |r| <= ln(2)/2; e^r = 1 + r + r² P(r), P to 2^-28. Adding 1.5·2^23 rounds to an integer
// and leaves it in the low bits, without a conversion that NaN would make undefined. ln 2 is subtracted in
// two parts; n times the first is exact. 2^n is multiplied on as two factors, so that it may be subnormal or
// infinite.
[[maybe_unused]] inline float exp(float x) {
    constexpr float kInteger = 12582912.0f;
    x = x < -104.0f ? -104.0f : x;  // e^-104 is below half the smallest subnormal number
    x = x > 89.0f ? 89.0f : x;      // e^89 is infinity
    const float shifted = x * 1.44269504f + kInteger;
    const float n = shifted - kInteger;
    const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
    float p = 1.381454e-3f;
    p = p * r + 8.368745e-3f;
    p = p * r + 4.166839e-2f;
    p = p * r + 0.16666521f;
    p = p * r + 0.49999994f;
    p = p * (r * r) + r;
    const std::uint32_t biased = plain::bits_as<std::uint32_t>(shifted) - 0x4b400000u + 2u * 127u;  // n + 254
    const std::uint32_t half = biased >> 1;
    const float first = plain::bits_as<float>(half << 23),
                second = plain::bits_as<float>((biased - half) << 23);
    return (1.0f + p) * first * second;
}

// 1 / (1 + e^-x) to 3 u, relative also where it is near 0: neither side cancels.
[[maybe_unused]] inline float sigmoid(float x) {
    const float z = exp(x < 0.0f ? x : -x);
    return (x < 0.0f ? z : 1.0f) / (1.0f + z);
}

// tanh x to 2.5 u. Below 0.625 an odd polynomial to 2^-27.
[[maybe_unused]] inline float tanh(float x) {
    const float magnitude = x < 0.0f ? -x : x, square = x * x;
    float p = -5.704987e-3f;
    p = p * square + 2.0639088e-2f;
    p = p * square + -5.3739715e-2f;
    p = p * square + 0.13331442f;
    p = p * square + -0.3333328f;
    const float near = p * square * x + x;
    const float far = 1.0f - 2.0f / (exp(2.0f * magnitude) + 1.0f);
    return magnitude < 0.625f ? near : (x < 0.0f ? -far : far);
}

// The standard normal distribution: F(x) = (1 + erf(x / √2)) / 2 and its density.
struct Normal {
    float cumulative, density;
};

// F to (9 + x²) u and the density to (2 + x²) u, relative also where they are near 0: rounding x² costs x² u.
//
// F(-a) = e^(-a²/2) t Q(t) with t = 1 / (1 + 0.27 a) and Q to 2^-25 for 0 <= a <= 14.5; beyond, the
// exponential is 0.
[[maybe_unused]] inline Normal normal(float x) {
    const float magnitude = x < 0.0f ? -x : x;
    const float bell = exp(-0.5f * (x * x));
    const float t = 1.0f / (1.0f + 0.27f * magnitude);
    float q = 2.8961094e-2f;
    q = q * t + -0.12648581f;
    q = q * t + 0.16978602f;
    q = q * t + -6.921062e-2f;
    q = q * t + 0.10782553f;
    q = q * t + 7.2049655e-2f;
    q = q * t + 0.101810604f;
    q = q * t + 0.10754288f;
    q = q * t + 0.10772066f;
    const float tail = bell * (t * q);
    return {x < 0.0f ? tail : 1.0f - tail, bell * 0.3989423f};
}

}  // namespace vector
}  // namespace
}  // namespace halfbyte

// The functions of `SoftmaxKernels` as loops that the compiler turns into vectors, once for each instruction
// set (see portable.hpp). All of them walk along rows: no sum or maximum crosses the lanes of a vector, so
// that the width of a vector does not show in the numbers.
#pragma once

#include "portable.hpp"

namespace halfbyte {
namespace {
namespace softmax {

// a * b + c, rounded once where the instruction set can, else twice.
[[maybe_unused]] inline float fused(float a, float b, float c) {
#if defined(__FMA__) || defined(__aarch64__)
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;
#endif
}

// 2^x with a relative error below 2^-22, and 0 below the smallest normal number; x < 127.
//
// x = n + f with n whole and |f| <= 1/2. Adding 1.5 * 2^23 + 127 leaves n + 127 in the low bits of the sum
// (its unit in the last place is 1); shifted by 23 they are 2^n. 2^f is a polynomial that is 1 at 0, fitted
// for the least largest relative error: 2^-23.1 with coefficients rounded to float. The rounding of its last
// step adds at most 2^-24 of a value that is at least 0.7, those before it less than 2^-25: together 2^-22.3,
// which is also the largest error found over every float of [-1/2, 1/2].
[[maybe_unused]] inline float exp2(float x) {
    constexpr float kWhole = 12582912.0f + 127.0f;
    const float sum = x + kWhole;
    const float f = x - (sum - kWhole);
    float power = 0x1.5bba14p-10f;
    power = fused(power, f, 0x1.3cea88p-7f);
    power = fused(power, f, 0x1.c6b752p-5f);
    power = fused(power, f, 0x1.ebf9bcp-3f);
    power = fused(power, f, 0x1.62e42ap-1f);
    power = fused(power, f, 1.0f);
    const float scaled = power * plain::bits_as<float>(plain::bits_as<std::uint32_t>(sum) << 23);
    // A mask, not a condition: compilers make a branch of one whose other side is a constant.
    const std::uint32_t counts = 0u - static_cast<std::uint32_t>(!(x < -126.0f));
    return plain::bits_as<float>(plain::bits_as<std::uint32_t>(scaled) & counts);
}

// Rounds to bf16 in the high half, nearest even, leaving the low half undefined. A NaN stays one: those made
// by arithmetic and by widening bf16 have zeros in the low half, so that no carry reaches the sign.
[[maybe_unused]] inline std::uint32_t round_at_16(float number) {
    const std::uint32_t bits = plain::bits_as<std::uint32_t>(number);
    return bits + 0x7fffu + ((bits >> 16) & 1u);
}

[[maybe_unused]] inline std::uint32_t pair_of(float first, float second) {
    return (round_at_16(first) >> 16) | (round_at_16(second) & 0xffff0000u);
}

[[maybe_unused]] void column_max(const float* __restrict scores, std::int64_t rows, std::int64_t columns,
                                 float scale, float* __restrict most) {
    for (std::int64_t i = 0; i < rows; ++i, scores += kPanel)
        for (std::int64_t j = 0; j < columns; ++j) {
            const float score = scores[j] * scale;
            most[j] = score > most[j] ? score : most[j];
        }
}

[[maybe_unused]] void exponentials(float* __restrict scores, std::int64_t rows, std::int64_t columns,
                                   float scale, const float* __restrict shift, float* __restrict sums) {
    for (std::int64_t i = 0; i < rows; ++i, scores += kPanel)
        for (std::int64_t j = 0; j < columns; ++j) {
            const float weight = exp2(fused(scores[j], scale, -shift[j]));
            scores[j] = weight;
            sums[j] += weight;
        }
}

[[maybe_unused]] void exponential_pairs(const float* __restrict scores, std::int64_t rows,
                                        std::int64_t columns, float scale, const float* __restrict shift,
                                        float* __restrict sums, std::uint32_t* __restrict panel) {
    std::int64_t i = 0;
    for (; i + 2 <= rows; i += 2, scores += 2 * kPanel, panel += kPanel)
        for (std::int64_t j = 0; j < columns; ++j) {
            const float first = exp2(fused(scores[j], scale, -shift[j]));
            const float second = exp2(fused(scores[j + kPanel], scale, -shift[j]));
            sums[j] += first + second;
            panel[j] = pair_of(first, second);
        }
    if (i < rows)
        for (std::int64_t j = 0; j < columns; ++j) {
            const float last = exp2(fused(scores[j], scale, -shift[j]));
            sums[j] += last;
            panel[j] = pair_of(last, 0.0f);
        }
}

[[maybe_unused]] void score_gradients(float* __restrict scores, float* __restrict grads, std::int64_t rows,
                                      std::int64_t columns, float scale, const float* __restrict shift,
                                      const float* __restrict delta) {
    for (std::int64_t i = 0; i < rows; ++i, scores += kPanel, grads += kPanel)
        for (std::int64_t j = 0; j < columns; ++j) {
            const float weight = exp2(fused(scores[j], scale, -shift[j]));
            scores[j] = weight;
            grads[j] = weight * (grads[j] - delta[j]);
        }
}

[[maybe_unused]] void score_gradient_pairs(const float* __restrict scores, const float* __restrict grads,
                                           std::int64_t rows, std::int64_t columns, float scale,
                                           const float* __restrict shift, const float* __restrict delta,
                                           std::uint16_t* __restrict weights,
                                           std::uint16_t* __restrict score_grads,
                                           std::uint32_t* __restrict panel) {
    for (std::int64_t i = 0; i < rows; i += 2, panel += kPanel) {
        const bool paired = i + 1 < rows;
        const float* second_scores = paired ? scores + kPanel : scores;
        const float* second_grads = paired ? grads + kPanel : grads;
        const std::uint32_t kept = paired ? 0xffff0000u : 0u;
        for (std::int64_t j = 0; j < columns; ++j) {
            const float first = exp2(fused(scores[j], scale, -shift[j]));
            const float second = exp2(fused(second_scores[j], scale, -shift[j]));
            const std::uint32_t first_grad = round_at_16(first * (grads[j] - delta[j])) >> 16;
            const std::uint32_t second_grad = round_at_16(second * (second_grads[j] - delta[j])) & kept;
            weights[j] = static_cast<std::uint16_t>(round_at_16(first) >> 16);
            weights[j + kPanel] = static_cast<std::uint16_t>((round_at_16(second) & kept) >> 16);
            score_grads[j] = static_cast<std::uint16_t>(first_grad);
            score_grads[j + kPanel] = static_cast<std::uint16_t>(second_grad >> 16);
            panel[j] = first_grad | second_grad;
        }
        scores += 2 * kPanel, grads += 2 * kPanel, weights += 2 * kPanel, score_grads += 2 * kPanel;
    }
}

[[maybe_unused]] void scale_columns(float* __restrict sums, std::int64_t rows, std::int64_t columns,
                                    const float* __restrict factors) {
    for (std::int64_t i = 0; i < rows; ++i, sums += kPanel)
        for (std::int64_t j = 0; j < columns; ++j) sums[j] *= factors[j];
}

constexpr SoftmaxKernels kSoftmax = {
    .column_max = column_max,
    .exponentials = exponentials,
    .exponential_pairs = exponential_pairs,
    .score_gradients = score_gradients,
    .score_gradient_pairs = score_gradient_pairs,
    .scale_columns = scale_columns,
};

}  // namespace softmax
}  // namespace
}  // namespace halfbyte

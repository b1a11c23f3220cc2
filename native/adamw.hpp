// One step of AdamW with its two averages in 8 bits: blocks of kStateBlock numbers, a code of a dynamic map
// for each number and the block's largest magnitude. The first half is what an instruction set offers
// (adamw_kernels.hpp holds the one definition that each compiles for itself), the second splits the blocks
// over threads.
//
// Arithmetic is in float with the roundings named here and nothing is fused, so that neither the instruction
// set nor the number of threads changes a bit.
#pragma once

#include "kernels.hpp"

namespace halfbyte {

constexpr std::int64_t kStateBlock = 256;

// How a number finds its magnitude in a dynamic map. These ascend from 0 to 1, with `last` thresholds between
// them: a number belongs to the magnitude whose index is the count of thresholds below it.
//
// From piece to piece the magnitudes are evenly spaced: in piece i, which ends at `end[i]`, the index of x is
// slope[i] · x + shift[i] rounded to an integer, at most most[i], unless that lies so near the middle
// between two integers that only the thresholds can tell. Magnitude 1 comes after the last piece.
struct DynamicMap {
    static constexpr int kPieces = 8;
    const float* thresholds;
    int last;
    float end[kPieces], slope[kPieces], shift[kPieces], most[kPieces];
};

// With every operation rounded to float:
//   m = beta1 · m + m_share · g;  v = beta2 · v + (v_share · g) · g;
//   p = p · decay + step · (m / (√v + eps)).
// A code's value is its magnitude, with its sign, times the block's scale. The new scale is the block's
// largest magnitude, and a number's code that of number · (1 / scale). The sign of m is the side of kZero on
// which its code lies; a negative number of magnitude 1 has the code below it, which is the lowest there is.
// A block whose scale is no normal number gets codes of 0.
struct AdamStep {
    float* p;
    const float* g;
    std::uint8_t *m, *v;       // codes
    float *m_scale, *v_scale;  // one per block
    std::int64_t count;
    const float *m_values, *v_values;  // (256), value of each code
    DynamicMap m_map, v_map;
    float beta1, m_share, beta2, v_share, decay, step, eps;
};

constexpr int kZero = 127;  // m's code for 0

// A map from its magnitudes and thresholds: the upper half of the signed one, or the unsigned one.
DynamicMap dynamic_map(const float* magnitudes, const float* thresholds, int last);

// The whole step.
void adamw_8bit(const Kernels& kernels, const AdamStep& step, int threads);

}  // namespace halfbyte

// The element-wise and row-wise operations of a transformer block: norms, rotary embedding, gated
// activations. The first half is what an instruction set offers (elementwise_kernels.hpp holds the one
// definition that each compiles for itself), the second splits the work over threads.
//
// Arithmetic is in float with the roundings named here, nothing is fused, and sums are in an order of their
// own, so that neither the instruction set nor the number of threads changes a bit. Results may lie exactly
// where an operand of the same extent lies, or apart from all of them.
#pragma once

#include "kernels.hpp"

namespace halfbyte {

// How many rows of how many numbers an operation works on.
struct Extent {
    std::int64_t outer, middle, inner, cols;
};

// Rows somewhere in memory: row (a, b, c) of an extent begins stride[0] a + stride[1] b + stride[2] c
// elements after `data`; its numbers are consecutive. `data` is null where an operand is absent.
struct Rows {
    void* data;
    Type type;
    std::int64_t stride[3];
};

enum class NormKind : int {
    rms = 0,              // y = round(n) · weight, n rounded to x's type: Llama, Mistral, Qwen, Phi-3
    rms_unit_offset = 1,  // y = n · (1 + weight), rounded once: Gemma
    layer = 2             // y = n · weight + bias, rounded once: GPT-2
};

// n = (x - mean) · rstd per row, mean = 0 for the two RMS kinds, rstd = 1 / √(mean((x - mean)²) + eps).
struct Norm {
    NormKind kind;
    Extent extent;
    float eps;
    Rows x, y;
    Rows residual,
        total;  // both or neither: total = x + residual, rounded to x's type, is normalised instead of x
    const void *weight, *bias;  // (cols); bias may be null
    Type weight_type;           // also of bias
    float *mean, *rstd;         // one per row; mean is null for the RMS kinds
};

// dx = rstd · (m - mean(m) - n · mean(m · n)) + residual_grad with m = dy · weight (or 1 + weight), mean(m) =
// 0 for the RMS kinds. dweight = sum of dy · n as the forward pass multiplied it, dbias = sum of dy; both
// null or wanted.
struct NormGradient {
    NormKind kind;
    Extent extent;
    Rows dy, x, dx;
    Rows residual_grad;  // or absent
    const void* weight;
    Type weight_type;
    const float *mean, *rstd;
    float *dweight, *dbias;  // (cols)
};

// Rows are (batch, token, head). Of each row the first `rotated` numbers, even in count, are two halves x1,
// x2: x1 cos1 - x2 sin1 and x2 cos2 + x1 sin2; the rest is copied. `inverse` is the transposed map, which for
// equal halves of the tables is the rotation back. The tables' rows are (batch, token).
struct Rotation {
    Extent extent;
    Rows x, out, cos, sin;
    std::int64_t rotated;
    bool inverse;
};

enum class Activation : int { silu = 0, gelu = 1, gelu_tanh = 2, relu = 3 };

// h = round(act(gate)) · up, or act(gate) where up is absent. All of gate's type.
struct Gate {
    Activation kind;
    Extent extent;
    Rows gate, up, h;
};

// dgate = dh · up · act'(gate), dup = dh · round(act(gate)), each rounded once; h as before, where wanted.
// Without up: dgate = dh · act'(gate).
struct GateGradient {
    Activation kind;
    Extent extent;
    Rows dh, gate, up, dgate, dup, h;
};

constexpr std::int64_t kPiece =
    512;  // numbers of a row that one thread takes at a time where rows do not matter

struct ElementwiseKernels {
    // Rows first … last-1 in the order (0, 0, 0), (0, 0, 1), … `weight` and `bias` are the norm's as floats,
    // 1 added to the weight where it has a unit offset; `bias` is used by `layer` alone, which must have one.
    void (*norm_forward)(const Norm& norm, const float* weight, const float* bias, std::int64_t first,
                         std::int64_t last);

    // The same; adds the rows' part of dweight and dbias to `dweight` and `dbias`, which may be null.
    void (*norm_backward)(const NormGradient& norm, const float* weight, std::int64_t first,
                          std::int64_t last, float* dweight, float* dbias);

    // Tokens first … last-1, counted through all batches.
    void (*rotate)(const Rotation& rotation, std::int64_t first, std::int64_t last);

    // Pieces first … last-1: every row is cut into ceil(cols / kPiece) of them.
    void (*gate_forward)(const Gate& gate, std::int64_t first, std::int64_t last);
    void (*gate_backward)(const GateGradient& gate, std::int64_t first, std::int64_t last);
};

// The whole operations. Few numbers stay on one thread.
void norm_forward(const Kernels& kernels, const Norm& norm, int threads);
void norm_backward(const Kernels& kernels, const NormGradient& norm, int threads);
void rotate(const Kernels& kernels, const Rotation& rotation, int threads);
void gate_forward(const Kernels& kernels, const Gate& gate, int threads);
void gate_backward(const Kernels& kernels, const GateGradient& gate, int threads);

}  // namespace halfbyte

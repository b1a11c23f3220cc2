// Products of activations with weights, split over threads and built from one set of kernels. A weight is
// read as it is stored, in 4 bits or dense; sums are float32 and are rounded once.
#pragma once

#include "kernels.hpp"

namespace halfbyte {

// A weight (rows, cols) in 4 bits, or dense where `dense` is set: then numbers of the product's type, row n
// beginning at element n * stride.
struct Factor {
    const Weight* quantised;
    const void* dense;
    std::int64_t rows, cols, stride;
};

// Activations times a factor: `a` has M rows, row m beginning at element m * stride.
struct Term {
    const void* a;
    std::int64_t stride;
    Factor factor;
};

// Where a result goes: row m begins at element m * stride.
struct Result {
    void* out;
    std::int64_t stride;
    Type type;
};

// out = round(terms[0].a · F0ᵀ + terms[1].a · F1ᵀ + … + bias + residual); all factors have `rows` rows, out
// (M, rows). Several such products run as one piece of work.
struct Forward {
    const Term* terms;
    int count;
    const void* bias;      // (rows,) of the product's type, or null
    const void* residual;  // (M, rows) contiguous, of the product's type, or null
    Result result;
};
void forward(const Kernels& kernels, Type type, std::int64_t M, const Forward* products, int count,
             int threads);

// out = round(terms[0].a · F0 + terms[1].a · F1 + … + residual); all factors have `cols` columns, out (M,
// cols).
struct Backward {
    std::int64_t M;
    const Term* terms;
    int count;
    const void* residual;  // (M, cols) contiguous, of the product's type, or null
    Result result;
};
void backward(const Kernels& kernels, Type type, const Backward* products, int count, int threads);

// The whole matrix in `type`.
void dequantize(const Kernels& kernels, const Weight& weight, Type type, void* out, int threads);

}  // namespace halfbyte

// The operations on whole matrices, split over threads and built from one set of kernels.
#pragma once

#include "kernels.hpp"

namespace halfbyte {

// y (M, weight.rows) = x (M, weight.cols) · Wᵀ + bias; x, bias and y of `type`; bias may be null.
void linear(const Kernels& kernels, const Weight& weight, Type type, const void* x, std::int64_t M,
            const void* bias, void* y, int threads);

// dx (M, weight.cols) = dy (M, weight.rows) · W; dy and dx of `type`.
void linear_grad(const Kernels& kernels, const Weight& weight, Type type, const void* dy, std::int64_t M,
                 void* dx, int threads);

// The whole matrix in `type`.
void dequantize(const Kernels& kernels, const Weight& weight, Type type, void* out, int threads);

}  // namespace halfbyte

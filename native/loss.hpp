// The loss of rows of logits and its gradient, split over threads.
#pragma once

#include <optional>

#include "kernels.hpp"

namespace halfbyte {

// Rows of logits and what is asked about them. What is minimised is
// (1 - smoothing) · nll + smoothing · (mean of the nll of all tokens) + z_loss · lse².
struct LossRows {
    float* logits;  // (rows, count), overwritten
    const std::int64_t* targets;
    const float* bias;  // (count), or null
    std::int64_t rows, count;
    Bend bend;
    double smoothing, z_loss;
    double* nll;        // (rows), in nats
    double* objective;  // (rows)
};

// Fills nll and objective. With a `gradient` type, row i of logits then begins with the `count` numbers of
// that type that are the gradient of factor · objective[i] for the logits of that row.
void loss_rows(const Kernels& kernels, const LossRows& job, std::optional<Type> gradient, double factor,
               int threads);

}  // namespace halfbyte

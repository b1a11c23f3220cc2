// One row at a time: sums, the loss in double, then the gradient over the logits.
#include "loss.hpp"

#include <cmath>

#include "parallel.hpp"

namespace halfbyte {

void loss_rows(const Kernels& kernels, const LossRows& job, std::optional<Type> gradient, double factor,
               int threads) {
    const auto count = static_cast<double>(job.count);
    auto work = [&](std::int64_t, std::int64_t begin, std::int64_t end) {
        for (std::int64_t i = begin; i < end; ++i) {
            float* row = job.logits + i * job.count;
            const std::int64_t target = job.targets[i];
            const RowSums sums =
                kernels.loss_sums(row, job.count, job.bias, target, job.bend, job.smoothing != 0.0);
            const double log_sum = std::log(sums.exponentials);
            const double lse = static_cast<double>(sums.largest) + log_sum;
            job.nll[i] = (static_cast<double>(sums.largest) - static_cast<double>(sums.target)) + log_sum;
            job.objective[i] = (1.0 - job.smoothing) * job.nll[i] + job.z_loss * lse * lse;
            if (job.smoothing != 0.0) job.objective[i] += job.smoothing * (lse - sums.logits / count);
            if (!gradient) continue;
            const double common = factor * static_cast<double>(job.bend.scale);
            const Slopes slopes{.probability = static_cast<float>(common * (1.0 + 2.0 * job.z_loss * lse) /
                                                                  sums.exponentials),
                                .everywhere = static_cast<float>(common * job.smoothing / count),
                                .target = static_cast<float>(common * (1.0 - job.smoothing))};
            kernels.loss_gradient(row, job.count, target, job.bend, sums, slopes, *gradient, row);
        }
    };
    parallel(job.rows, threads, work);
}

}  // namespace halfbyte

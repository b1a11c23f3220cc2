// Splits the element-wise and row-wise operations over threads, so that no bit depends on how many there are.
#include "elementwise.hpp"

#include <algorithm>
#include <vector>

#include "parallel.hpp"

namespace halfbyte {
namespace {

constexpr std::int64_t kAlone =
    32 * 1024;  // bytes below which waking a second thread costs more than it saves
constexpr std::int64_t kSums =
    64;  // partial sums of weight gradients: their number may not depend on threads
constexpr std::int64_t kSumRows = 16;  // least rows of one

std::int64_t rows_of(const Extent& extent) { return extent.outer * extent.middle * extent.inner; }

int crew(const Extent& extent, Type type, int threads) {
    const std::int64_t bytes = rows_of(extent) * extent.cols * (type == Type::f32 ? 4 : 2);
    return bytes < kAlone ? 1 : threads;
}

std::int64_t pieces_of(const Extent& extent) {
    return rows_of(extent) * ((extent.cols + kPiece - 1) / kPiece);
}

}  // namespace

void norm_forward(const Kernels& kernels, const Norm& norm, int threads) {
    auto part = [&](std::int64_t, std::int64_t first, std::int64_t last) {
        kernels.elementwise->norm_forward(norm, first, last);
    };
    parallel(rows_of(norm.extent), crew(norm.extent, norm.x.type, threads), part);
}

void norm_backward(const Kernels& kernels, const NormGradient& norm, int threads) {
    const std::int64_t rows = rows_of(norm.extent), cols = norm.extent.cols;
    threads = crew(norm.extent, norm.x.type, threads);
    if (norm.dweight == nullptr) {
        auto part = [&](std::int64_t, std::int64_t first, std::int64_t last) {
            kernels.elementwise->norm_backward(norm, first, last, nullptr, nullptr);
        };
        parallel(rows, threads, part);
        return;
    }
    const std::int64_t sums = std::clamp<std::int64_t>(rows / kSumRows, 1, kSums);
    const std::int64_t width = norm.dbias != nullptr ? 2 * cols : cols;
    std::vector<float> partial(static_cast<std::size_t>(sums * width), 0.0f);
    auto part = [&](std::int64_t, std::int64_t first, std::int64_t last) {
        for (std::int64_t s = first; s < last; ++s) {
            float* dweight = partial.data() + s * width;
            kernels.elementwise->norm_backward(norm, rows * s / sums, rows * (s + 1) / sums, dweight,
                                               norm.dbias != nullptr ? dweight + cols : nullptr);
        }
    };
    parallel(sums, threads, part);
    auto fold = [&](std::int64_t, std::int64_t first, std::int64_t last) {
        for (std::int64_t s = 1; s < sums; ++s)
            for (std::int64_t c = first; c < last; ++c)
                partial[static_cast<std::size_t>(c)] += partial[static_cast<std::size_t>(s * width + c)];
    };
    parallel(width, threads, fold);
    std::copy_n(partial.data(), cols, norm.dweight);
    if (norm.dbias != nullptr) std::copy_n(partial.data() + cols, cols, norm.dbias);
}

void rotate(const Kernels& kernels, const Rotation& rotation, int threads) {
    const Extent& extent = rotation.extent;
    if (extent.inner == 0) return;
    auto part = [&](std::int64_t, std::int64_t first, std::int64_t last) {
        kernels.elementwise->rotate(rotation, first, last);
    };
    parallel(extent.outer * extent.middle, crew(extent, rotation.x.type, threads), part);
}

void gate_forward(const Kernels& kernels, const Gate& gate, int threads) {
    auto part = [&](std::int64_t, std::int64_t first, std::int64_t last) {
        kernels.elementwise->gate_forward(gate, first, last);
    };
    parallel(pieces_of(gate.extent), crew(gate.extent, gate.gate.type, threads), part);
}

void gate_backward(const Kernels& kernels, const GateGradient& gate, int threads) {
    auto part = [&](std::int64_t, std::int64_t first, std::int64_t last) {
        kernels.elementwise->gate_backward(gate, first, last);
    };
    parallel(pieces_of(gate.extent), crew(gate.extent, gate.gate.type, threads), part);
}

}  // namespace halfbyte

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
    const std::int64_t bytes = rows_of(extent) * extent.cols * size_of(type);
    return bytes < kAlone ? 1 : threads;
}

std::int64_t pieces_of(const Extent& extent) {
    return rows_of(extent) * ((extent.cols + kPiece - 1) / kPiece);
}

// A weight or a bias as floats with `offset` added, where it lies if it is that already.
class Floats {
  public:
    Floats(const Kernels& kernels, const void* numbers, Type type, std::int64_t count, float offset) {
        data_ = static_cast<const float*>(numbers);
        if (numbers != nullptr && type == Type::f32 && offset == 0.0f) return;
        copy_.assign(static_cast<std::size_t>(count), 0.0f);
        data_ = copy_.data();
        if (numbers == nullptr) return;
        kernels.to_float(numbers, type, count, copy_.data());
        for (float& number : copy_) number += offset;
    }

    const float* data() const { return data_; }

  private:
    const float* data_;
    std::vector<float> copy_;
};

float offset_of(NormKind kind) { return kind == NormKind::rms_unit_offset ? 1.0f : 0.0f; }

}  // namespace

void norm_forward(const Kernels& kernels, const Norm& norm, int threads) {
    const std::int64_t cols = norm.extent.cols;
    const Floats weight(kernels, norm.weight, norm.weight_type, cols, offset_of(norm.kind));
    const Floats bias(kernels, norm.bias, norm.weight_type, norm.kind == NormKind::layer ? cols : 0, 0.0f);
    auto part = [&](std::int64_t, std::int64_t first, std::int64_t last) {
        kernels.elementwise->norm_forward(norm, weight.data(), bias.data(), first, last);
    };
    parallel(rows_of(norm.extent), crew(norm.extent, norm.x.type, threads), part);
}

void norm_backward(const Kernels& kernels, const NormGradient& norm, int threads) {
    const std::int64_t rows = rows_of(norm.extent), cols = norm.extent.cols;
    const Floats weight(kernels, norm.weight, norm.weight_type, cols, offset_of(norm.kind));
    threads = crew(norm.extent, norm.x.type, threads);
    if (norm.dweight == nullptr) {
        auto part = [&](std::int64_t, std::int64_t first, std::int64_t last) {
            kernels.elementwise->norm_backward(norm, weight.data(), first, last, nullptr, nullptr);
        };
        parallel(rows, threads, part);
        return;
    }
    // Each sum covers the same rows whoever computes it, and they are folded in order.
    const std::int64_t sums = std::clamp<std::int64_t>(rows / kSumRows, 1, kSums);
    const std::int64_t width = norm.dbias != nullptr ? 2 * cols : cols;
    std::vector<float> partial(static_cast<std::size_t>(sums * width), 0.0f);
    auto part = [&](std::int64_t, std::int64_t first, std::int64_t last) {
        for (std::int64_t s = first; s < last; ++s) {
            float* dweight = partial.data() + s * width;
            float* dbias = norm.dbias != nullptr ? dweight + cols : nullptr;
            kernels.elementwise->norm_backward(norm, weight.data(), rows * s / sums, rows * (s + 1) / sums,
                                               dweight, dbias);
        }
    };
    if (rows > 0) parallel(sums, threads, part);
    for (std::int64_t s = 1; s < sums; ++s) {
        const float* more = partial.data() + s * width;
        for (std::int64_t c = 0; c < width; ++c) partial[static_cast<std::size_t>(c)] += more[c];
    }
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

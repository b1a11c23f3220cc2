// Panels of decoded weights times activations: one loop serves forward and backward, which differ only in how
// a panel is filled. A weight is decoded once per `kRows` rows of activations and a dense copy never exists.
#include "linear.hpp"

#include <algorithm>
#include <vector>

#include "parallel.hpp"

namespace halfbyte {
namespace {

constexpr std::int64_t kDepth = 256;  // lanes of a panel: 64 KiB, half of it decoded at a time stays in L1/L2
constexpr std::int64_t kRows = 1024;  // rows of activations per pass: sums of 256 KiB stay in L2
constexpr std::int64_t kDotChunk = 2048;  // weights decoded at a time for `dot`

// The activations as lanes, in place where their memory already is that.
class Lanes {
  public:
    Lanes(const Kernels& kernels, Type type, const void* numbers, std::int64_t rows, std::int64_t inner,
          int threads)
        : pairs_(type == Type::bf16 && kernels.multiply_pairs != nullptr),
          depth_(pairs_ ? (inner + 1) / 2 : inner),
          data_(static_cast<const std::uint32_t*>(numbers)) {
        if (type == Type::f32) return;
        if (pairs_ && inner % 2 == 0 && reinterpret_cast<std::uintptr_t>(numbers) % 4 == 0) return;
        copy_.assign(static_cast<std::size_t>(rows * depth_), 0);
        const auto* words = static_cast<const std::uint16_t*>(numbers);
        auto copy_rows = [&](std::int64_t, std::int64_t begin, std::int64_t end) {
            for (std::int64_t m = begin; m < end; ++m) {
                std::uint32_t* row = copy_.data() + m * depth_;
                if (pairs_)
                    std::copy_n(words + m * inner, inner, reinterpret_cast<std::uint16_t*>(row));
                else
                    kernels.to_float(words + m * inner, type, inner, reinterpret_cast<float*>(row));
            }
        };
        parallel(rows, threads, copy_rows);
        data_ = copy_.data();
    }

    bool pairs() const { return pairs_; }
    std::int64_t depth() const { return depth_; }
    const std::uint32_t* row(std::int64_t m) const { return data_ + m * depth_; }

  private:
    bool pairs_;
    std::int64_t depth_;
    const std::uint32_t* data_;
    std::vector<std::uint32_t> copy_;
};

struct Scratch {
    std::vector<std::uint32_t> panel, rows;
    std::vector<float> sums, bias;

    explicit Scratch(std::int64_t M)
        : panel(kDepth * kPanel),
          rows(kDepth * kPanel),
          sums(static_cast<std::size_t>(std::min(M, kRows) * kPanel)),
          bias(kPanel) {}
};

// Forward: column j is row n0 + j of W, depth runs along K.
void fill_along_rows(const Kernels& kernels, const Weight& weight, Type type, bool pairs, std::int64_t n0,
                     std::int64_t columns, std::int64_t d0, std::int64_t depth, Scratch& scratch) {
    const std::int64_t per_lane = pairs ? 2 : 1;
    const std::int64_t k0 = d0 * per_lane;
    const std::int64_t count = std::min(depth * per_lane, weight.cols - k0);
    for (std::int64_t j = 0; j < columns; ++j) {
        std::uint32_t* row = scratch.rows.data() + j * kDepth;
        const std::int64_t begin = (n0 + j) * weight.cols + k0;
        if (pairs) {
            if (count % 2 != 0) row[depth - 1] = 0;
            kernels.decode(weight, begin, count, type, row);
        } else {
            kernels.decode_wide(weight, begin, count, type, reinterpret_cast<float*>(row));
        }
    }
    kernels.transpose(scratch.rows.data(), kDepth, columns, depth, scratch.panel.data());
}

// Backward: column j is column k0 + j of W, depth runs along N.
void fill_along_columns(const Kernels& kernels, const Weight& weight, Type type, bool pairs, std::int64_t k0,
                        std::int64_t columns, std::int64_t d0, std::int64_t depth, Scratch& scratch) {
    if (columns < kPanel) std::fill(scratch.panel.begin(), scratch.panel.end(), 0u);
    for (std::int64_t d = 0; d < depth; ++d) {
        std::uint32_t* lanes = scratch.panel.data() + d * kPanel;
        if (!pairs) {
            kernels.decode_wide(weight, (d0 + d) * weight.cols + k0, columns, type,
                                reinterpret_cast<float*>(lanes));
            continue;
        }
        std::uint16_t first[kPanel], second[kPanel] = {};
        const std::int64_t n = 2 * (d0 + d);
        kernels.decode(weight, n * weight.cols + k0, columns, type, first);
        if (n + 1 < weight.rows) kernels.decode(weight, (n + 1) * weight.cols + k0, columns, type, second);
        for (std::int64_t j = 0; j < columns; ++j)
            lanes[j] = static_cast<std::uint32_t>(second[j]) << 16 | first[j];
    }
}

using Fill = void (*)(const Kernels&, const Weight&, Type, bool, std::int64_t, std::int64_t, std::int64_t,
                      std::int64_t, Scratch&);

struct Product {
    const Kernels& kernels;
    const Weight& weight;
    Type type;
    std::int64_t M, inner, outer;
    Fill fill;
};

void write_sums(const Product& product, const float* bias, std::int64_t m0, std::int64_t rows,
                std::int64_t j0, std::int64_t columns, Scratch& scratch, void* out) {
    const std::int64_t size = product.type == Type::f32 ? 4 : 2;
    for (std::int64_t m = 0; m < rows; ++m) {
        float* sums = scratch.sums.data() + m * kPanel;
        if (bias != nullptr)
            for (std::int64_t j = 0; j < columns; ++j) sums[j] += bias[j];
        char* row = static_cast<char*>(out) + ((m0 + m) * product.outer + j0) * size;
        product.kernels.from_float(sums, product.type, columns, row);
    }
}

// out (M, outer) = a (M, inner) · panel (inner, outer) + bias.
void multiply_panels(const Product& product, const void* a, const void* bias, void* out, int threads) {
    const Kernels& kernels = product.kernels;
    const Lanes lanes(kernels, product.type, a, product.M, product.inner, threads);
    const std::int64_t panels = (product.outer + kPanel - 1) / kPanel;
    std::vector<Scratch> scratches(static_cast<std::size_t>(parts_of(panels, threads)), Scratch(product.M));
    const auto multiply = lanes.pairs() ? kernels.multiply_pairs : kernels.multiply;
    const std::int64_t size = product.type == Type::f32 ? 4 : 2;
    auto work = [&](std::int64_t part, std::int64_t begin, std::int64_t end) {
        Scratch& scratch = scratches[static_cast<std::size_t>(part)];
        for (std::int64_t p = begin; p < end; ++p) {
            const std::int64_t j0 = p * kPanel;
            const std::int64_t columns = std::min<std::int64_t>(kPanel, product.outer - j0);
            if (bias != nullptr)
                kernels.to_float(static_cast<const char*>(bias) + j0 * size, product.type, columns,
                                 scratch.bias.data());
            for (std::int64_t m0 = 0; m0 < product.M; m0 += kRows) {
                const std::int64_t rows = std::min(kRows, product.M - m0);
                for (std::int64_t d0 = 0; d0 < lanes.depth(); d0 += kDepth) {
                    const std::int64_t depth = std::min(kDepth, lanes.depth() - d0);
                    product.fill(kernels, product.weight, product.type, lanes.pairs(), j0, columns, d0, depth,
                                 scratch);
                    multiply(lanes.row(m0) + d0, lanes.depth(), rows, scratch.panel.data(), columns, depth,
                             d0 > 0, scratch.sums.data());
                }
                write_sums(product, bias == nullptr ? nullptr : scratch.bias.data(), m0, rows, j0, columns,
                           scratch, out);
            }
        }
    };
    parallel(panels, threads, work);
}

// A few rows of activations: each row of W is decoded piece by piece and used at once.
void multiply_rows(const Product& product, const void* x, const void* bias, void* y, int threads) {
    const Kernels& kernels = product.kernels;
    const bool words = product.type == Type::bf16 && kernels.dot_bf16 != nullptr;
    const std::int64_t K = product.inner, N = product.outer;
    const int M = static_cast<int>(product.M);
    std::vector<float> wide;
    if (!words && product.type != Type::f32) {
        wide.resize(static_cast<std::size_t>(M * K));
        kernels.to_float(x, product.type, M * K, wide.data());
    }
    const float* floats = wide.empty() ? static_cast<const float*>(x) : wide.data();
    auto work = [&](std::int64_t, std::int64_t begin, std::int64_t end) {
        float weights[kDotChunk];
        for (std::int64_t n = begin; n < end; ++n) {
            float sums[kMaxDotRows] = {};
            for (std::int64_t k = 0; k < K; k += kDotChunk) {
                const std::int64_t count = std::min(kDotChunk, K - k);
                if (words) {
                    auto* decoded = reinterpret_cast<std::uint16_t*>(weights);
                    kernels.decode(product.weight, n * K + k, count, product.type, decoded);
                    kernels.dot_bf16(decoded, static_cast<const std::uint16_t*>(x) + k, K, M, count, sums);
                } else {
                    kernels.decode_wide(product.weight, n * K + k, count, product.type, weights);
                    kernels.dot(weights, floats + k, K, M, count, sums);
                }
            }
            float added = 0;
            const std::int64_t size = product.type == Type::f32 ? 4 : 2;
            if (bias != nullptr)
                kernels.to_float(static_cast<const char*>(bias) + n * size, product.type, 1, &added);
            for (int m = 0; m < M; ++m) {
                const float sum = sums[m] + added;
                kernels.from_float(&sum, product.type, 1, static_cast<char*>(y) + (m * N + n) * size);
            }
        }
    };
    parallel(N, threads, work);
}

}  // namespace

void linear(const Kernels& kernels, const Weight& weight, Type type, const void* x, std::int64_t M,
            const void* bias, void* y, int threads) {
    const Product product{kernels, weight, type, M, weight.cols, weight.rows, fill_along_rows};
    if (M <= kMaxDotRows)
        multiply_rows(product, x, bias, y, threads);
    else
        multiply_panels(product, x, bias, y, threads);
}

void linear_grad(const Kernels& kernels, const Weight& weight, Type type, const void* dy, std::int64_t M,
                 void* dx, int threads) {
    const Product product{kernels, weight, type, M, weight.rows, weight.cols, fill_along_columns};
    multiply_panels(product, dy, nullptr, dx, threads);
}

void dequantize(const Kernels& kernels, const Weight& weight, Type type, void* out, int threads) {
    const std::int64_t total = weight.rows * weight.cols;
    const std::int64_t blocks = (total + weight.blocksize - 1) / weight.blocksize;
    const std::int64_t size = type == Type::f32 ? 4 : 2;
    auto work = [&](std::int64_t, std::int64_t first, std::int64_t last) {
        const std::int64_t begin = first * weight.blocksize;
        const std::int64_t end = std::min(last * weight.blocksize, total);
        kernels.decode(weight, begin, end - begin, type, static_cast<char*>(out) + begin * size);
    };
    parallel(blocks, threads, work);
}

}  // namespace halfbyte

// Every kernel in plain C++, one number at a time: the version to read, and the one that runs anywhere.
#include "portable.hpp"

#include "adamw_kernels.hpp"
#include "elementwise_kernels.hpp"
#include "loss_rows.hpp"
#include "softmax_rows.hpp"

namespace halfbyte {
namespace {

void transpose(const std::uint32_t* rows, std::int64_t stride, std::int64_t columns, std::int64_t depth,
               std::uint32_t* panel) {
    for (std::int64_t d = 0; d < depth; ++d) {
        for (std::int64_t j = 0; j < columns; ++j) panel[d * kPanel + j] = rows[j * stride + d];
        for (std::int64_t j = columns; j < kPanel; ++j) panel[d * kPanel + j] = 0;
    }
}

void multiply(const std::uint32_t* a, std::int64_t stride, std::int64_t rows, const std::uint32_t* panel,
              std::int64_t columns, std::int64_t depth, bool add, float* sums) {
    constexpr int kVector = 16;
    for (std::int64_t i = 0; i < rows; ++i) {
        for (std::int64_t j = 0; j < columns; j += kVector) {
            float sum[kVector] = {};
            if (add) std::memcpy(sum, sums + i * kPanel + j, sizeof sum);
            for (std::int64_t d = 0; d < depth; ++d) {
                const float factor = plain::bits_as<float>(a[i * stride + d]);
                float column[kVector];
                std::memcpy(column, panel + d * kPanel + j, sizeof column);
                for (int v = 0; v < kVector; ++v) sum[v] += factor * column[v];
            }
            std::memcpy(sums + i * kPanel + j, sum, sizeof sum);
        }
    }
}

void dot(const float* w, const float* a, std::int64_t stride, int rows, std::int64_t count, float* sums) {
    constexpr int kVector = 16;
    for (int i = 0; i < rows; ++i) {
        float sum[kVector] = {};
        std::int64_t k = 0;
        for (; k + kVector <= count; k += kVector)
            for (int v = 0; v < kVector; ++v) sum[v] += w[k + v] * a[i * stride + k + v];
        for (; k < count; ++k) sum[0] += w[k] * a[i * stride + k];
        for (int v = 0; v < kVector; ++v) sums[i] += sum[v];
    }
}

void prepare_rows(const void* numbers, Type type, int rows, std::int64_t cols, void* prepared) {
    plain::to_float(numbers, type, rows * cols, static_cast<float*>(prepared));
}

void multiply_rows(const Weight& weight, Type type, std::int64_t first, std::int64_t last,
                   const void* prepared, int rows, float* sums) {
    plain::multiply_rows(plain::decode_wide, dot, weight, type, first, last,
                         static_cast<const float*>(prepared), rows, sums);
}

std::int64_t arithmetic(std::int64_t rounds, bool, float* out) {
    constexpr int kSums = 32;
    volatile float unknown[kSums + 1] = {};  // the compiler may neither join equal sums nor leave rounds out
    const float a = unknown[kSums];
    float c[kSums];
    for (int i = 0; i < kSums; ++i) c[i] = unknown[i];
    for (std::int64_t round = 0; round < rounds; ++round)
        for (float& sum : c) sum = sum * a + a;
    for (const float sum : c) *out += sum;
    return rounds * kSums * 2;
}

constexpr Kernels kPortable = {
    .name = "portable",
    .block_scales = plain::block_scales,
    .search_scales = plain::search_scales,
    .encode = plain::encode,
    .decode = plain::decode,
    .decode_wide = plain::decode_wide,
    .decode_pairs = plain::decode_pairs,
    .interleave = plain::interleave,
    .transpose = transpose,
    .multiply = multiply,
    .multiply_pairs = nullptr,
    .dot = dot,
    .dot_bf16 = nullptr,
    .prepare_rows = prepare_rows,
    .multiply_rows = multiply_rows,
    .add = plain::add,
    .arithmetic = arithmetic,
    .loss_sums = loss::loss_sums,
    .loss_gradient = loss::loss_gradient<plain::from_float>,
    .to_float = plain::to_float,
    .from_float = plain::from_float,
    .elementwise = &rows::Elementwise<vector::One, vector::One>::kKernels,
    .softmax = softmax::kSoftmax,
    .adamw_8bit = adam::adamw_8bit<vector::One, vector::One>,
};

}  // namespace

const Kernels* portable_kernels() { return &kPortable; }

}  // namespace halfbyte

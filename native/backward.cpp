// Backward, out = a · W: the summed dimension runs down the rows of W, so pairs of its rows are decoded into
// panels and the activations are broadcast from where they lie. A weight is decoded once per pass over the
// activations and a dense copy never exists.
#include <algorithm>
#include <utility>
#include <vector>

#include "lanes.hpp"
#include "parallel.hpp"
#include "product.hpp"

namespace halfbyte {

namespace {

constexpr std::int64_t kColumns = 2 * kPanel;  // the 128 codes of a row that share a cache line
constexpr std::int64_t kRows = 512;  // activations per pass, by these columns: sums of 256 KiB stay in L2

// Columns [k0, k0 + columns) of a product, for its rows [m0, m1).
struct BackwardTask {
    const Backward* product;
    std::int64_t k0, columns, m0, m1;
};

struct BackwardScratch {
    Aligned<std::uint32_t> panel{kDepth * kPanel, false};
    Aligned<float> sums{kRows * kColumns, false};
};

// The activations of a term as lanes: where they lie, or copied.
struct Broadcast {
    const std::uint32_t* lanes;
    std::int64_t stride;
    Aligned<std::uint32_t> copy;
};

Broadcast broadcast_of(const Lanes& lanes, const Term& term, std::int64_t M, int threads) {
    const std::int64_t inner = term.factor.rows, depth = lanes.depth(inner);
    if (lanes.in_place(term.a, inner, term.stride))
        return {static_cast<const std::uint32_t*>(term.a), lanes.stride(term.stride), {}};
    Aligned<std::uint32_t> copy(M * depth, false);
    auto work = [&](std::int64_t, std::int64_t begin, std::int64_t end) {
        for (std::int64_t m = begin; m < end; ++m)
            lanes.convert(element(term.a, lanes.type, m * term.stride), inner, 0, depth,
                          copy.data() + m * depth);
    };
    parallel(M, threads, work);
    const std::uint32_t* first = copy.data();
    return {first, depth, std::move(copy)};
}

// Depth d of the panel is row d of the factor, or rows 2d and 2d + 1, from column k on.
void fill_panel(const Lanes& lanes, const Factor& factor, std::int64_t d0, std::int64_t depth, std::int64_t k,
                std::int64_t columns, std::uint32_t* panel) {
    const Kernels& kernels = lanes.kernels;
    for (std::int64_t d = 0; d < depth; ++d) {
        std::uint32_t* to = panel + d * kPanel;
        const std::int64_t n = (d0 + d) * (lanes.pairs ? 2 : 1);
        if (factor.quantised != nullptr) {
            if (lanes.pairs)
                kernels.decode_pairs(*factor.quantised, n, k, columns, to);
            else
                kernels.decode_wide(*factor.quantised, n * factor.cols + k, columns, lanes.type,
                                    reinterpret_cast<float*>(to));
            continue;
        }
        const void* row = element(factor.dense, lanes.type, n * factor.stride + k);
        if (!lanes.pairs) {
            kernels.to_float(row, lanes.type, columns, reinterpret_cast<float*>(to));
            continue;
        }
        const void* next = n + 1 < factor.rows ? element(row, lanes.type, factor.stride) : nullptr;
        kernels.interleave(static_cast<const std::uint16_t*>(row), static_cast<const std::uint16_t*>(next),
                           columns, to);
    }
}

void run_backward(const Lanes& lanes, const BackwardTask& task, const Broadcast* broadcasts,
                  BackwardScratch& scratch) {
    const Backward& product = *task.product;
    const std::int64_t cols = product.terms[0].factor.cols, rows = task.m1 - task.m0;
    bool add = false;
    for (int t = 0; t < product.count; ++t) {
        const Factor& factor = product.terms[t].factor;
        const std::int64_t whole = lanes.depth(factor.rows);
        for (std::int64_t d0 = 0; d0 < whole; d0 += kDepth, add = true) {
            const std::int64_t depth = std::min(kDepth, whole - d0);
            for (std::int64_t k = 0; k < task.columns; k += kPanel) {
                const std::int64_t columns = std::min<std::int64_t>(kPanel, task.columns - k);
                fill_panel(lanes, factor, d0, depth, task.k0 + k, columns, scratch.panel.data());
                lanes.multiply(broadcasts[t].lanes + task.m0 * broadcasts[t].stride + d0,
                               broadcasts[t].stride, rows, scratch.panel.data(), columns, depth, add,
                               scratch.sums.data() + k * rows);
            }
        }
    }
    for (std::int64_t m = 0; m < rows; ++m)
        for (std::int64_t k = 0; k < task.columns; k += kPanel) {
            const std::int64_t columns = std::min<std::int64_t>(kPanel, task.columns - k);
            float* sums = scratch.sums.data() + k * rows + m * kPanel;
            const std::int64_t at = task.k0 + k;
            if (product.residual != nullptr)
                lanes.kernels.add(element(product.residual, lanes.type, (task.m0 + m) * cols + at),
                                  lanes.type, columns, sums);
            const Result& result = product.result;
            lanes.kernels.from_float(sums, result.type, columns,
                                     element(result.out, result.type, (task.m0 + m) * result.stride + at));
        }
}

// The pieces of all products, pass after pass over their rows; where there are few, rows are split further.
std::vector<BackwardTask> backward_tasks(const Backward* products, int count, int threads) {
    constexpr std::int64_t kFewest = 48;
    std::int64_t groups = 0;
    for (int p = 0; p < count; ++p) groups += groups_of(products[p].terms[0].factor.cols, kColumns);
    const std::int64_t wanted = groups < threads ? groups_of(threads, groups) : 1;
    std::vector<BackwardTask> tasks;
    std::int64_t most = 0;
    for (int p = 0; p < count; ++p) most = std::max(most, products[p].M);
    for (std::int64_t m0 = 0; m0 < most; m0 += kRows)
        for (int p = 0; p < count; ++p) {
            const std::int64_t cols = products[p].terms[0].factor.cols;
            const std::int64_t M = std::min(kRows, products[p].M - m0);
            if (M <= 0) continue;
            const std::int64_t splits = std::min(wanted, groups_of(M, kFewest));
            for (std::int64_t k0 = 0; k0 < cols; k0 += kColumns)
                for (std::int64_t s = 0; s < splits; ++s)
                    tasks.push_back({&products[p], k0, std::min(kColumns, cols - k0), m0 + M * s / splits,
                                     m0 + M * (s + 1) / splits});
        }
    return tasks;
}

}  // namespace

void backward(const Kernels& kernels, Type type, const Backward* products, int count, int threads) {
    const Lanes lanes(kernels, type);
    std::vector<std::vector<Broadcast>> broadcasts(static_cast<std::size_t>(count));
    for (int p = 0; p < count; ++p)
        for (int t = 0; t < products[p].count; ++t)
            broadcasts[static_cast<std::size_t>(p)].push_back(
                broadcast_of(lanes, products[p].terms[t], products[p].M, threads));
    const std::vector<BackwardTask> tasks = backward_tasks(products, count, threads);
    std::vector<BackwardScratch> scratches(static_cast<std::size_t>(threads));
    auto work = [&](std::int64_t slot, std::int64_t i) {
        const BackwardTask& task = tasks[static_cast<std::size_t>(i)];
        run_backward(lanes, task, broadcasts[static_cast<std::size_t>(task.product - products)].data(),
                     scratches[static_cast<std::size_t>(slot)]);
    };
    parallel_tasks(static_cast<std::int64_t>(tasks.size()), threads, work);
}

void dequantize(const Kernels& kernels, const Weight& weight, Type type, void* out, int threads) {
    const std::int64_t total = weight.rows * weight.cols;
    auto work = [&](std::int64_t, std::int64_t first, std::int64_t last) {
        const std::int64_t begin = first * weight.blocksize;
        const std::int64_t end = std::min(last * weight.blocksize, total);
        kernels.decode(weight, begin, end - begin, type, element(out, type, begin));
    };
    parallel(groups_of(total, weight.blocksize), threads, work);
}

}  // namespace halfbyte

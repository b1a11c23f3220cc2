// Forward, out = a · Wᵀ: two codes of a byte are neighbours along the summed dimension, so decoded rows of W
// are lanes as they stand: W is broadcast and the activations are packed into panels, once per call. A weight
// is decoded once per pass over the activations and a dense copy never exists.
#include <algorithm>
#include <vector>

#include "lanes.hpp"
#include "parallel.hpp"
#include "product.hpp"

namespace halfbyte {
namespace {

constexpr std::int64_t kRowsAtOnce = 64;  // rows of W at a time
constexpr std::int64_t kTokens = 512;     // activations per pass: their panels stay in a shared L3

// The activations of a term, packed into panels of 64 rows; of few rows for weights in 4 bits, in the form of
// `multiply_rows`.
struct Packed {
    const void* a;
    std::int64_t stride, cols;
    std::int64_t depth;
    bool dense, quantised;          // whether such weights are multiplied with it
    Aligned<std::uint32_t> panels;  // (token panels, depth, kPanel)
    Aligned<float> prepared;
};

void pack_panel(const Lanes& lanes, const Packed& packed, std::int64_t m0, std::int64_t columns,
                std::uint32_t* panel) {
    const void* first = element(packed.a, lanes.type, m0 * packed.stride);
    if (lanes.in_place(first, packed.cols, packed.stride))
        return lanes.kernels.transpose(static_cast<const std::uint32_t*>(first), lanes.stride(packed.stride),
                                       columns, packed.depth, panel);
    std::uint32_t rows[kPanel * 64];
    for (std::int64_t d0 = 0; d0 < packed.depth; d0 += 64) {
        const std::int64_t depth = std::min<std::int64_t>(64, packed.depth - d0);
        for (std::int64_t j = 0; j < columns; ++j)
            lanes.convert(element(first, lanes.type, j * packed.stride), packed.cols, d0, depth,
                          rows + j * 64);
        lanes.kernels.transpose(rows, 64, columns, depth, panel + d0 * kPanel);
    }
}

std::vector<Packed>::iterator find(std::vector<Packed>& all, const Term& term) {
    return std::find_if(all.begin(), all.end(), [&](const Packed& packed) {
        return packed.a == term.a && packed.stride == term.stride && packed.cols == term.factor.cols;
    });
}

std::vector<Packed> distinct_activations(const Lanes& lanes, const Forward* products, int count) {
    std::vector<Packed> all;
    for (int p = 0; p < count; ++p)
        for (int t = 0; t < products[p].count; ++t) {
            const Term& term = products[p].terms[t];
            if (find(all, term) == all.end()) {
                const std::int64_t depth = lanes.depth(term.factor.cols);
                all.push_back({term.a, term.stride, term.factor.cols, depth, false, false, {}, {}});
            }
            const auto found = find(all, term);
            (term.factor.quantised != nullptr ? found->quantised : found->dense) = true;
        }
    return all;
}

// Rows [n0, n0 + rows) of a product, for the packed tokens of the panels [first, last).
struct ForwardTask {
    const Forward* product;
    std::int64_t n0, rows, first, last;
};

struct ForwardScratch {
    Aligned<std::uint32_t> lanes{kRowsAtOnce * kDepth, false};
    Aligned<float> sums, turned{kRowsAtOnce * kPanel, false}, few{kRowsAtOnce * kFewRows, false};
    explicit ForwardScratch(std::int64_t panels) : sums(panels * kRowsAtOnce * kPanel, false) {}
};

class ForwardPass {
  public:
    ForwardPass(const Lanes& lanes, std::vector<Packed>& packed, std::int64_t m0, std::int64_t tokens)
        : lanes_(lanes), packed_(packed), m0_(m0), tokens_(tokens) {}

    std::int64_t panels() const { return groups_of(tokens_, kPanel); }

    void pack(int threads) {
        for (Packed& one : packed_) {
            if (few() && one.quantised) prepare(one);
            if (few() && !one.dense) continue;
            if (one.panels.data() == nullptr)
                one.panels = Aligned<std::uint32_t>(panels() * one.depth * kPanel, false);
            auto work = [&](std::int64_t, std::int64_t panel) {
                pack_panel(lanes_, one, m0_ + panel * kPanel, columns(panel),
                           one.panels.data() + panel * one.depth * kPanel);
            };
            parallel_tasks(panels(), threads, work);
        }
    }

    void run(const ForwardTask& task, ForwardScratch& scratch) const {
        bool add = false;
        for (int t = 0; t < task.product->count; ++t) {
            const Term& term = task.product->terms[t];
            const Packed& packed = *find(packed_, term);
            if (few() && term.factor.quantised != nullptr) {
                few_rows(task, term, packed, add, scratch);
                add = true;
                continue;
            }
            for (std::int64_t d0 = 0; d0 < packed.depth; d0 += kDepth, add = true) {
                const std::int64_t depth = std::min(kDepth, packed.depth - d0);
                std::int64_t stride = 0;
                const std::uint32_t* rows = rows_of(term.factor, task, d0, depth, scratch, stride);
                for (std::int64_t p = task.first; p < task.last; ++p)
                    lanes_.multiply(rows, stride, task.rows,
                                    packed.panels.data() + (p * packed.depth + d0) * kPanel, columns(p),
                                    depth, add,
                                    scratch.sums.data() + (p - task.first) * kRowsAtOnce * kPanel);
            }
        }
        for (std::int64_t p = task.first; p < task.last; ++p) write(task, p, scratch);
    }

  private:
    bool few() const { return tokens_ <= kFewRows; }

    std::int64_t columns(std::int64_t panel) const {
        return std::min<std::int64_t>(kPanel, tokens_ - panel * kPanel);
    }

    void prepare(Packed& one) const {
        const void* numbers = element(one.a, lanes_.type, m0_ * one.stride);
        one.prepared = Aligned<float>(tokens_ * one.cols, false);
        if (one.stride == one.cols || tokens_ == 1)
            return lanes_.kernels.prepare_rows(numbers, lanes_.type, static_cast<int>(tokens_), one.cols,
                                               one.prepared.data());
        const std::int64_t bytes = one.cols * size_of(lanes_.type);
        const Aligned<char> rows(tokens_ * bytes, false);
        for (std::int64_t m = 0; m < tokens_; ++m)
            std::copy_n(static_cast<const char*>(element(numbers, lanes_.type, m * one.stride)), bytes,
                        rows.data() + m * bytes);
        lanes_.kernels.prepare_rows(rows.data(), lanes_.type, static_cast<int>(tokens_), one.cols,
                                    one.prepared.data());
    }

    void few_rows(const ForwardTask& task, const Term& term, const Packed& packed, bool add,
                  ForwardScratch& scratch) const {
        lanes_.kernels.multiply_rows(*term.factor.quantised, lanes_.type, task.n0, task.n0 + task.rows,
                                     packed.prepared.data(), static_cast<int>(tokens_), scratch.few.data());
        for (std::int64_t n = 0; n < task.rows; ++n)
            for (std::int64_t m = 0; m < tokens_; ++m) {
                const float sum = scratch.few.data()[n * tokens_ + m];
                float& to = scratch.sums.data()[n * kPanel + m];
                to = add ? to + sum : sum;
            }
    }

    // Lanes of rows of the factor, decoded or copied into `scratch` unless they lie ready.
    const std::uint32_t* rows_of(const Factor& factor, const ForwardTask& task, std::int64_t d0,
                                 std::int64_t depth, ForwardScratch& scratch, std::int64_t& stride) const {
        stride = kDepth;
        std::uint32_t* lanes = scratch.lanes.data();
        if (factor.quantised != nullptr) {
            for (std::int64_t i = 0; i < task.rows; ++i)
                lanes_.decode(*factor.quantised, task.n0 + i, d0, depth, lanes + i * kDepth);
            return lanes;
        }
        const void* first = element(factor.dense, lanes_.type, task.n0 * factor.stride);
        if (lanes_.in_place(first, factor.cols, factor.stride)) {
            stride = lanes_.stride(factor.stride);
            return static_cast<const std::uint32_t*>(first) + d0;
        }
        for (std::int64_t i = 0; i < task.rows; ++i)
            lanes_.convert(element(first, lanes_.type, i * factor.stride), factor.cols, d0, depth,
                           lanes + i * kDepth);
        return lanes;
    }

    // The sums are (row of W, token); the result is (token, row of W).
    void write(const ForwardTask& task, std::int64_t panel, ForwardScratch& scratch) const {
        const Kernels& kernels = lanes_.kernels;
        const Forward& product = *task.product;
        const float* sums = scratch.sums.data() + (panel - task.first) * kRowsAtOnce * kPanel;
        float* turned = scratch.turned.data();
        const std::int64_t tokens = columns(panel), outer = product.terms[0].factor.rows;
        kernels.transpose(reinterpret_cast<const std::uint32_t*>(sums), kPanel, task.rows, tokens,
                          reinterpret_cast<std::uint32_t*>(turned));
        for (std::int64_t j = 0; j < tokens; ++j) {
            const std::int64_t m = m0_ + panel * kPanel + j;
            float* row = turned + j * kPanel;
            if (product.bias != nullptr)
                kernels.add(element(product.bias, lanes_.type, task.n0), lanes_.type, task.rows, row);
            if (product.residual != nullptr)
                kernels.add(element(product.residual, lanes_.type, m * outer + task.n0), lanes_.type,
                            task.rows, row);
            const Result& result = product.result;
            kernels.from_float(row, result.type, task.rows,
                               element(result.out, result.type, m * result.stride + task.n0));
        }
    }

    const Lanes& lanes_;
    std::vector<Packed>& packed_;
    std::int64_t m0_, tokens_;
};

// The pieces of all products; where there are few, their tokens are split too, at the price of decoding
// again.
std::vector<ForwardTask> forward_tasks(const Forward* products, int count, std::int64_t panels, int threads) {
    std::int64_t groups = 0;
    for (int p = 0; p < count; ++p) groups += groups_of(products[p].terms[0].factor.rows, kRowsAtOnce);
    const std::int64_t wanted = groups < threads ? groups_of(threads, groups) : 1;
    const std::int64_t splits = std::min(panels, wanted);
    std::vector<ForwardTask> tasks;
    tasks.reserve(static_cast<std::size_t>(groups * splits));
    for (int p = 0; p < count; ++p) {
        const std::int64_t outer = products[p].terms[0].factor.rows;
        for (std::int64_t n0 = 0; n0 < outer; n0 += kRowsAtOnce)
            for (std::int64_t s = 0; s < splits; ++s)
                tasks.push_back({&products[p], n0, std::min(kRowsAtOnce, outer - n0), panels * s / splits,
                                 panels * (s + 1) / splits});
    }
    return tasks;
}

}  // namespace

void forward(const Kernels& kernels, Type type, std::int64_t M, const Forward* products, int count,
             int threads) {
    const Lanes lanes(kernels, type);
    std::vector<Packed> packed = distinct_activations(lanes, products, count);
    const std::int64_t panels = groups_of(std::min(M, kTokens), kPanel);
    std::vector<ForwardScratch> scratches;
    for (int slot = 0; slot < threads; ++slot) scratches.emplace_back(panels);
    for (std::int64_t m0 = 0; m0 < M; m0 += kTokens) {
        ForwardPass pass(lanes, packed, m0, std::min(kTokens, M - m0));
        pass.pack(threads);
        const std::vector<ForwardTask> tasks = forward_tasks(products, count, pass.panels(), threads);
        auto work = [&](std::int64_t slot, std::int64_t task) {
            pass.run(tasks[static_cast<std::size_t>(task)], scratches[static_cast<std::size_t>(slot)]);
        };
        parallel_tasks(static_cast<std::int64_t>(tasks.size()), threads, work);
    }
}

}  // namespace halfbyte

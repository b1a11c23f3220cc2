// The Python module `halfbyte._native`: pointers and sizes in, nothing checked (that is `ops.py`), no tensors
// known.
#include "bindings.hpp"

#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "dispatch.hpp"
#include "parallel.hpp"
#include "product.hpp"

namespace nb = nanobind;

namespace halfbyte {
namespace {

using WeightTuple =
    std::tuple<Pointer, Pointer, Pointer, Pointer, Pointer, float, std::int64_t, std::int64_t, std::int64_t>;
// A term of a product: activations and their stride; the weight in 4 bits, or a dense one and its stride
// (then the tuple before is not read); rows and columns of the weight.
using TermTuple =
    std::tuple<Pointer, std::int64_t, WeightTuple, Pointer, std::int64_t, std::int64_t, std::int64_t>;
// A product: its terms, bias, residual, result, stride and type of the result, M.
using ProductTuple =
    std::tuple<std::vector<TermTuple>, Pointer, Pointer, Pointer, std::int64_t, int, std::int64_t>;
using CodebookTuple = std::tuple<std::array<float, 15>, std::array<int, 16>, std::array<float, 16>>;
using SearchTuple = std::tuple<float, float, int, int>;

std::atomic<const Kernels*> active{nullptr};

Weight weight_of(const WeightTuple& t) {
    return {.codes = at<const std::uint8_t>(std::get<0>(t)),
            .scales = at<const void>(std::get<1>(t)),
            .codebook = at<const float>(std::get<2>(t)),
            .nested_scales = at<const float>(std::get<3>(t)),
            .nested_codebook = at<const float>(std::get<4>(t)),
            .offset = std::get<5>(t),
            .blocksize = std::get<6>(t),
            .rows = std::get<7>(t),
            .cols = std::get<8>(t)};
}

// The terms of a product with the weights they point to, which stay where they are.
struct Terms {
    std::vector<Weight> weights;
    std::vector<Term> terms;

    explicit Terms(const std::vector<TermTuple>& tuples) {
        weights.reserve(tuples.size());
        for (const auto& [a, stride, weight, dense, dense_stride, rows, cols] : tuples) {
            weights.push_back(weight_of(weight));
            const Weight* quantised = dense == 0 ? &weights.back() : nullptr;
            terms.push_back(
                {at<const void>(a), stride, {quantised, at<const void>(dense), rows, cols, dense_stride}});
        }
    }
    int count() const { return static_cast<int>(terms.size()); }
};

std::vector<Terms> terms_of(const std::vector<ProductTuple>& tuples) {
    std::vector<Terms> all;
    for (const ProductTuple& tuple : tuples) all.emplace_back(std::get<0>(tuple));
    return all;
}

Codebook codebook_of(const CodebookTuple& t) {
    Codebook codebook{};
    std::copy_n(std::get<0>(t).begin(), 15, codebook.thresholds);
    std::transform(std::get<1>(t).begin(), std::get<1>(t).end(), codebook.order,
                   [](int code) { return static_cast<std::uint8_t>(code); });
    std::copy_n(std::get<2>(t).begin(), 16, codebook.values);
    return codebook;
}

template <class Work>
void over_blocks(std::int64_t count, std::int64_t blocksize, int threads, Work&& work) {
    auto part = [&](std::int64_t, std::int64_t first, std::int64_t last) { work(first, last); };
    parallel((count + blocksize - 1) / blocksize, threads, part);
}

}  // namespace

const Kernels& active_kernels() {
    const Kernels* chosen = active.load(std::memory_order_relaxed);
    return chosen != nullptr ? *chosen : *best_kernels();
}

NB_MODULE(_native, m) {
    const auto release = nb::call_guard<nb::gil_scoped_release>();

    m.def("instruction_sets", [] {
        std::vector<std::pair<std::string, std::string>> states;
        for (int i = 0; i < kInstructionSets; ++i) {
            const InstructionSet& set = instruction_sets()[i];
            states.emplace_back(set.name, set.kernels == nullptr ? "not compiled"
                                          : set.runs             ? "runs"
                                                                 : "not here");
        }
        return states;
    });
    m.def("active", [] { return std::string(active_kernels().name); });
    m.def("thread_source", [] { return std::string(thread_source()); });
    m.def("use", [](const std::string& name) {
        for (int i = 0; i < kInstructionSets; ++i) {
            const InstructionSet& set = instruction_sets()[i];
            if (name != set.name || set.kernels == nullptr || !set.runs) continue;
            active.store(set.kernels);
            return true;
        }
        return false;
    });

    m.def(
        "arithmetic",
        [](std::int64_t rounds, bool pairs, int threads) {
            std::atomic<std::int64_t> operations{0};
            auto work = [&](std::int64_t, std::int64_t, std::int64_t) {
                float ignored = 0;
                operations += active_kernels().arithmetic(rounds, pairs, &ignored);
            };
            parallel(threads, threads, work);
            return operations.load();
        },
        release);
    m.def(
        "read",
        [](Pointer numbers, std::int64_t count, int threads) {
            std::atomic<std::uint64_t> total{0};
            auto work = [&](std::int64_t, std::int64_t begin, std::int64_t end) {
                std::uint64_t sum = 0;
                for (std::int64_t i = begin; i < end; ++i) sum += at<const std::uint64_t>(numbers)[i];
                total += sum;
            };
            parallel(count, threads, work);
            return total.load();
        },
        release);
    m.def(
        "block_scales",
        [](Pointer numbers, int type, std::int64_t count, std::int64_t blocksize, Pointer scales,
           int threads) {
            over_blocks(count, blocksize, threads, [&](std::int64_t first, std::int64_t last) {
                active_kernels().block_scales(at<const void>(numbers), Type(type), count, blocksize, first,
                                              last, at<float>(scales));
            });
        },
        release);
    m.def(
        "search_scales",
        [](Pointer numbers, int type, std::int64_t count, std::int64_t blocksize, const CodebookTuple& values,
           const SearchTuple& where, Pointer scales, int threads) {
            const Codebook codebook = codebook_of(values);
            const auto [from, to, trials, refinements] = where;
            const Search search{from, to, trials, refinements};
            over_blocks(count, blocksize, threads, [&](std::int64_t first, std::int64_t last) {
                active_kernels().search_scales(at<const void>(numbers), Type(type), count, blocksize,
                                               codebook, search, first, last, at<float>(scales));
            });
        },
        release);
    m.def(
        "encode",
        [](Pointer numbers, int type, std::int64_t count, std::int64_t blocksize, const CodebookTuple& values,
           Pointer scales, Pointer codes, int threads) {
            const Codebook codebook = codebook_of(values);
            over_blocks(count, blocksize, threads, [&](std::int64_t first, std::int64_t last) {
                active_kernels().encode(at<const void>(numbers), Type(type), count, blocksize, codebook,
                                        at<const float>(scales), first, last, at<std::uint8_t>(codes));
            });
        },
        release);
    m.def(
        "dequantize",
        [](const WeightTuple& weight, int type, Pointer out, int threads) {
            dequantize(active_kernels(), weight_of(weight), Type(type), at<void>(out), threads);
        },
        release);
    m.def(
        "forward",
        [](const std::vector<ProductTuple>& tuples, int type, int threads) {
            const std::vector<Terms> terms = terms_of(tuples);
            std::vector<Forward> products;
            std::int64_t M = 0;
            for (std::size_t i = 0; i < tuples.size(); ++i) {
                const auto& [_, bias, residual, out, stride, out_type, rows] = tuples[i];
                products.push_back({terms[i].terms.data(),
                                    terms[i].count(),
                                    at<const void>(bias),
                                    at<const void>(residual),
                                    {at<void>(out), stride, Type(out_type)}});
                M = rows;
            }
            forward(active_kernels(), Type(type), M, products.data(), static_cast<int>(products.size()),
                    threads);
        },
        release);
    m.def(
        "backward",
        [](const std::vector<ProductTuple>& tuples, int type, int threads) {
            const std::vector<Terms> terms = terms_of(tuples);
            std::vector<Backward> products;
            for (std::size_t i = 0; i < tuples.size(); ++i) {
                const auto& [_, bias, residual, out, stride, out_type, rows] = tuples[i];
                products.push_back({rows,
                                    terms[i].terms.data(),
                                    terms[i].count(),
                                    at<const void>(residual),
                                    {at<void>(out), stride, Type(out_type)}});
            }
            backward(active_kernels(), Type(type), products.data(), static_cast<int>(products.size()),
                     threads);
        },
        release);
    bind_adamw(m);
    bind_elementwise(m);
    bind_loss(m);
    bind_attention(m);
}

}  // namespace halfbyte

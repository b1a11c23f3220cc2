// Attention in the module `halfbyte._native`.
#include <nanobind/nanobind.h>
#include <nanobind/stl/tuple.h>

#include <tuple>

#include "attention.hpp"
#include "bindings.hpp"

namespace nb = nanobind;

namespace halfbyte {
namespace {

using HeadsTuple = std::tuple<Pointer, std::int64_t, std::int64_t, std::int64_t>;
// type, T, H, Hkv, D, documents, count, scale, causal, window
using AttentionTuple = std::tuple<int, std::int64_t, std::int64_t, std::int64_t, std::int64_t, Pointer,
                                  std::int64_t, float, bool, std::int64_t>;

Heads heads_of(const HeadsTuple& t) {
    return {at<void>(std::get<0>(t)), std::get<1>(t), std::get<2>(t), std::get<3>(t)};
}

Attention attention_of(const AttentionTuple& t) {
    return {.type = Type(std::get<0>(t)),
            .T = std::get<1>(t),
            .H = std::get<2>(t),
            .Hkv = std::get<3>(t),
            .D = std::get<4>(t),
            .documents = at<const std::int32_t>(std::get<5>(t)),
            .count = std::get<6>(t),
            .scale = std::get<7>(t),
            .causal = std::get<8>(t),
            .window = std::get<9>(t)};
}

}  // namespace

void bind_attention(nb::module_& m) {
    const auto release = nb::call_guard<nb::gil_scoped_release>();

    m.def(
        "attention",
        [](const AttentionTuple& what, const HeadsTuple& q, const HeadsTuple& k, const HeadsTuple& v,
           const HeadsTuple& out, Pointer lse, int threads) {
            attention(active_kernels(), attention_of(what), heads_of(q), heads_of(k), heads_of(v),
                      heads_of(out), at<float>(lse), threads);
        },
        release);
    m.def(
        "attention_grad",
        [](const AttentionTuple& what, const HeadsTuple& dout, const HeadsTuple& q, const HeadsTuple& k,
           const HeadsTuple& v, const HeadsTuple& out, Pointer lse, const HeadsTuple& dq,
           const HeadsTuple& dk, const HeadsTuple& dv, int threads) {
            attention_grad(active_kernels(), attention_of(what), heads_of(dout), heads_of(q), heads_of(k),
                           heads_of(v), heads_of(out), at<const float>(lse), heads_of(dq), heads_of(dk),
                           heads_of(dv), threads);
        },
        release);
}

}  // namespace halfbyte

// The element-wise and row-wise operations in Python: pointers, strides and sizes in, nothing checked.
#include <nanobind/stl/tuple.h>

#include <tuple>

#include "bindings.hpp"
#include "elementwise.hpp"

namespace nb = nanobind;

namespace halfbyte {
namespace {

using ExtentTuple = std::tuple<std::int64_t, std::int64_t, std::int64_t, std::int64_t>;
using RowsTuple = std::tuple<Pointer, int, std::int64_t, std::int64_t, std::int64_t>;
using VectorsTuple = std::tuple<int, Pointer, Pointer>;  // type, weight, bias

Extent extent_of(const ExtentTuple& t) {
    return {std::get<0>(t), std::get<1>(t), std::get<2>(t), std::get<3>(t)};
}

Rows rows_of(const RowsTuple& t) {
    return {at<void>(std::get<0>(t)), Type(std::get<1>(t)), {std::get<2>(t), std::get<3>(t), std::get<4>(t)}};
}

}  // namespace

void bind_elementwise(nb::module_& m) {
    const auto release = nb::call_guard<nb::gil_scoped_release>();

    m.def(
        "norm_forward",
        [](int kind, float eps, const ExtentTuple& extent, const RowsTuple& x, const RowsTuple& y,
           const RowsTuple& residual, const RowsTuple& total, const VectorsTuple& vectors, Pointer mean,
           Pointer rstd, int threads) {
            const auto [type, weight, bias] = vectors;
            const Norm norm{.kind = NormKind(kind),
                            .extent = extent_of(extent),
                            .eps = eps,
                            .x = rows_of(x),
                            .y = rows_of(y),
                            .residual = rows_of(residual),
                            .total = rows_of(total),
                            .weight = at<const void>(weight),
                            .bias = at<const void>(bias),
                            .weight_type = Type(type),
                            .mean = at<float>(mean),
                            .rstd = at<float>(rstd)};
            norm_forward(active_kernels(), norm, threads);
        },
        release);
    m.def(
        "norm_backward",
        [](int kind, const ExtentTuple& extent, const RowsTuple& dy, const RowsTuple& x, const RowsTuple& dx,
           const RowsTuple& residual_grad, const VectorsTuple& vectors, Pointer mean, Pointer rstd,
           Pointer dweight, Pointer dbias, int threads) {
            const NormGradient norm{.kind = NormKind(kind),
                                    .extent = extent_of(extent),
                                    .dy = rows_of(dy),
                                    .x = rows_of(x),
                                    .dx = rows_of(dx),
                                    .residual_grad = rows_of(residual_grad),
                                    .weight = at<const void>(std::get<1>(vectors)),
                                    .weight_type = Type(std::get<0>(vectors)),
                                    .mean = at<const float>(mean),
                                    .rstd = at<const float>(rstd),
                                    .dweight = at<float>(dweight),
                                    .dbias = at<float>(dbias)};
            norm_backward(active_kernels(), norm, threads);
        },
        release);
    m.def(
        "rotate",
        [](const ExtentTuple& extent, const RowsTuple& x, const RowsTuple& out, const RowsTuple& cos,
           const RowsTuple& sin, std::int64_t rotated, bool inverse, int threads) {
            const Rotation rotation{.extent = extent_of(extent),
                                    .x = rows_of(x),
                                    .out = rows_of(out),
                                    .cos = rows_of(cos),
                                    .sin = rows_of(sin),
                                    .rotated = rotated,
                                    .inverse = inverse};
            rotate(active_kernels(), rotation, threads);
        },
        release);
    m.def(
        "gate_forward",
        [](int kind, const ExtentTuple& extent, const RowsTuple& gate, const RowsTuple& up,
           const RowsTuple& h, int threads) {
            const Gate work{.kind = Activation(kind),
                            .extent = extent_of(extent),
                            .gate = rows_of(gate),
                            .up = rows_of(up),
                            .h = rows_of(h)};
            gate_forward(active_kernels(), work, threads);
        },
        release);
    m.def(
        "gate_backward",
        [](int kind, const ExtentTuple& extent, const RowsTuple& dh, const RowsTuple& gate,
           const RowsTuple& up, const RowsTuple& dgate, const RowsTuple& dup, const RowsTuple& h,
           int threads) {
            const GateGradient work{.kind = Activation(kind),
                                    .extent = extent_of(extent),
                                    .dh = rows_of(dh),
                                    .gate = rows_of(gate),
                                    .up = rows_of(up),
                                    .dgate = rows_of(dgate),
                                    .dup = rows_of(dup),
                                    .h = rows_of(h)};
            gate_backward(active_kernels(), work, threads);
        },
        release);
}

}  // namespace halfbyte

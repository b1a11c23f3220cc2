// `halfbyte._native.loss_rows`: pointers and sizes in, nothing checked.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/tuple.h>

#include <optional>
#include <tuple>

#include "bindings.hpp"
#include "loss.hpp"

namespace nb = nanobind;

namespace halfbyte {
namespace {

using Terms = std::tuple<double, double, float, float>;  // as `LossTerms` in loss_terms.py

}  // namespace

void bind_loss(nb::module_& m) {
    m.def(
        "loss_rows",
        [](Pointer logits, std::int64_t rows, std::int64_t count, Pointer targets, Pointer bias,
           const Terms& terms, std::optional<int> gradient, double factor, Pointer nll, Pointer objective,
           int threads) {
            const auto [smoothing, z_loss, cap, scale] = terms;
            const LossRows job{.logits = at<float>(logits),
                               .targets = at<const std::int64_t>(targets),
                               .bias = at<const float>(bias),
                               .rows = rows,
                               .count = count,
                               .bend = {.scale = scale, .cap = cap},
                               .smoothing = smoothing,
                               .z_loss = z_loss,
                               .nll = at<double>(nll),
                               .objective = at<double>(objective)};
            loss_rows(active_kernels(), job, gradient ? std::optional(Type(*gradient)) : std::nullopt, factor,
                      threads);
        },
        nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg().none(), nb::arg(),
        nb::arg(), nb::arg(), nb::arg(), nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace halfbyte

// AdamW with 8-bit states in Python: pointers and sizes in, nothing checked.
#include <nanobind/stl/tuple.h>

#include <tuple>

#include "adamw.hpp"
#include "bindings.hpp"

namespace nb = nanobind;

namespace halfbyte {
namespace {

using StateTuple = std::tuple<Pointer, Pointer, Pointer, Pointer>;  // codes, scales; values, thresholds
using FactorsTuple = std::tuple<float, float, float, float, float, float, float>;

}  // namespace

void bind_adamw(nb::module_& m) {
    m.def(
        "adamw_8bit",
        [](Pointer p, Pointer g, std::int64_t count, const StateTuple& average, const StateTuple& squares,
           const FactorsTuple& factors, int threads) {
            const auto [m_codes, m_scale, m_values, m_thresholds] = average;
            const auto [v_codes, v_scale, v_values, v_thresholds] = squares;
            const auto [beta1, m_share, beta2, v_share, decay, step, eps] = factors;
            const AdamStep work{
                .p = at<float>(p),
                .g = at<const float>(g),
                .m = at<std::uint8_t>(m_codes),
                .v = at<std::uint8_t>(v_codes),
                .m_scale = at<float>(m_scale),
                .v_scale = at<float>(v_scale),
                .count = count,
                .m_values = at<const float>(m_values),
                .v_values = at<const float>(v_values),
                .m_map = dynamic_map(at<const float>(m_values) + kZero, at<const float>(m_thresholds) + kZero,
                                     128),
                .v_map = dynamic_map(at<const float>(v_values), at<const float>(v_thresholds), 255),
                .beta1 = beta1,
                .m_share = m_share,
                .beta2 = beta2,
                .v_share = v_share,
                .decay = decay,
                .step = step,
                .eps = eps};
            adamw_8bit(active_kernels(), work, threads);
        },
        nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace halfbyte

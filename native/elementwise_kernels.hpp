// The functions of `ElementwiseKernels`, once for all instruction sets: W is the vector of the file that
// includes this, see `vector::One`. Everything is in an unnamed namespace, see kernels.hpp. X is the type of
// x and of all that has its type, Y the type of y and dy.
#pragma once

#include <math.h>

#include "row_loops.hpp"
#include "vector_math.hpp"

namespace halfbyte {
namespace {
namespace rows {

template <Activation kind, class F>
inline F activated(F x) {
    if constexpr (kind == Activation::relu) return select(x < F(0.0f), F(0.0f), x);
    const F above = at_least(x, -128.0f);  // so that -infinity times 0 never happens
    if constexpr (kind == Activation::silu) return above * vector::sigmoid(above);
    if constexpr (kind == Activation::gelu) return above * vector::normal(above).cumulative;
    // (1 + tanh u) / 2 = sigmoid(2 u), which does not cancel.
    if constexpr (kind == Activation::gelu_tanh)
        return above * vector::sigmoid((above + above * above * above * 0.044715f) * 1.5957691f);
}

template <class F>
struct Slope {
    F value, slope;
};

// `activated` to the bit, and its derivative; beyond 128 the latter is 0 or 1.
template <Activation kind, class F>
inline Slope<F> sloped(F x) {
    if constexpr (kind == Activation::relu) {
        const F corner = magnitude(x);  // 0, or NaN
        return {activated<kind>(x), select(F(0.0f) < x, F(1.0f), select(x < F(0.0f), F(0.0f), corner))};
    }
    const F above = at_least(x, -128.0f), within = at_most(above, 128.0f);
    if constexpr (kind == Activation::silu) {
        const F s = vector::sigmoid(within);
        return {above * s, s * (within * (F(1.0f) - s) + 1.0f)};
    }
    if constexpr (kind == Activation::gelu) {
        const vector::Normal<F> normal = vector::normal(within);
        return {above * normal.cumulative, normal.cumulative + within * normal.density};
    }
    if constexpr (kind == Activation::gelu_tanh) {
        const F square = within * within;
        const F s = vector::sigmoid((within + square * within * 0.044715f) * 1.5957691f);
        const F inner = (square * 0.134145f + 1.0f) * 1.5957691f;
        return {above * s, s + within * (s * (F(1.0f) - s)) * inner};
    }
}

// Many is W, or several of them, for loops with an exponential in them.
template <class W, class Many>
struct Elementwise {
    template <Type X, Type Y, NormKind kind>
    static void norm_forward_as(const Norm& norm, const float* weight, const float* bias, std::int64_t first,
                                std::int64_t last) {
        const std::int64_t cols = norm.extent.cols;
        const auto size = static_cast<float>(cols);
        Place place(norm.extent, first);
        for (std::int64_t row = first; row < last; ++row, place.advance(norm.extent)) {
            const char* x = address(norm.x, place, 0);
            char* y = address(norm.y, place, 0);
            if (norm.residual.data != nullptr) {
                const char* residual = address(norm.residual, place, 0);
                char* total = address(norm.total, place, 0);
                each<W>(cols, [=](auto at, std::int64_t i) {
                    at.template store<X>(at.template load<X>(x, i) + at.template load<X>(residual, i), total,
                                         i);
                });
                x = total;
            }
            float mean = 0.0f;
            if constexpr (kind == NormKind::layer)
                mean = sum_of<W>(cols, [=](auto at, std::int64_t i) { return at.template load<X>(x, i); }) /
                       size;
            const float squares = sum_of<W>(cols, [=](auto at, std::int64_t i) {
                const W off = at.template load<X>(x, i) - W(mean);
                return off * off;
            });
            const float rstd = 1.0f / ::sqrtf(squares / size + norm.eps);
            each<W>(cols, [=](auto at, std::int64_t i) {
                W n = (at.template load<X>(x, i) - W(mean)) * W(rstd);
                if constexpr (kind == NormKind::rms) n = n.template rounded<X>();
                W product = n * at.template load<Type::f32>(weight, i);
                if constexpr (kind == NormKind::layer)
                    product = product + at.template load<Type::f32>(bias, i);
                at.template store<Y>(product, y, i);
            });
            norm.rstd[row] = rstd;
            if constexpr (kind == NormKind::layer) norm.mean[row] = mean;
        }
    }

    template <Type X, Type Y, NormKind kind>
    static void norm_backward_as(const NormGradient& norm, const float* weight, std::int64_t first,
                                 std::int64_t last, float* dweight, float* dbias) {
        const std::int64_t cols = norm.extent.cols;
        const auto size = static_cast<float>(cols);
        Place place(norm.extent, first);
        for (std::int64_t row = first; row < last; ++row, place.advance(norm.extent)) {
            const char *dy = address(norm.dy, place, 0), *x = address(norm.x, place, 0);
            char* dx = address(norm.dx, place, 0);
            const float mean = kind == NormKind::layer ? norm.mean[row] : 0.0f, rstd = norm.rstd[row];
            const auto normalised = [=](auto at, std::int64_t i) {
                return (at.template load<X>(x, i) - W(mean)) * W(rstd);
            };
            const auto weighted = [=](auto at, std::int64_t i) {
                return at.template load<Y>(dy, i) * at.template load<Type::f32>(weight, i);
            };
            const float slope =
                sum_of<W>(cols,
                          [=](auto at, std::int64_t i) { return weighted(at, i) * normalised(at, i); }) /
                size;
            const float shift = kind == NormKind::layer ? sum_of<W>(cols, weighted) / size : 0.0f;
            if (dweight != nullptr)  // before dx, which may lie where dy or x does
                each<W>(cols, [=](auto at, std::int64_t i) {
                    const W back = at.template load<Y>(dy, i);
                    W n = normalised(at, i);
                    if constexpr (kind == NormKind::rms) n = n.template rounded<X>();
                    at.template store<Type::f32>(at.template load<Type::f32>(dweight, i) + back * n, dweight,
                                                 i);
                    if (dbias != nullptr)
                        at.template store<Type::f32>(at.template load<Type::f32>(dbias, i) + back, dbias, i);
                });
            const auto along_row = [=](auto at, std::int64_t i) {
                return W(rstd) * (weighted(at, i) - W(shift) - normalised(at, i) * W(slope));
            };
            if (norm.residual_grad.data == nullptr) {
                each<W>(cols,
                        [=](auto at, std::int64_t i) { at.template store<X>(along_row(at, i), dx, i); });
            } else {
                const char* residual = address(norm.residual_grad, place, 0);
                each<W>(cols, [=](auto at, std::int64_t i) {
                    at.template store<X>(along_row(at, i) + at.template load<X>(residual, i), dx, i);
                });
            }
        }
    }

    // Columns of the tables turned at a time: four buffers of floats stay in L1.
    static constexpr std::int64_t kTurned = 256;

    template <Type X>
    static void rotate_as(const Rotation& rotation, std::int64_t first, std::int64_t last) {
        const Extent& extent = rotation.extent;
        const std::int64_t half = rotation.rotated / 2, rest = extent.cols - rotation.rotated;
        for (std::int64_t token = first; token < last; ++token)
            for (std::int64_t column = 0; column < half; column += kTurned) {
                const std::int64_t count = half - column < kTurned ? half - column : kTurned;
                Place place(extent, token * extent.inner);
                alignas(64) float cos1[kTurned], cos2[kTurned], sin1[kTurned], sin2[kTurned];
                widen(rotation.cos, place, column, count, 1.0f, cos1);
                widen(rotation.cos, place, half + column, count, 1.0f, cos2);
                widen(rotation.sin, place, column, count, rotation.inverse ? 1.0f : -1.0f, sin1);
                widen(rotation.sin, place, half + column, count, rotation.inverse ? 1.0f : -1.0f, sin2);
                // What x2 adds to the first half, and x1 takes from the second.
                const float* adds = rotation.inverse ? sin2 : sin1;
                const float* takes = rotation.inverse ? sin1 : sin2;
                for (place.inner = 0; place.inner < extent.inner; ++place.inner) {
                    const char* x1 = address(rotation.x, place, column);
                    const char* x2 = address(rotation.x, place, half + column);
                    char* out1 = address(rotation.out, place, column);
                    char* out2 = address(rotation.out, place, half + column);
                    each<W>(count, [=, &cos1, &cos2](auto at, std::int64_t i) {
                        const W a = at.template load<X>(x1, i), b = at.template load<X>(x2, i);
                        const W c1 = at.template load<Type::f32>(cos1, i),
                                c2 = at.template load<Type::f32>(cos2, i);
                        at.template store<X>(a * c1 + b * at.template load<Type::f32>(adds, i), out1, i);
                        at.template store<X>(b * c2 - a * at.template load<Type::f32>(takes, i), out2, i);
                    });
                    if (column == 0 && rest > 0 && rotation.out.data != rotation.x.data)
                        std::memcpy(address(rotation.out, place, rotation.rotated),
                                    address(rotation.x, place, rotation.rotated),
                                    static_cast<std::size_t>(rest * size_of(X)));
                }
            }
    }

    static void widen(const Rows& rows, const Place& place, std::int64_t column, std::int64_t count,
                      float factor, float* out) {
        const char* numbers = address(rows, place, column);
        with_type(rows.type, [=](auto type) {
            each<W>(count, [=](auto at, std::int64_t i) {
                at.template store<Type::f32>(at.template load<type.value>(numbers, i) * W(factor), out, i);
            });
        });
    }

    // Calls work(place, column, count) for pieces first … last-1.
    template <class Work>
    static void over_pieces(const Extent& extent, std::int64_t first, std::int64_t last, Work&& work) {
        const std::int64_t per_row = (extent.cols + kPiece - 1) / kPiece;
        Place place(extent, first / per_row);
        std::int64_t column = first % per_row * kPiece;
        for (std::int64_t piece = first; piece < last; ++piece) {
            work(place, column, extent.cols - column < kPiece ? extent.cols - column : kPiece);
            column += kPiece;
            if (column < extent.cols) continue;
            column = 0;
            place.advance(extent);
        }
    }

    template <Type X, Activation kind>
    static void gate_forward_as(const Gate& gate, std::int64_t first, std::int64_t last) {
        over_pieces(gate.extent, first, last,
                    [&](const Place& place, std::int64_t column, std::int64_t count) {
                        const char* x = address(gate.gate, place, column);
                        char* h = address(gate.h, place, column);
                        if (gate.up.data == nullptr)
                            return each<Many>(count, [=](auto at, std::int64_t i) {
                                at.template store<X>(activated<kind>(at.template load<X>(x, i)), h, i);
                            });
                        const char* up = address(gate.up, place, column);
                        each<Many>(count, [=](auto at, std::int64_t i) {
                            const Many act = activated<kind>(at.template load<X>(x, i)).template rounded<X>();
                            at.template store<X>(act * at.template load<X>(up, i), h, i);
                        });
                    });
    }

    template <Type X, Activation kind>
    static void gate_backward_as(const GateGradient& gate, std::int64_t first, std::int64_t last) {
        over_pieces(
            gate.extent, first, last, [&](const Place& place, std::int64_t column, std::int64_t count) {
                const char *dh = address(gate.dh, place, column), *x = address(gate.gate, place, column);
                char* dgate = address(gate.dgate, place, column);
                if (gate.up.data == nullptr)
                    return each<Many>(count, [=](auto at, std::int64_t i) {
                        const Many slope = sloped<kind>(at.template load<X>(x, i)).slope;
                        at.template store<X>(at.template load<X>(dh, i) * slope, dgate, i);
                    });
                const char* up = address(gate.up, place, column);
                char* dup = address(gate.dup, place, column);
                char* h = gate.h.data != nullptr ? address(gate.h, place, column) : nullptr;
                each<Many>(count, [=](auto at, std::int64_t i) {
                    const Slope<Many> curve = sloped<kind>(at.template load<X>(x, i));
                    const Many back = at.template load<X>(dh, i), factor = at.template load<X>(up, i);
                    const Many act = curve.value.template rounded<X>();
                    at.template store<X>(back * factor * curve.slope, dgate, i);
                    at.template store<X>(back * act, dup, i);
                    if (h != nullptr) at.template store<X>(act * factor, h, i);
                });
            });
    }

    // From what is known when it runs to what is known when it is compiled: work(constant).
    template <Type type>
    struct TypeIs {
        static constexpr Type value = type;
    };
    template <NormKind kind>
    struct NormIs {
        static constexpr NormKind value = kind;
    };
    template <Activation kind>
    struct ActivationIs {
        static constexpr Activation value = kind;
    };

    template <class Work>
    static void with_type(Type type, Work&& work) {
        if (type == Type::f32) return work(TypeIs<Type::f32>{});
        if (type == Type::bf16) return work(TypeIs<Type::bf16>{});
        return work(TypeIs<Type::f16>{});
    }

    // Calls work(x's type, y's type, kind). Only `rms` has a y of another type than x, which is then f32.
    template <class Work>
    static void with_norm(NormKind kind, Type x, Type y, Work&& work) {
        with_type(x, [&](auto type) {
            if (kind == NormKind::layer) return work(type, type, NormIs<NormKind::layer>{});
            if (kind == NormKind::rms_unit_offset)
                return work(type, type, NormIs<NormKind::rms_unit_offset>{});
            if (x == y) return work(type, type, NormIs<NormKind::rms>{});
            return work(type, TypeIs<Type::f32>{}, NormIs<NormKind::rms>{});
        });
    }

    template <class Work>
    static void with_activation(Activation kind, Type x, Work&& work) {
        with_type(x, [&](auto type) {
            if (kind == Activation::silu) return work(type, ActivationIs<Activation::silu>{});
            if (kind == Activation::gelu) return work(type, ActivationIs<Activation::gelu>{});
            if (kind == Activation::gelu_tanh) return work(type, ActivationIs<Activation::gelu_tanh>{});
            return work(type, ActivationIs<Activation::relu>{});
        });
    }

    static void norm_forward(const Norm& norm, const float* weight, const float* bias, std::int64_t first,
                             std::int64_t last) {
        with_norm(norm.kind, norm.x.type, norm.y.type, [&](auto x, auto y, auto kind) {
            norm_forward_as<x.value, y.value, kind.value>(norm, weight, bias, first, last);
        });
    }

    static void norm_backward(const NormGradient& norm, const float* weight, std::int64_t first,
                              std::int64_t last, float* dweight, float* dbias) {
        with_norm(norm.kind, norm.x.type, norm.dy.type, [&](auto x, auto y, auto kind) {
            norm_backward_as<x.value, y.value, kind.value>(norm, weight, first, last, dweight, dbias);
        });
    }

    static void rotate(const Rotation& rotation, std::int64_t first, std::int64_t last) {
        with_type(rotation.x.type, [&](auto x) { rotate_as<x.value>(rotation, first, last); });
    }

    static void gate_forward(const Gate& gate, std::int64_t first, std::int64_t last) {
        with_activation(gate.kind, gate.gate.type,
                        [&](auto x, auto kind) { gate_forward_as<x.value, kind.value>(gate, first, last); });
    }

    static void gate_backward(const GateGradient& gate, std::int64_t first, std::int64_t last) {
        with_activation(gate.kind, gate.gate.type,
                        [&](auto x, auto kind) { gate_backward_as<x.value, kind.value>(gate, first, last); });
    }

    static constexpr ElementwiseKernels kKernels = {norm_forward, norm_backward, rotate, gate_forward,
                                                    gate_backward};
};

}  // namespace rows
}  // namespace
}  // namespace halfbyte

// The functions of `ElementwiseKernels`, once for all instruction sets: plain loops over float buffers that
// the compiler vectorises with the flags of the file that includes this, around that file's own conversions.
// Everything is in an unnamed namespace, see kernels.hpp.
//
// Buffers are filled up with zeros to whole groups of 16 lanes and loops run over whole groups: no tails.
#pragma once

#include <math.h>

#include "elementwise.hpp"
#include "vector_math.hpp"

namespace halfbyte {
namespace {
namespace rows {

constexpr std::int64_t kLanes = 16;

using Buffer = float[kPiece];

inline std::int64_t whole(std::int64_t count) { return (count + kLanes - 1) / kLanes * kLanes; }
inline std::int64_t at_most(std::int64_t count, std::int64_t limit) { return count < limit ? count : limit; }

template <class Function>
inline void each(std::int64_t count, Function&& function) {
    const std::int64_t end = whole(count);
    for (std::int64_t i = 0; i < end; ++i) function(i);
}

// A sum in the order that is the same everywhere.
struct Sum {
    float lanes[kLanes] = {};

    template <class Function>
    void add(std::int64_t count, Function&& term) {
        float sum[kLanes];
        std::memcpy(sum, lanes, sizeof sum);
        for (std::int64_t i = 0; i < count; i += kLanes)
            for (std::int64_t l = 0; l < kLanes; ++l) sum[l] += term(i + l);
        std::memcpy(lanes, sum, sizeof sum);
    }

    float total() const {
        float eight[8], four[4];
        for (int l = 0; l < 8; ++l) eight[l] = lanes[l] + lanes[l + 8];
        for (int l = 0; l < 4; ++l) four[l] = eight[l] + eight[l + 4];
        return (four[0] + four[2]) + (four[1] + four[3]);
    }
};

// Where a row stands in its extent.
struct Place {
    std::int64_t outer, middle, inner;

    Place(const Extent& extent, std::int64_t row)
        : outer(row / extent.inner / extent.middle),
          middle(row / extent.inner % extent.middle),
          inner(row % extent.inner) {}

    void advance(const Extent& extent) {
        if (++inner < extent.inner) return;
        inner = 0;
        if (++middle < extent.middle) return;
        middle = 0;
        ++outer;
    }
};

inline char* address(const Rows& rows, const Place& place, std::int64_t column) {
    const std::int64_t element =
        rows.stride[0] * place.outer + rows.stride[1] * place.middle + rows.stride[2] * place.inner + column;
    return static_cast<char*>(rows.data) + element * (rows.type == Type::f32 ? 4 : 2);
}

template <Activation kind>
inline float activated(float x) {
    if constexpr (kind == Activation::relu) return x <= 0.0f ? 0.0f : x;
    const float above = x < -128.0f ? -128.0f : x;  // so that -infinity times 0 never happens
    if constexpr (kind == Activation::silu) return above * vector::sigmoid(above);
    if constexpr (kind == Activation::gelu) return above * vector::normal(above).cumulative;
    // (1 + tanh u) / 2 = sigmoid(2 u), which does not cancel.
    return above * vector::sigmoid(1.5957691f * (above + 0.044715f * (above * above * above)));
}

struct Slope {
    float value, slope;
};

// `activated` to the bit, and its derivative; beyond 128 the latter is 0 or 1.
template <Activation kind>
inline Slope sloped(float x) {
    if constexpr (kind == Activation::relu) return {x <= 0.0f ? 0.0f : x, x <= 0.0f ? 0.0f : 1.0f};
    const float above = x < -128.0f ? -128.0f : x, within = above > 128.0f ? 128.0f : above;
    if constexpr (kind == Activation::silu) {
        const float s = vector::sigmoid(within);
        return {above * s, s * (1.0f + within * (1.0f - s))};
    }
    if constexpr (kind == Activation::gelu) {
        const vector::Normal normal = vector::normal(within);
        return {above * normal.cumulative, normal.cumulative + within * normal.density};
    }
    const float square = within * within;
    const float s = vector::sigmoid(1.5957691f * (within + 0.044715f * (square * within)));
    const float inner = 1.5957691f * (1.0f + 0.134145f * square);
    return {above * s, s + within * (s * (1.0f - s)) * inner};
}

using ToFloat = void (*)(const void*, Type, std::int64_t, float*);
using FromFloat = void (*)(const float*, Type, std::int64_t, void*);

template <ToFloat to_float, FromFloat from_float>
struct Elementwise {
    static void read(const void* numbers, Type type, std::int64_t count, float* buffer) {
        if (type == Type::f32)
            std::memcpy(buffer, numbers, static_cast<std::size_t>(count) * sizeof(float));
        else
            to_float(numbers, type, count, buffer);
        for (std::int64_t i = count; i < whole(count); ++i) buffer[i] = 0.0f;
    }

    static void read(const Rows& rows, const Place& place, std::int64_t column, std::int64_t count,
                     float* buffer) {
        read(address(rows, place, column), rows.type, count, buffer);
    }

    static void write(const float* buffer, const Rows& rows, const Place& place, std::int64_t column,
                      std::int64_t count) {
        if (rows.type == Type::f32)
            std::memcpy(address(rows, place, column), buffer,
                        static_cast<std::size_t>(count) * sizeof(float));
        else
            from_float(buffer, rows.type, count, address(rows, place, column));
    }

    static void round(float* buffer, Type type, std::int64_t count) {
        if (type == Type::f32) return;
        std::uint16_t words[kPiece];
        from_float(buffer, type, whole(count), words);
        to_float(words, type, whole(count), buffer);
    }

    // A vector that every row needs, converted anew only when another piece of it is asked for.
    class Vector {
      public:
        Vector(const void* numbers, Type type, float offset)
            : numbers_(numbers), type_(type), offset_(offset) {}

        const float* piece(std::int64_t column, std::int64_t count) {
            if (column != column_) {
                column_ = column;
                read(static_cast<const char*>(numbers_) + column * (type_ == Type::f32 ? 4 : 2), type_, count,
                     buffer_);
                if (offset_ != 0.0f) each(count, [this](std::int64_t i) { buffer_[i] += offset_; });
            }
            return buffer_;
        }

      private:
        const void* numbers_;
        Type type_;
        float offset_;
        std::int64_t column_ = -1;
        alignas(64) Buffer buffer_;
    };

    // Reads a piece of what is normalised: x, or on the `first` visit the sum with the residual, which is
    // kept.
    static void read_normalised(const Norm& norm, const Place& place, std::int64_t column, std::int64_t count,
                                bool first, float* x) {
        if (norm.residual.data == nullptr) return read(norm.x, place, column, count, x);
        if (!first) return read(norm.total, place, column, count, x);
        alignas(64) Buffer residual;
        read(norm.x, place, column, count, x);
        read(norm.residual, place, column, count, residual);
        each(count, [&](std::int64_t i) { x[i] += residual[i]; });
        write(x, norm.total, place, column, count);
        round(x, norm.total.type, count);
    }

    static void norm_forward(const Norm& norm, std::int64_t first, std::int64_t last) {
        const Extent& extent = norm.extent;
        const auto cols = static_cast<float>(extent.cols);
        const bool layer = norm.kind == NormKind::layer;
        Vector weight(norm.weight, norm.weight_type, norm.kind == NormKind::rms_unit_offset ? 1.0f : 0.0f);
        Vector bias(norm.bias, norm.weight_type, 0.0f);
        alignas(64) Buffer x;
        Place place(extent, first);
        for (std::int64_t row = first; row < last; ++row, place.advance(extent)) {
            Sum sum, squares;
            for (std::int64_t c = 0; layer && c < extent.cols; c += kPiece) {
                const std::int64_t count = at_most(extent.cols - c, kPiece);
                read_normalised(norm, place, c, count, true, x);
                sum.add(count, [&](std::int64_t i) { return x[i]; });
            }
            const float mean = layer ? sum.total() / cols : 0.0f;
            for (std::int64_t c = 0; c < extent.cols; c += kPiece) {
                const std::int64_t count = at_most(extent.cols - c, kPiece);
                read_normalised(norm, place, c, count, !layer, x);
                if (layer) center(x, mean, count);
                squares.add(count, [&](std::int64_t i) { return x[i] * x[i]; });
            }
            const float rstd = 1.0f / ::sqrtf(squares.total() / cols + norm.eps);
            for (std::int64_t c = 0; c < extent.cols; c += kPiece) {
                const std::int64_t count = at_most(extent.cols - c, kPiece);
                read_normalised(norm, place, c, count, false, x);
                each(count, [&](std::int64_t i) { x[i] = (x[i] - mean) * rstd; });
                if (norm.kind == NormKind::rms) round(x, norm.x.type, count);
                const float* w = weight.piece(c, count);
                each(count, [&](std::int64_t i) { x[i] *= w[i]; });
                if (norm.bias != nullptr) {
                    const float* b = bias.piece(c, count);
                    each(count, [&](std::int64_t i) { x[i] += b[i]; });
                }
                write(x, norm.y, place, c, count);
            }
            norm.rstd[row] = rstd;
            if (norm.mean != nullptr) norm.mean[row] = mean;
        }
    }

    static void center(float* x, float mean, std::int64_t count) {
        each(count, [&](std::int64_t i) { x[i] -= mean; });
        for (std::int64_t i = count; i < whole(count); ++i) x[i] = 0.0f;
    }

    static void norm_backward(const NormGradient& norm, std::int64_t first, std::int64_t last, float* dweight,
                              float* dbias) {
        const Extent& extent = norm.extent;
        const auto cols = static_cast<float>(extent.cols);
        const bool layer = norm.kind == NormKind::layer;
        Vector weight(norm.weight, norm.weight_type, norm.kind == NormKind::rms_unit_offset ? 1.0f : 0.0f);
        alignas(64) Buffer dy, n, residual;
        Place place(extent, first);
        for (std::int64_t row = first; row < last; ++row, place.advance(extent)) {
            const float mean = layer ? norm.mean[row] : 0.0f, rstd = norm.rstd[row];
            Sum along, across;
            for (std::int64_t c = 0; c < extent.cols; c += kPiece) {
                const std::int64_t count = at_most(extent.cols - c, kPiece);
                read(norm.dy, place, c, count, dy);
                read(norm.x, place, c, count, n);
                const float* w = weight.piece(c, count);
                along.add(count, [&](std::int64_t i) { return dy[i] * w[i] * ((n[i] - mean) * rstd); });
                if (layer) across.add(count, [&](std::int64_t i) { return dy[i] * w[i]; });
            }
            const float slope = along.total() / cols, shift = layer ? across.total() / cols : 0.0f;
            for (std::int64_t c = 0; c < extent.cols; c += kPiece) {
                const std::int64_t count = at_most(extent.cols - c, kPiece);
                read(norm.dy, place, c, count, dy);
                read(norm.x, place, c, count, n);
                const float* w = weight.piece(c, count);
                alignas(64) Buffer dx;
                each(count, [&](std::int64_t i) {
                    n[i] = (n[i] - mean) * rstd;
                    dx[i] = rstd * (dy[i] * w[i] - shift - n[i] * slope);
                });
                if (norm.residual_grad.data != nullptr) {
                    read(norm.residual_grad, place, c, count, residual);
                    each(count, [&](std::int64_t i) { dx[i] += residual[i]; });
                }
                write(dx, norm.dx, place, c, count);
                if (dweight == nullptr) continue;
                if (norm.kind == NormKind::rms) round(n, norm.x.type, count);
                for (std::int64_t i = 0; i < count; ++i) dweight[c + i] += dy[i] * n[i];
                for (std::int64_t i = 0; dbias != nullptr && i < count; ++i) dbias[c + i] += dy[i];
            }
        }
    }

    static void rotate(const Rotation& rotation, std::int64_t first, std::int64_t last) {
        const Extent& extent = rotation.extent;
        const std::int64_t half = rotation.rotated / 2, rest = extent.cols - rotation.rotated;
        alignas(64) Buffer cos1, sin1, cos2, sin2, x1, x2;
        for (std::int64_t token = first; token < last; ++token)
            for (std::int64_t c = 0; c < half; c += kPiece) {
                const std::int64_t count = at_most(half - c, kPiece);
                Place place(extent, token * extent.inner);
                read(rotation.cos, place, c, count, cos1);
                read(rotation.cos, place, half + c, count, cos2);
                read(rotation.sin, place, c, count, sin1);
                read(rotation.sin, place, half + c, count, sin2);
                // What x2 adds to the first half, and x1 to the second.
                const float* cross1 = rotation.inverse ? sin2 : sin1;
                const float* cross2 = rotation.inverse ? sin1 : sin2;
                const float sign = rotation.inverse ? 1.0f : -1.0f;
                for (place.inner = 0; place.inner < extent.inner; ++place.inner) {
                    read(rotation.x, place, c, count, x1);
                    read(rotation.x, place, half + c, count, x2);
                    each(count, [&](std::int64_t i) {
                        const float turned = x1[i] * cos1[i] + x2[i] * cross1[i] * sign;
                        x2[i] = x2[i] * cos2[i] - x1[i] * cross2[i] * sign;
                        x1[i] = turned;
                    });
                    write(x1, rotation.out, place, c, count);
                    write(x2, rotation.out, place, half + c, count);
                    if (c == 0 && rest > 0 && rotation.out.data != rotation.x.data)
                        std::memcpy(address(rotation.out, place, rotation.rotated),
                                    address(rotation.x, place, rotation.rotated),
                                    static_cast<std::size_t>(rest * (rotation.x.type == Type::f32 ? 4 : 2)));
                }
            }
    }

    // Calls work(place, column, count) for pieces first … last-1.
    template <class Work>
    static void over_pieces(const Extent& extent, std::int64_t first, std::int64_t last, Work&& work) {
        const std::int64_t per_row = (extent.cols + kPiece - 1) / kPiece;
        Place place(extent, first / per_row);
        std::int64_t column = first % per_row * kPiece;
        for (std::int64_t piece = first; piece < last; ++piece) {
            work(place, column, at_most(extent.cols - column, kPiece));
            column += kPiece;
            if (column < extent.cols) continue;
            column = 0;
            place.advance(extent);
        }
    }

    template <Activation kind>
    static void gate_forward_as(const Gate& gate, std::int64_t first, std::int64_t last) {
        alignas(64) Buffer x, up;
        over_pieces(gate.extent, first, last,
                    [&](const Place& place, std::int64_t column, std::int64_t count) {
                        read(gate.gate, place, column, count, x);
                        each(count, [&](std::int64_t i) { x[i] = activated<kind>(x[i]); });
                        if (gate.up.data != nullptr) {
                            round(x, gate.gate.type, count);
                            read(gate.up, place, column, count, up);
                            each(count, [&](std::int64_t i) { x[i] *= up[i]; });
                        }
                        write(x, gate.h, place, column, count);
                    });
    }

    template <Activation kind>
    static void gate_backward_as(const GateGradient& gate, std::int64_t first, std::int64_t last) {
        alignas(64) Buffer x, up, dh, act, dx;
        over_pieces(gate.extent, first, last,
                    [&](const Place& place, std::int64_t column, std::int64_t count) {
                        read(gate.gate, place, column, count, x);
                        read(gate.dh, place, column, count, dh);
                        each(count, [&](std::int64_t i) {
                            const Slope at = sloped<kind>(x[i]);
                            act[i] = at.value;
                            dx[i] = at.slope;
                        });
                        if (gate.up.data == nullptr) {
                            each(count, [&](std::int64_t i) { dx[i] *= dh[i]; });
                            return write(dx, gate.dgate, place, column, count);
                        }
                        read(gate.up, place, column, count, up);
                        round(act, gate.gate.type, count);
                        each(count, [&](std::int64_t i) {
                            dx[i] *= dh[i] * up[i];
                            dh[i] *= act[i];
                            act[i] *= up[i];
                        });
                        write(dx, gate.dgate, place, column, count);
                        write(dh, gate.dup, place, column, count);
                        if (gate.h.data != nullptr) write(act, gate.h, place, column, count);
                    });
    }

    static void gate_forward(const Gate& gate, std::int64_t first, std::int64_t last) {
        switch (gate.kind) {
            case Activation::silu:
                return gate_forward_as<Activation::silu>(gate, first, last);
            case Activation::gelu:
                return gate_forward_as<Activation::gelu>(gate, first, last);
            case Activation::gelu_tanh:
                return gate_forward_as<Activation::gelu_tanh>(gate, first, last);
            case Activation::relu:
                return gate_forward_as<Activation::relu>(gate, first, last);
        }
    }

    static void gate_backward(const GateGradient& gate, std::int64_t first, std::int64_t last) {
        switch (gate.kind) {
            case Activation::silu:
                return gate_backward_as<Activation::silu>(gate, first, last);
            case Activation::gelu:
                return gate_backward_as<Activation::gelu>(gate, first, last);
            case Activation::gelu_tanh:
                return gate_backward_as<Activation::gelu_tanh>(gate, first, last);
            case Activation::relu:
                return gate_backward_as<Activation::relu>(gate, first, last);
        }
    }

    static constexpr ElementwiseKernels kKernels = {norm_forward, norm_backward, rotate, gate_forward,
                                                    gate_backward};
};

}  // namespace rows
}  // namespace
}  // namespace halfbyte

// Runs every element-wise and row-wise kernel of every instruction set of this machine on buffers of exactly
// the promised size, so that the sanitizers see any step outside, on one thread and on three, and compares
// with the portable version byte by byte. Exits 1 and says what differs.
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "../../native/dispatch.hpp"
#include "../../native/elementwise.hpp"

using namespace halfbyte;

namespace {

int failures = 0;
constexpr Type kTypes[] = {Type::f32, Type::bf16, Type::f16};

struct Case {
    const Kernels& kernels;
    int threads;
    Extent extent;
    Type type;
    std::int64_t gap;  // numbers between rows

    std::int64_t rows() const { return extent.outer * extent.middle * extent.inner; }
};

// Rows in memory that ends where the last one does; `seed` 0 leaves them unset.
struct Operand {
    std::vector<unsigned char> bytes;
    Rows rows;

    Operand(const Case& c, unsigned seed, std::int64_t gap, bool inner = true) : rows{} {
        const std::int64_t stride = c.extent.cols + gap, heads = inner ? c.extent.inner : 1;
        rows = {nullptr, c.type, {stride * heads * c.extent.middle, stride * heads, inner ? stride : 0}};
        const std::int64_t count = stride * (c.extent.outer * c.extent.middle * heads - 1) + c.extent.cols;
        bytes.assign(static_cast<std::size_t>(count * (c.type == Type::f32 ? 4 : 2)), 0);
        rows.data = bytes.data();
        if (seed == 0) return;
        std::mt19937 generator(seed);
        std::normal_distribution<float> normal(0.0f, 3.0f);
        std::vector<float> wide(static_cast<std::size_t>(count));
        for (float& number : wide) number = normal(generator);
        portable_kernels()->from_float(wide.data(), c.type, count, bytes.data());
    }
};

using Bytes = std::vector<unsigned char>;

void keep(Bytes& all, const void* data, std::size_t size) {
    const auto* first = static_cast<const unsigned char*>(data);
    all.insert(all.end(), first, first + size);
}

Bytes norms(const Case& c, NormKind kind, Type weight_type, bool with_residual) {
    const auto cols = static_cast<std::size_t>(c.extent.cols), rows = static_cast<std::size_t>(c.rows());
    Case vectors = c;
    vectors.extent = {1, 1, 1, c.extent.cols};
    vectors.type = weight_type;
    const Operand weight(vectors, 3, 0), bias(vectors, 4, 0);
    Case wide = c;
    if (kind == NormKind::rms && weight_type != c.type) wide.type = Type::f32;
    Operand x(c, 1, c.gap), residual(c, 2, 0), total(c, 0, 0), y(wide, 0, 0), dy(wide, 5, 0), dx(c, 0, 0);
    std::vector<float> mean(rows), rstd(rows), dweight(cols), dbias(cols);
    const bool layer = kind == NormKind::layer;
    Norm norm{kind,
              c.extent,
              1e-5f,
              x.rows,
              y.rows,
              {},
              {},
              weight.bytes.data(),
              layer ? bias.bytes.data() : nullptr,
              weight_type,
              layer ? mean.data() : nullptr,
              rstd.data()};
    if (with_residual) norm.residual = residual.rows, norm.total = total.rows;
    norm_forward(c.kernels, norm, c.threads);
    const NormGradient gradient{kind,
                                c.extent,
                                dy.rows,
                                x.rows,
                                dx.rows,
                                with_residual ? residual.rows : Rows{},
                                weight.bytes.data(),
                                weight_type,
                                norm.mean,
                                rstd.data(),
                                dweight.data(),
                                layer ? dbias.data() : nullptr};
    norm_backward(c.kernels, gradient, c.threads);
    Bytes all = y.bytes;
    for (const Bytes* more : {&total.bytes, &dx.bytes}) keep(all, more->data(), more->size());
    for (const std::vector<float>* more : {&mean, &rstd, &dweight, &dbias})
        keep(all, more->data(), more->size() * sizeof(float));
    return all;
}

Bytes rotations(const Case& c, bool inverse, bool in_place) {
    Operand x(c, 1, c.gap), out(c, 0, 0);
    const std::int64_t rotated = c.extent.cols / 2 * 2;
    Case tables = c;
    tables.extent.cols = rotated;
    const Operand cos(tables, 2, 0, false), sin(tables, 3, 0, false);
    const Rotation rotation{c.extent, x.rows, in_place ? x.rows : out.rows, cos.rows, sin.rows,
                            rotated,  inverse};
    rotate(c.kernels, rotation, c.threads);
    return in_place ? x.bytes : out.bytes;
}

Bytes gates(const Case& c, Activation kind, bool plain, bool in_place) {
    Operand gate(c, 1, c.gap), up(c, 2, c.gap), dh(c, 3, 0), h(c, 0, 0), dgate(c, 0, 0), dup(c, 0, 0),
        again(c, 0, 0);
    const Rows none{};
    gate_forward(c.kernels, {kind, c.extent, gate.rows, plain ? none : up.rows, h.rows}, c.threads);
    gate_backward(
        c.kernels,
        {kind, c.extent, dh.rows, gate.rows, plain ? none : up.rows, in_place ? gate.rows : dgate.rows,
         plain ? none : (in_place ? up.rows : dup.rows), plain ? none : again.rows},
        c.threads);
    Bytes all = h.bytes;
    for (const Bytes* more : {&gate.bytes, &up.bytes, &dgate.bytes, &dup.bytes, &again.bytes})
        keep(all, more->data(), more->size());
    return all;
}

template <class Run>
void compare(const char* what, const Kernels& kernels, const Extent& extent, Type type, std::int64_t gap,
             Run&& run) {
    const Bytes expected = run(Case{*portable_kernels(), 1, extent, type, gap});
    for (const int threads : {1, 3}) {
        if (run(Case{kernels, threads, extent, type, gap}) == expected) continue;
        ++failures;
        std::printf("%s of %s differs at %ld x %ld x %ld rows of %ld, type %d, %d threads\n", what,
                    kernels.name, static_cast<long>(extent.outer), static_cast<long>(extent.middle),
                    static_cast<long>(extent.inner), static_cast<long>(extent.cols), static_cast<int>(type),
                    threads);
    }
}

void grid(const Kernels& kernels, const Extent& extent, Type type, std::int64_t gap) {
    for (const NormKind kind : {NormKind::rms, NormKind::rms_unit_offset, NormKind::layer})
        for (const Type weight : kTypes)
            for (const bool residual : {false, true})
                compare("norm", kernels, extent, type, gap,
                        [=](const Case& c) { return norms(c, kind, weight, residual); });
    for (const bool inverse : {false, true})
        for (const bool in_place : {false, true})
            if (extent.cols > 1)
                compare("rotate", kernels, extent, type, gap,
                        [=](const Case& c) { return rotations(c, inverse, in_place); });
    for (const Activation kind :
         {Activation::silu, Activation::gelu, Activation::gelu_tanh, Activation::relu})
        for (const bool plain : {false, true})
            for (const bool in_place : {false, true})
                compare("gate", kernels, extent, type, gap,
                        [=](const Case& c) { return gates(c, kind, plain, in_place); });
}

}  // namespace

int main() {
    int tried = 0;
    for (int i = 0; i < kInstructionSets; ++i) {
        const InstructionSet& set = instruction_sets()[i];
        if (set.kernels == nullptr || !set.runs) continue;
        ++tried;
        for (const Type type : kTypes) {
            for (const std::int64_t cols : {1, 7, 33, 100}) {
                grid(*set.kernels, {2, 3, 2, cols}, type, 0);
                grid(*set.kernels, {1, 4, 3, cols}, type, 5);
            }
            grid(*set.kernels, {1, 1, 3, 1030}, type, 3);
            grid(*set.kernels, {1, 2, 20, 513}, type,
                 0);  // more than one thread, and more than one sum of weights
        }
        std::printf("%s: %d differences so far\n", set.name, failures);
    }
    return tried > 0 && failures == 0 ? 0 : 1;
}

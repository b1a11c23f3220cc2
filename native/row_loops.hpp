// Loops over rows of numbers a vector at a time: where rows lie, what is left over at their ends, sums in an
// order that does not depend on the vector. W is any vector type, see `vector::One`. Everything is in an
// unnamed namespace, see kernels.hpp.
#pragma once

#include <cstring>

#include "elementwise.hpp"

namespace halfbyte {
namespace {
namespace rows {

// Where a loop stands: at a whole vector W of numbers, or at the last `count`, which are too few for one.
template <class W>
struct Whole {
    template <Type type>
    W load(const void* numbers, std::int64_t i) const {
        return W::template load<type>(numbers, i);
    }
    template <Type type>
    void store(W value, void* numbers, std::int64_t i) const {
        value.template store<type>(numbers, i);
    }
};

template <class W>
struct Rest {
    std::int64_t count;

    template <Type type>
    W load(const void* numbers, std::int64_t i) const {
        unsigned char padded[W::kLanes * 4] = {};
        std::memcpy(padded, static_cast<const char*>(numbers) + i * size_of(type), bytes(type));
        return W::template load<type>(padded, 0);
    }
    template <Type type>
    void store(W value, void* numbers, std::int64_t i) const {
        unsigned char padded[W::kLanes * 4];
        value.template store<type>(padded, 0);
        std::memcpy(static_cast<char*>(numbers) + i * size_of(type), padded, bytes(type));
    }
    std::size_t bytes(Type type) const { return static_cast<std::size_t>(count * size_of(type)); }
};

// Calls work(at, i) for `count` numbers, a vector at a time: everything is read before anything is written.
template <class W, class Work>
inline void each(std::int64_t count, Work&& work) {
    std::int64_t i = 0;
    for (; i + W::kLanes <= count; i += W::kLanes) work(Whole<W>{}, i);
    if (i < count) work(Rest<W>{count - i}, i);
}

// The sum of term(at, i) over `count` numbers: 32 partial sums, number i in sum i % 32, folded in halves,
// whatever the vector. One chain of additions would wait for each; these are enough to keep a processor busy.
template <class W, class Term>
inline float sum_of(std::int64_t count, Term&& term) {
    constexpr int kSums = 32, kVectors = kSums / W::kLanes;
    W sums[kVectors];
    for (W& sum : sums) sum = W(0.0f);
    std::int64_t i = 0;
    for (; i + kSums <= count; i += kSums)
        for (int v = 0; v < kVectors; ++v) sums[v] = sums[v] + term(Whole<W>{}, i + v * W::kLanes);
    int v = 0;
    for (; i + W::kLanes <= count; i += W::kLanes, ++v) sums[v] = sums[v] + term(Whole<W>{}, i);
    if (i < count) {
        const Rest<W> rest{count - i};
        float terms[W::kLanes] = {};
        rest.template store<Type::f32>(term(rest, i), terms, 0);
        sums[v] = sums[v] + W::template load<Type::f32>(terms, 0);
    }
    for (int half = kVectors / 2; half > 0; half /= 2)
        for (int u = 0; u < half; ++u) sums[u] = sums[u] + sums[u + half];
    return sums[0].total();
}

// Two vectors as one. A function of one number is a chain of dependent operations; a processor holds only a
// few such chains at a time where they follow each other, and is kept busy where they are interleaved.
template <class W>
struct Twice {
    static constexpr int kLanes = 2 * W::kLanes;
    struct Mask {
        typename W::Mask a, b;
    };
    W a, b;

    Twice() = default;
    Twice(W first, W second) : a(first), b(second) {}
    Twice(float number) : a(number), b(number) {}

    template <Type type>
    static Twice load(const void* numbers, std::int64_t i) {
        return {W::template load<type>(numbers, i), W::template load<type>(numbers, i + W::kLanes)};
    }
    template <Type type>
    void store(void* numbers, std::int64_t i) const {
        a.template store<type>(numbers, i);
        b.template store<type>(numbers, i + W::kLanes);
    }
    template <Type type>
    Twice rounded() const {
        return {a.template rounded<type>(), b.template rounded<type>()};
    }

    friend Twice operator+(Twice x, Twice y) { return {x.a + y.a, x.b + y.b}; }
    friend Twice operator-(Twice x, Twice y) { return {x.a - y.a, x.b - y.b}; }
    friend Twice operator*(Twice x, Twice y) { return {x.a * y.a, x.b * y.b}; }
    friend Twice operator/(Twice x, Twice y) { return {x.a / y.a, x.b / y.b}; }
    friend Mask operator<(Twice x, Twice y) { return {x.a < y.a, x.b < y.b}; }
    friend Twice select(Mask condition, Twice yes, Twice no) {
        return {select(condition.a, yes.a, no.a), select(condition.b, yes.b, no.b)};
    }
    friend Twice at_least(Twice x, float limit) { return {at_least(x.a, limit), at_least(x.b, limit)}; }
    friend Twice at_most(Twice x, float limit) { return {at_most(x.a, limit), at_most(x.b, limit)}; }
    friend Twice smaller(Twice x, Twice y) { return {smaller(x.a, y.a), smaller(x.b, y.b)}; }
    friend Twice magnitude(Twice x) { return {magnitude(x.a), magnitude(x.b)}; }
    friend Twice square_root(Twice x) { return {square_root(x.a), square_root(x.b)}; }
    using Table = typename W::Table;
    static Table table(const float* eight) { return W::table(eight); }
    static Twice entries(Table table, Twice which) {
        return {W::entries(table, which.a), W::entries(table, which.b)};
    }
    void store_bytes(std::uint8_t* bytes, std::int64_t i) const {
        a.store_bytes(bytes, i);
        b.store_bytes(bytes, i + W::kLanes);
    }
    friend Twice scaled(Twice x, Twice shifted, Twice n) {
        return {scaled(x.a, shifted.a, n.a), scaled(x.b, shifted.b, n.b)};
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
    return static_cast<char*>(rows.data) + element * size_of(rows.type);
}

}  // namespace rows
}  // namespace
}  // namespace halfbyte

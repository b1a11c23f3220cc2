// The loss of one row of logits and its gradient, as plain loops over tiles that every instruction set's file
// compiles for itself. The order of all sums is written out (16 lanes, folded pairwise, tiles in double), so
// that every instruction set gets the same bits.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "vector_math.hpp"

namespace halfbyte {
namespace {
namespace loss {

constexpr int kLanes = 16;
constexpr std::int64_t kTile = 256;  // 1 KiB: a sum in float has 16 terms per lane

struct Tile {
    float at[kTile];

    // The numbers from `begin` on, filled up with `fill` past the end.
    Tile(const float* numbers, std::int64_t begin, std::int64_t count, float fill) {
        const std::int64_t size = size_of(begin, count);
        std::memcpy(at, numbers + begin, static_cast<std::size_t>(size) * sizeof(float));
        for (std::int64_t i = size; i < kTile; ++i) at[i] = fill;
    }

    void store(float* numbers, std::int64_t begin, std::int64_t count) const {
        std::memcpy(numbers + begin, at, static_cast<std::size_t>(size_of(begin, count)) * sizeof(float));
    }

    static std::int64_t size_of(std::int64_t begin, std::int64_t count) {
        return count - begin < kTile ? count - begin : kTile;
    }
};

inline float larger(float a, float b) { return a > b ? a : b; }

inline float folded_sum(float (&lanes)[kLanes]) {
    for (int half = kLanes / 2; half > 0; half /= 2)
        for (int v = 0; v < half; ++v) lanes[v] += lanes[v + half];
    return lanes[0];
}

inline float sum_of(const Tile& tile) {
    float lanes[kLanes] = {};
    for (std::int64_t i = 0; i < kTile; i += kLanes)
        for (int v = 0; v < kLanes; ++v) lanes[v] += tile.at[i + v];
    return folded_sum(lanes);
}

inline void bend_tile(Tile& tile, const Bend& bend) {
    if (bend.scale != 1.0f)
        for (std::int64_t i = 0; i < kTile; ++i) tile.at[i] *= bend.scale;
    if (bend.cap == 0.0f) return;
    for (std::int64_t i = 0; i < kTile; ++i) tile.at[i] = bend.cap * vector::tanh(tile.at[i] / bend.cap);
}

// A NaN is passed over here and found again in the sum of exponentials, as is an infinity.
inline float largest_of(const Tile& tile, float largest) {
    float lanes[kLanes];
    for (int v = 0; v < kLanes; ++v) lanes[v] = largest;
    for (std::int64_t i = 0; i < kTile; i += kLanes)
        for (int v = 0; v < kLanes; ++v) lanes[v] = larger(tile.at[i + v], lanes[v]);
    for (int v = 0; v < kLanes; ++v) largest = larger(lanes[v], largest);
    return largest;
}

[[maybe_unused]] RowSums loss_sums(float* row, std::int64_t count, const float* bias, std::int64_t target,
                                   const Bend& bend, bool sum_logits) {
    RowSums sums{-HUGE_VALF, 0.0f, 0.0, 0.0};
    const bool bent = bias != nullptr || bend.scale != 1.0f || bend.cap != 0.0f;
    for (std::int64_t begin = 0; begin < count; begin += kTile) {
        if (bent) {
            Tile tile(row, begin, count, 0.0f);
            if (bias != nullptr) {
                const Tile added(bias, begin, count, 0.0f);
                for (std::int64_t i = 0; i < kTile; ++i) tile.at[i] += added.at[i];
            }
            bend_tile(tile, bend);
            tile.store(row, begin, count);
        }
        if (sum_logits) sums.logits += static_cast<double>(sum_of(Tile(row, begin, count, 0.0f)));
        sums.largest = largest_of(Tile(row, begin, count, -HUGE_VALF), sums.largest);
    }
    for (std::int64_t begin = 0; begin < count; begin += kTile) {
        Tile tile(row, begin, count, -HUGE_VALF);
        for (std::int64_t i = 0; i < kTile; ++i) tile.at[i] = vector::exp(tile.at[i] - sums.largest);
        sums.exponentials += static_cast<double>(sum_of(tile));
    }
    sums.target = row[target];
    return sums;
}

// The derivative of the bending, without its scale: 1 - tanh² of what went in.
inline float steepness(float bent, float cap) {
    const float part = bent / cap;
    return 1.0f - part * part;
}

using FromFloat = void (*)(const float*, Type, std::int64_t, void*);

template <FromFloat from_float>
void loss_gradient(const float* row, std::int64_t count, std::int64_t target, const Bend& bend,
                   const RowSums& sums, const Slopes& slopes, Type type, void* out) {
    const auto slope = [&](float logit) {
        return vector::exp(logit - sums.largest) * slopes.probability - slopes.everywhere;
    };
    const std::int64_t size = size_of(type);
    // A tile is read whole before its gradient is written, and a gradient is no longer than its logit: `out`
    // may be the row.
    for (std::int64_t begin = 0; begin < count; begin += kTile) {
        Tile tile(row, begin, count, 0.0f);
        if (bend.cap == 0.0f)
            for (std::int64_t i = 0; i < kTile; ++i) tile.at[i] = slope(tile.at[i]);
        else
            for (std::int64_t i = 0; i < kTile; ++i)
                tile.at[i] = slope(tile.at[i]) * steepness(tile.at[i], bend.cap);
        from_float(tile.at, type, Tile::size_of(begin, count), static_cast<char*>(out) + begin * size);
    }
    float at_target = slope(sums.target) - slopes.target;
    if (bend.cap != 0.0f) at_target *= steepness(sums.target, bend.cap);
    from_float(&at_target, type, 1, static_cast<char*>(out) + target * size);
}

}  // namespace loss
}  // namespace
}  // namespace halfbyte

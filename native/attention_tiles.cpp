// What tiles of scores consist of: see attention_tiles.hpp.
#include "attention_tiles.hpp"

#include <algorithm>
#include <cstring>

namespace halfbyte {
namespace tiles {

Lanes::Lanes(const Kernels& kernels, const Attention& attention)
    : pairs(attention.type == Type::bf16 && kernels.multiply_pairs != nullptr),
      per_lane(pairs ? 2 : 1),
      depth((attention.D + per_lane - 1) / per_lane),
      block(kPanel * per_lane),
      panels((attention.D + kPanel - 1) / kPanel),
      bytes(attention.type == Type::f32 ? 4 : 2) {}

std::vector<Unit> units_of(const Attention& attention) {
    std::vector<Unit> units;
    units.reserve(static_cast<std::size_t>(attention.count * attention.Hkv));
    for (std::int64_t n = 0; n < attention.count; ++n) {
        const std::int32_t* document = attention.documents + 3 * n;
        for (std::int64_t head = 0; head < attention.Hkv; ++head)
            units.push_back({document[0], document[1], document[2] - document[1], head});
    }
    std::stable_sort(units.begin(), units.end(),
                     [](const Unit& a, const Unit& b) { return a.length > b.length; });
    return units;
}

Tile::Tile(const Attention& attention, const Unit& unit, std::int64_t query_block, std::int64_t key_block)
    : causal_(attention.causal),
      key_(key_block * kKeys),
      query_(query_block * kPanel),
      rows_(std::min(kKeys, unit.length - key_)),
      columns_(std::min<std::int64_t>(kPanel, unit.length - query_)),
      window_(attention.window > 0 ? std::min(attention.window, unit.length) : unit.length) {
    edge_ = first(rows_ - 1) > 0 || last(0) < columns_;
}

std::int64_t Tile::first(std::int64_t row) const {
    return causal_ ? std::clamp<std::int64_t>(key_ + row - query_, 0, columns_) : 0;
}

std::int64_t Tile::last(std::int64_t row) const {
    return causal_ ? std::clamp<std::int64_t>(key_ + row + window_ - query_, 0, columns_) : columns_;
}

Tile::Part Tile::part(std::int64_t row, std::int64_t step) const {
    if (!edge_) return {0, rows_, 0, columns()};
    const std::int64_t rows = std::min(step, rows_ - row);
    const std::int64_t begin = first(row) / kVector * kVector;
    const std::int64_t end = up_to(last(row + rows - 1), kVector);
    return {row, rows, begin, std::max<std::int64_t>(end - begin, 0)};
}

void Tile::mask(float* tile, float with) const {
    if (!edge_) return;
    for (std::int64_t row = 0; row < rows_; ++row) {
        float* scores = tile + row * kPanel;
        std::fill(scores, scores + first(row), with);
        std::fill(scores + std::max(first(row), last(row)), scores + columns(), with);
    }
}

Range keys_seen(const Attention& attention, const Unit& unit, std::int64_t query_block) {
    if (!attention.causal) return {0, unit.blocks()};
    const std::int64_t query = query_block * kPanel;
    const std::int64_t first = attention.window > 0 ? query - attention.window + 1 : 0;
    return {std::max<std::int64_t>(first, 0) / kKeys,
            (std::min(query + kPanel, unit.length) + kKeys - 1) / kKeys};
}

Range queries_seeing(const Attention& attention, const Unit& unit, std::int64_t key_block) {
    if (!attention.causal) return {0, unit.blocks()};
    const std::int64_t key = key_block * kKeys;
    const std::int64_t last = attention.window > 0 && attention.window < unit.length
                                  ? key + kKeys - 1 + attention.window - 1
                                  : unit.length - 1;
    return {key / kPanel, std::min(last / kPanel + 1, unit.blocks())};
}

Packer::Packer(const Kernels& kernels, const Attention& attention)
    : lanes(kernels, attention), kernels_(kernels), type_(attention.type), D_(attention.D) {}

void Packer::rows(const Heads& heads, const Unit& unit, std::int64_t head, std::int64_t token,
                  std::int64_t rows, std::uint32_t* to) const {
    for (std::int64_t t = 0; t < rows; ++t, to += lanes.depth) {
        const char* from = address(heads, unit, head, token + t, lanes.bytes);
        if (!lanes.pairs) {
            kernels_.to_float(from, type_, D_, reinterpret_cast<float*>(to));
            continue;
        }
        to[lanes.depth - 1] = 0;
        std::memcpy(to, from, static_cast<std::size_t>(D_ * lanes.bytes));
    }
}

void Packer::columns(const std::uint32_t* rows_in_lanes, std::int64_t rows, std::uint32_t* to) const {
    kernels_.transpose(rows_in_lanes, lanes.depth, rows, lanes.depth, to);
}

void Packer::along(const char* first, const char* second, std::int64_t count, std::uint32_t* to) const {
    if (lanes.pairs)
        kernels_.softmax.interleave(reinterpret_cast<const std::uint16_t*>(first),
                                    reinterpret_cast<const std::uint16_t*>(second), count, to);
    else
        kernels_.to_float(first, type_, count, reinterpret_cast<float*>(to));
}

void Packer::panels_along(const Heads& heads, const Unit& unit, std::int64_t head, std::int64_t token,
                          std::int64_t rows, std::uint32_t* to) const {
    const std::int64_t panel_rows = kPanel / lanes.per_lane;
    for (std::int64_t p = 0; p < lanes.panels; ++p, to += panel_rows * kPanel) {
        const std::int64_t count = std::min<std::int64_t>(kPanel, D_ - p * kPanel);
        for (std::int64_t t = 0; t < panel_rows; ++t) {
            const std::int64_t first = t * lanes.per_lane, second = first + 1;
            if (first >= rows) {
                std::fill_n(to + t * kPanel, kPanel, 0u);
                continue;
            }
            const char* from =
                address(heads, unit, head, token + first, lanes.bytes) + p * kPanel * lanes.bytes;
            along(from, second < rows ? from + heads.token * lanes.bytes : nullptr, count, to + t * kPanel);
        }
    }
}

void Packer::rows_along(const Heads& heads, const Unit& unit, std::int64_t head, std::int64_t token,
                        std::int64_t rows, std::uint32_t* scratch, std::uint32_t* to) const {
    const std::int64_t count = (rows + lanes.per_lane - 1) / lanes.per_lane;
    for (std::int64_t t = 0; t < count; ++t) {
        const std::int64_t first = t * lanes.per_lane;
        const char* from = address(heads, unit, head, token + first, lanes.bytes);
        along(from, first + 1 < rows ? from + heads.token * lanes.bytes : nullptr, D_, scratch + t * D_);
    }
    kernels_.transpose(scratch, D_, count, D_, to);
}

void Packer::write_columns(const float* sums, std::int64_t columns, float* scratch, const Heads& heads,
                           const Unit& unit, std::int64_t head, std::int64_t token) const {
    for (std::int64_t d = 0; d < D_; d += kPanel) {
        const std::int64_t count = std::min<std::int64_t>(kPanel, D_ - d);
        kernels_.transpose(reinterpret_cast<const std::uint32_t*>(sums + d * kPanel), kPanel, count, columns,
                           reinterpret_cast<std::uint32_t*>(scratch));
        for (std::int64_t t = 0; t < columns; ++t) {
            char* to = address(heads, unit, head, token + t, lanes.bytes) + d * lanes.bytes;
            kernels_.from_float(scratch + t * kPanel, type_, count, to);
        }
    }
}

std::vector<Task> tasks_of(const std::vector<Unit>& units, std::int64_t first, std::int64_t last,
                           std::int64_t group, int mixed) {
    std::vector<Task> tasks;
    for (std::int64_t u = first; u < last; u += mixed) {
        const std::int64_t end = std::min<std::int64_t>(u + mixed, last);
        const std::int64_t most =
            units[static_cast<std::size_t>(u)].blocks() * group;  // the longest is first
        for (std::int64_t step = 0; step < most; ++step)
            for (std::int64_t unit = u; unit < end; ++unit) {
                const std::int64_t blocks = units[static_cast<std::size_t>(unit)].blocks();
                if (step < blocks * group) tasks.push_back({unit, step % group, blocks - 1 - step / group});
            }
    }
    return tasks;
}

std::vector<Range> waves_of(const std::vector<std::int64_t>& sizes, std::int64_t budget) {
    std::vector<Range> waves;
    std::int64_t used = 0;
    for (std::int64_t u = 0; u < static_cast<std::int64_t>(sizes.size()); ++u) {
        used += sizes[static_cast<std::size_t>(u)];
        if (waves.empty() || used > budget) {
            waves.push_back({u, u});
            used = sizes[static_cast<std::size_t>(u)];
        }
        waves.back().end = u + 1;
    }
    return waves;
}

}  // namespace tiles
}  // namespace halfbyte

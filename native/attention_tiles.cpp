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
      bytes(size_of(attention.type)) {}

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
                  std::int64_t count, std::uint32_t* to) const {
    for (std::int64_t t = 0; t < count; ++t, to += lanes.depth) {
        const char* from = address(heads, unit, head, token + t, lanes.bytes);
        if (!lanes.pairs) {
            kernels_.to_float(from, type_, D_, reinterpret_cast<float*>(to));
            continue;
        }
        to[lanes.depth - 1] = 0;  // an odd D leaves half a lane
        std::memcpy(to, from, static_cast<std::size_t>(D_ * lanes.bytes));
    }
}

void Packer::columns(const std::uint32_t* rows, std::int64_t count, std::uint32_t* to) const {
    kernels_.transpose(rows, lanes.depth, count, lanes.depth, to);
}

void Packer::along(const std::uint32_t* row, bool has_next, std::int64_t d, std::int64_t count,
                   std::uint32_t* to) const {
    if (!lanes.pairs) {
        std::copy_n(row + d, count, to);
        return;
    }
    const auto* first = reinterpret_cast<const std::uint16_t*>(row) + d;
    kernels_.interleave(first, has_next ? first + 2 * lanes.depth : nullptr, count, to);
}

void Packer::panels_along(const std::uint32_t* rows, std::int64_t count, std::uint32_t* to) const {
    for (std::int64_t p = 0; p < lanes.panels; ++p) {
        const std::int64_t d = p * kPanel, columns = std::min<std::int64_t>(kPanel, D_ - d);
        for (std::int64_t t = 0; t < kPanel; t += lanes.per_lane, to += kPanel) {
            if (t < count)
                along(rows + t * lanes.depth, t + 1 < count, d, columns, to);
            else
                std::fill_n(to, columns, 0u);
        }
    }
}

void Packer::rows_along(const std::uint32_t* rows, std::int64_t count, std::uint32_t* scratch,
                        std::uint32_t* to) const {
    const std::int64_t filled = (count + lanes.per_lane - 1) / lanes.per_lane;
    for (std::int64_t l = 0; l < filled; ++l) {
        const std::int64_t t = l * lanes.per_lane;
        along(rows + t * lanes.depth, t + 1 < count, 0, D_, scratch + l * D_);
    }
    kernels_.transpose(scratch, D_, filled, D_, to);
}

void Packer::dots(const std::uint32_t* rows, const Heads& heads, const Unit& unit, std::int64_t head,
                  std::int64_t token, std::int64_t count, float* scratch, float* sums) const {
    for (std::int64_t t = 0; t < count; ++t, rows += lanes.depth) {
        const char* other = address(heads, unit, head, token + t, lanes.bytes);
        sums[t] = 0;
        if (lanes.pairs && kernels_.dot_bf16 != nullptr) {
            kernels_.dot_bf16(reinterpret_cast<const std::uint16_t*>(rows),
                              reinterpret_cast<const std::uint16_t*>(other), D_, 1, D_, sums + t);
            continue;
        }
        kernels_.to_float(other, type_, D_, scratch);
        kernels_.dot(reinterpret_cast<const float*>(rows), scratch, D_, 1, D_, sums + t);
    }
}

void Packer::write_columns(const float* sums, std::int64_t count, float* scratch, const Heads& heads,
                           const Unit& unit, std::int64_t head, std::int64_t token) const {
    for (std::int64_t d = 0; d < D_; d += kPanel) {
        const std::int64_t numbers = std::min<std::int64_t>(kPanel, D_ - d);
        kernels_.transpose(reinterpret_cast<const std::uint32_t*>(sums + d * kPanel), kPanel, numbers, count,
                           reinterpret_cast<std::uint32_t*>(scratch));
        for (std::int64_t t = 0; t < count; ++t) {
            char* to = address(heads, unit, head, token + t, lanes.bytes) + d * lanes.bytes;
            kernels_.from_float(scratch + t * kPanel, type_, numbers, to);
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

std::vector<Range> waves_of(const std::vector<std::int64_t>& sizes, int threads) {
    constexpr std::int64_t kBudget = std::int64_t{2} << 20;  // bytes a thread
    std::vector<Range> waves;
    std::int64_t used = 0;
    for (std::int64_t u = 0; u < static_cast<std::int64_t>(sizes.size()); ++u) {
        const std::int64_t size = sizes[static_cast<std::size_t>(u)];
        const bool full = used + size > kBudget * threads;
        if (waves.empty() || (full && u - waves.back().begin >= threads)) {
            waves.push_back({u, u});
            used = 0;
        }
        waves.back().end = u + 1;
        used += size;
    }
    return waves;
}

}  // namespace tiles
}  // namespace halfbyte

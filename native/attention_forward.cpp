// Attention forward: for each block of queries a walk over the keys it sees, with a softmax that is corrected
// as larger scores come. Source: FlashAttention-2 (arXiv 2307.08691), algorithm 1.
#include <algorithm>
#include <cmath>
#include <limits>

#include "attention_tiles.hpp"
#include "parallel.hpp"

namespace halfbyte {
namespace {

using namespace tiles;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLog2E = 1.44269504088896341f, kLn2 = 0.693147180559945309f;

// Weights are 2^(score - shift) with a shift that follows the largest score seen only once it has fallen
// behind by this much: they stay below 2^8, and the sums so far are seldom touched.
constexpr float kLag = 8.0f;

struct Scratch {
    Aligned<std::uint32_t> rows, queries, weights, along;
    Aligned<float> scores, sums, most, shift, factor, total;

    explicit Scratch(const Packer& packer, const Attention& attention)
        : rows(packer.lanes.block * packer.lanes.depth),
          queries(kPanel * packer.lanes.depth),
          weights(kKeys * kPanel),
          along(packer.rows_along_scratch()),
          scores(kKeys * kPanel),
          sums(attention.D * kPanel),
          most(kPanel),
          shift(kPanel),
          factor(kPanel),
          total(kPanel) {}
};

class Forward {
  public:
    Forward(const Kernels& kernels, const Attention& attention, const Heads& q, const Heads& k,
            const Heads& v, const Heads& out, float* lse)
        : softmax_(kernels.softmax),
          attention_(attention),
          packer_(kernels, attention),
          lanes_(packer_.lanes),
          multiply_(lanes_.pairs ? kernels.multiply_pairs : kernels.multiply),
          exponent_(attention.scale * kLog2E),
          q_(q),
          k_(k),
          v_(v),
          out_(out),
          lse_(lse),
          units_(units_of(attention)) {}

    void run(int threads) {
        std::vector<std::int64_t> sizes;
        sizes.reserve(units_.size());
        for (const Unit& unit : units_) sizes.push_back(4 * (key_lanes(unit) + value_lanes(unit)));
        std::vector<Scratch> scratches;
        scratches.reserve(static_cast<std::size_t>(threads));
        for (int t = 0; t < threads; ++t) scratches.emplace_back(packer_, attention_);
        for (const Range wave : waves_of(sizes, threads)) {
            pack(wave, scratches, threads);
            const std::vector<Task> tasks =
                tasks_of(units_, wave.begin, wave.end, attention_.H / attention_.Hkv, threads);
            auto work = [&](std::int64_t worker, std::int64_t task) {
                attend(tasks[static_cast<std::size_t>(task)], scratches[static_cast<std::size_t>(worker)]);
            };
            parallel_tasks(static_cast<std::int64_t>(tasks.size()), threads, work);
        }
    }

  private:
    std::int64_t key_lanes(const Unit& unit) const { return up_to(unit.length * lanes_.depth, kVector); }
    std::int64_t value_lanes(const Unit& unit) const { return packer_.rows_along_size(unit.length); }
    const Unit& unit(std::int64_t u) const { return units_[static_cast<std::size_t>(u)]; }

    void pack(Range wave, std::vector<Scratch>& scratches, int threads) {
        std::int64_t lanes = 0;
        std::vector<Range> blocks;  // unit, block
        keys_.assign(units_.size(), nullptr);
        values_.assign(units_.size(), nullptr);
        for (std::int64_t u = wave.begin; u < wave.end; ++u) {
            lanes += key_lanes(unit(u)) + value_lanes(unit(u));
            for (std::int64_t token = 0; token < unit(u).length; token += lanes_.block)
                blocks.push_back({u, token});
        }
        if (lanes > size_) packed_ = Aligned<std::uint32_t>(size_ = lanes, false);
        std::uint32_t* next = packed_.data();
        for (std::int64_t u = wave.begin; u < wave.end; ++u) {
            keys_[static_cast<std::size_t>(u)] = next;
            values_[static_cast<std::size_t>(u)] = next + key_lanes(unit(u));
            next += key_lanes(unit(u)) + value_lanes(unit(u));
        }
        auto work = [&](std::int64_t worker, std::int64_t b) {
            const auto [u, token] = blocks[static_cast<std::size_t>(b)];
            const std::int64_t head = unit(u).kv_head, rows = std::min(lanes_.block, unit(u).length - token);
            packer_.rows(k_, unit(u), head, token, rows, keys(u) + token * lanes_.depth);
            Scratch& scratch = scratches[static_cast<std::size_t>(worker)];
            packer_.rows(v_, unit(u), head, token, rows, scratch.rows.data());
            packer_.rows_along(scratch.rows.data(), rows, scratch.along.data(),
                               values(u) + packer_.rows_along_offset(token));
        };
        parallel_tasks(static_cast<std::int64_t>(blocks.size()), threads, work);
    }

    std::uint32_t* keys(std::int64_t u) const { return keys_[static_cast<std::size_t>(u)]; }
    std::uint32_t* values(std::int64_t u) const { return values_[static_cast<std::size_t>(u)]; }

    void attend(const Task& task, Scratch& scratch) const {
        const Unit& document = unit(task.unit);
        const std::int64_t head = document.kv_head * (attention_.H / attention_.Hkv) + task.head;
        const std::int64_t token = task.query_block * kPanel;
        const std::int64_t queries = std::min<std::int64_t>(kPanel, document.length - token);
        packer_.rows(q_, document, head, token, queries, scratch.rows.data());
        packer_.columns(scratch.rows.data(), queries, scratch.queries.data());
        std::fill_n(scratch.sums.data(), attention_.D * kPanel, 0.0f);
        std::fill_n(scratch.total.data(), kPanel, 0.0f);
        std::fill_n(scratch.shift.data(), kPanel, -kInfinity);
        const Range blocks = keys_seen(attention_, document, task.query_block);
        for (std::int64_t block = blocks.begin; block < blocks.end; ++block)
            add_block(task, Tile(attention_, document, task.query_block, block), block, scratch);
        finish(document, head, token, queries, scratch);
    }

    void add_block(const Task& task, const Tile& tile, std::int64_t block, Scratch& scratch) const {
        float* scores = scratch.scores.data();
        const std::uint32_t* keys_of_block = keys(task.unit) + block * kKeys * lanes_.depth;
        for (std::int64_t row = 0; row < tile.rows();) {
            const Tile::Part part = tile.part(row, kRowStep);
            multiply_(keys_of_block + row * lanes_.depth, lanes_.depth, part.rows,
                      scratch.queries.data() + part.column, part.columns, lanes_.depth, false,
                      scores + row * kPanel + part.column);
            row += part.rows;
        }
        tile.mask(scores, -kInfinity);
        follow_largest(tile, scratch);
        std::uint32_t* weights = scratch.weights.data();
        if (lanes_.pairs) {
            softmax_.exponential_pairs(scores, tile.rows(), tile.columns(), exponent_, scratch.most.data(),
                                       scratch.total.data(), weights);
        } else {
            softmax_.exponentials(scores, tile.rows(), tile.columns(), exponent_, scratch.most.data(),
                                  scratch.total.data());
            weights = reinterpret_cast<std::uint32_t*>(scores);
        }
        const std::uint32_t* values_of_block = values(task.unit) + packer_.rows_along_offset(block * kKeys);
        for (std::int64_t row = 0; row < tile.rows();) {
            const Tile::Part part = tile.part(row, kDepthStep);
            const std::int64_t lane = row / lanes_.per_lane;
            multiply_(values_of_block + lane, kPanel, attention_.D, weights + lane * kPanel + part.column,
                      part.columns, (part.rows + lanes_.per_lane - 1) / lanes_.per_lane, true,
                      scratch.sums.data() + part.column);
            row += part.rows;
        }
    }

    // Leaves in `most` the shift to use: `shift`, or 0 for a query that has seen no key yet.
    void follow_largest(const Tile& tile, Scratch& scratch) const {
        float *most = scratch.most.data(), *shift = scratch.shift.data(), *factor = scratch.factor.data();
        std::copy_n(shift, kPanel, most);
        softmax_.column_max(scratch.scores.data(), tile.rows(), tile.columns(), exponent_, most);
        bool behind = false;
        for (int j = 0; j < kPanel; ++j) behind |= most[j] > shift[j] + kLag;
        if (behind) {
            std::copy_n(shift, kPanel, factor);
            std::copy_n(most, kPanel, shift);
        }
        for (int j = 0; j < kPanel; ++j) most[j] = shift[j] == -kInfinity ? 0.0f : shift[j];
        if (!behind) return;
        float unused[kPanel] = {};
        softmax_.exponentials(factor, 1, kPanel, 1.0f, most, unused);
        softmax_.scale_columns(scratch.sums.data(), attention_.D, kPanel, factor);
        softmax_.scale_columns(scratch.total.data(), 1, kPanel, factor);
    }

    void finish(const Unit& document, std::int64_t head, std::int64_t token, std::int64_t queries,
                Scratch& scratch) const {
        float* lse = lse_ + (document.row * attention_.H + head) * attention_.T + document.begin + token;
        for (std::int64_t j = 0; j < kPanel; ++j) {
            const float total = scratch.total.data()[j];
            scratch.factor.data()[j] = j < queries ? 1.0f / total : 0.0f;
            if (j < queries) lse[j] = scratch.shift.data()[j] * kLn2 + std::log(total);
        }
        softmax_.scale_columns(scratch.sums.data(), attention_.D, kPanel, scratch.factor.data());
        packer_.write_columns(scratch.sums.data(), queries, scratch.scores.data(), out_, document, head,
                              token);
    }

    const SoftmaxKernels& softmax_;
    const Attention& attention_;
    const Packer packer_;
    const Lanes& lanes_;
    decltype(Kernels::multiply) multiply_;
    float exponent_;
    Heads q_, k_, v_, out_;
    float* lse_;
    std::vector<Unit> units_;
    Aligned<std::uint32_t> packed_;
    std::int64_t size_ = 0;
    std::vector<std::uint32_t*> keys_, values_;  // of the units of the wave at hand
};

}  // namespace

void attention(const Kernels& kernels, const Attention& attention, const Heads& q, const Heads& k,
               const Heads& v, const Heads& out, float* lse, int threads) {
    Forward(kernels, attention, q, k, v, out, lse).run(threads);
}

}  // namespace halfbyte

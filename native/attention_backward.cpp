// Attention backward: for each block of queries the walk of the forward pass once more, with the weights made
// again from the saved logarithms of sums. Five products a tile. Source: FlashAttention-2 (arXiv 2307.08691),
// algorithm 2, with the queries outside: their gradient is summed in a worker's own memory.
//
// Gradients of keys and values are summed in float32 in memory that all blocks of queries of the group share.
// Who adds to a block of keys is settled beforehand: descending blocks of queries, then ascending heads, each
// waiting for its turn. Tasks are taken in that order too, so that the one waited for has always begun.
#include <algorithm>
#include <limits>
#include <thread>

#include "attention_tiles.hpp"
#include "parallel.hpp"

namespace halfbyte {
namespace {

using namespace tiles;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLog2E = 1.44269504088896341f;
constexpr int kSpins = 2000;  // looks at a turn before the processor is offered to others

struct Scratch {
    Aligned<std::uint32_t> rows, queries, outs, queries_along, outs_along, panel, along;
    Aligned<std::uint16_t> weights, score_grads;
    Aligned<float> scores, grads, sums, shift, delta, factor, wide;

    explicit Scratch(const Packer& packer, const Attention& attention)
        : rows(kPanel * packer.lanes.depth),
          queries(kPanel * packer.lanes.depth),
          outs(kPanel * packer.lanes.depth),
          queries_along(packer.panels_along_size()),
          outs_along(packer.panels_along_size()),
          panel(kKeys * kPanel),
          along(packer.rows_along_scratch()),
          weights(kKeys * kPanel),
          score_grads(kKeys * kPanel),
          scores(kKeys * kPanel),
          grads(kKeys * kPanel),
          sums(attention.D * kPanel),
          shift(kPanel),
          delta(kPanel),
          factor(kPanel),
          wide(attention.D) {
        std::fill_n(factor.data(), kPanel, attention.scale);
    }
};

// What a wave holds of one unit.
struct Shared {
    std::uint32_t *keys, *values, *keys_along;
    float *key_grads, *value_grads;    // [block of keys][panel][key][kPanel]
    std::atomic<std::int64_t>* turns;  // for each block of keys: how many tasks have added to it
};

class Backward {
  public:
    Backward(const Kernels& kernels, const Attention& attention, const Heads& dout, const Heads& q,
             const Heads& k, const Heads& v, const Heads& out, const float* lse, const Heads& dq,
             const Heads& dk, const Heads& dv)
        : kernels_(kernels),
          softmax_(kernels.softmax),
          attention_(attention),
          packer_(kernels, attention),
          lanes_(packer_.lanes),
          multiply_(lanes_.pairs ? kernels.multiply_pairs : kernels.multiply),
          group_(attention.H / attention.Hkv),
          dout_(dout),
          q_(q),
          k_(k),
          v_(v),
          out_(out),
          lse_(lse),
          dq_(dq),
          dk_(dk),
          dv_(dv),
          units_(units_of(attention)),
          shared_(units_.size()) {}

    void run(int threads) {
        std::vector<std::int64_t> sizes;
        sizes.reserve(units_.size());
        for (const Unit& unit : units_)
            sizes.push_back(4 * (2 * row_lanes(unit) + along_lanes(unit) + 2 * grad_floats(unit)));
        std::vector<Scratch> scratches;
        scratches.reserve(static_cast<std::size_t>(threads));
        for (int t = 0; t < threads; ++t) scratches.emplace_back(packer_, attention_);
        for (const Range wave : waves_of(sizes, threads)) {
            share(wave);
            pack(wave, scratches, threads);
            const std::vector<Task> tasks = tasks_of(units_, wave.begin, wave.end, group_, threads);
            auto work = [&](std::int64_t worker, std::int64_t task) {
                attend(tasks[static_cast<std::size_t>(task)], scratches[static_cast<std::size_t>(worker)]);
            };
            parallel_tasks(static_cast<std::int64_t>(tasks.size()), threads, work);
        }
    }

  private:
    std::int64_t row_lanes(const Unit& unit) const { return up_to(unit.length * lanes_.depth, kVector); }
    std::int64_t along_lanes(const Unit& unit) const { return packer_.rows_along_size(unit.length); }
    std::int64_t block_floats() const { return lanes_.panels * kKeys * kPanel; }
    std::int64_t grad_floats(const Unit& unit) const { return unit.blocks() * block_floats(); }
    const Unit& unit(std::int64_t u) const { return units_[static_cast<std::size_t>(u)]; }
    const Shared& shared(std::int64_t u) const { return shared_[static_cast<std::size_t>(u)]; }

    // Divides the wave's memory among its units.
    void share(Range wave) {
        std::int64_t lanes = 0, floats = 0, blocks = 0;
        for (std::int64_t u = wave.begin; u < wave.end; ++u) {
            lanes += 2 * row_lanes(unit(u)) + along_lanes(unit(u));
            floats += 2 * grad_floats(unit(u));
            blocks += unit(u).blocks();
        }
        if (lanes > lanes_size_) packed_ = Aligned<std::uint32_t>(lanes_size_ = lanes, false);
        if (floats > floats_size_) grads_ = Aligned<float>(floats_size_ = floats, false);
        turns_ = std::vector<std::atomic<std::int64_t>>(static_cast<std::size_t>(blocks));
        std::uint32_t* lane = packed_.data();
        float* grad = grads_.data();
        std::atomic<std::int64_t>* turn = turns_.data();
        for (std::int64_t u = wave.begin; u < wave.end; ++u) {
            const std::int64_t rows = row_lanes(unit(u)), sums = grad_floats(unit(u));
            shared_[static_cast<std::size_t>(u)] = {lane, lane + rows, lane + 2 * rows,
                                                    grad, grad + sums, turn};
            lane += 2 * rows + along_lanes(unit(u));
            grad += 2 * sums;
            turn += unit(u).blocks();
        }
    }

    void pack(Range wave, std::vector<Scratch>& scratches, int threads) const {
        std::vector<Range> blocks;  // unit, token
        for (std::int64_t u = wave.begin; u < wave.end; ++u)
            for (std::int64_t token = 0; token < unit(u).length; token += lanes_.block)
                blocks.push_back({u, token});
        auto work = [&](std::int64_t worker, std::int64_t b) {
            const auto [u, token] = blocks[static_cast<std::size_t>(b)];
            const std::int64_t head = unit(u).kv_head, rows = std::min(lanes_.block, unit(u).length - token);
            packer_.rows(k_, unit(u), head, token, rows, shared(u).keys + token * lanes_.depth);
            packer_.rows(v_, unit(u), head, token, rows, shared(u).values + token * lanes_.depth);
            packer_.rows_along(shared(u).keys + token * lanes_.depth, rows,
                               scratches[static_cast<std::size_t>(worker)].along.data(),
                               shared(u).keys_along + packer_.rows_along_offset(token));
        };
        parallel_tasks(static_cast<std::int64_t>(blocks.size()), threads, work);
    }

    void attend(const Task& task, Scratch& scratch) const {
        const Unit& document = unit(task.unit);
        const std::int64_t head = document.kv_head * group_ + task.head, token = task.query_block * kPanel;
        const std::int64_t queries = std::min<std::int64_t>(kPanel, document.length - token);
        take_queries(document, head, token, queries, scratch);
        std::fill_n(scratch.sums.data(), attention_.D * kPanel, 0.0f);
        const Range blocks = keys_seen(attention_, document, task.query_block);
        for (std::int64_t block = blocks.begin; block < blocks.end; ++block)
            add_block(task, Tile(attention_, document, task.query_block, block), block, scratch);
        softmax_.scale_columns(scratch.sums.data(), attention_.D, kPanel, scratch.factor.data());
        packer_.write_columns(scratch.sums.data(), queries, scratch.scores.data(), dq_, document, head,
                              token);
    }

    void take_queries(const Unit& document, std::int64_t head, std::int64_t token, std::int64_t queries,
                      Scratch& scratch) const {
        float *shift = scratch.shift.data(), *delta = scratch.delta.data();
        std::fill_n(shift, kPanel, kInfinity);  // no weight where no query is
        std::fill_n(delta, kPanel, 0.0f);
        packer_.rows(q_, document, head, token, queries, scratch.rows.data());
        packer_.columns(scratch.rows.data(), queries, scratch.queries.data());
        packer_.panels_along(scratch.rows.data(), queries, scratch.queries_along.data());
        packer_.rows(dout_, document, head, token, queries, scratch.rows.data());
        packer_.columns(scratch.rows.data(), queries, scratch.outs.data());
        packer_.panels_along(scratch.rows.data(), queries, scratch.outs_along.data());
        packer_.dots(scratch.rows.data(), out_, document, head, token, queries, scratch.wide.data(), delta);
        const float* lse =
            lse_ + (document.row * attention_.H + head) * attention_.T + document.begin + token;
        for (std::int64_t j = 0; j < queries; ++j) shift[j] = lse[j] * kLog2E;
    }

    void add_block(const Task& task, const Tile& tile, std::int64_t block, Scratch& scratch) const {
        const Shared& unit_shared = shared(task.unit);
        const std::int64_t lane = block * kKeys * lanes_.depth;
        float *scores = scratch.scores.data(), *grads = scratch.grads.data();
        for (std::int64_t row = 0; row < tile.rows();) {
            const Tile::Part part = tile.part(row, kRowStep);
            const std::int64_t at = row * kPanel + part.column;
            multiply_(unit_shared.keys + lane + row * lanes_.depth, lanes_.depth, part.rows,
                      scratch.queries.data() + part.column, part.columns, lanes_.depth, false, scores + at);
            multiply_(unit_shared.values + lane + row * lanes_.depth, lanes_.depth, part.rows,
                      scratch.outs.data() + part.column, part.columns, lanes_.depth, false, grads + at);
            row += part.rows;
        }
        tile.mask(scores, -kInfinity);
        tile.mask(grads, 0.0f);
        const auto [weights, score_grads, panel, stride] = weigh(tile, scratch);
        await_turn(task, block);
        const bool first = turn_of(task, block) == 0;
        float* key_grads = unit_shared.key_grads + block * block_floats();
        float* value_grads = unit_shared.value_grads + block * block_floats();
        add_rows(tile, weights, stride, scratch.outs_along.data(), first, value_grads);
        add_rows(tile, score_grads, stride, scratch.queries_along.data(), first, key_grads);
        if (turn_of(task, block) + 1 == turns_in(task, block))
            write_block(task, block, tile.rows(), key_grads, value_grads);
        unit_shared.turns[block].store(turn_of(task, block) + 1, std::memory_order_release);
        const std::uint32_t* keys_along = unit_shared.keys_along + packer_.rows_along_offset(block * kKeys);
        for (std::int64_t row = 0; row < tile.rows();) {
            const Tile::Part part = tile.part(row, kDepthStep);
            const std::int64_t depth = (part.rows + lanes_.per_lane - 1) / lanes_.per_lane;
            multiply_(keys_along + row / lanes_.per_lane, kPanel, attention_.D,
                      panel + row / lanes_.per_lane * kPanel + part.column, part.columns, depth, true,
                      scratch.sums.data() + part.column);
            row += part.rows;
        }
    }

    // Weights and score gradients as operands: row by row with the distance between rows, and the latter as a
    // panel.
    struct Weighed {
        const std::uint32_t *weights, *score_grads, *panel;
        std::int64_t stride;
    };

    Weighed weigh(const Tile& tile, Scratch& scratch) const {
        float *scores = scratch.scores.data(), *grads = scratch.grads.data();
        const float exponent = attention_.scale * kLog2E;
        if (!lanes_.pairs) {
            softmax_.score_gradients(scores, grads, tile.rows(), tile.columns(), exponent,
                                     scratch.shift.data(), scratch.delta.data());
            const auto* lanes = reinterpret_cast<const std::uint32_t*>(grads);
            return {reinterpret_cast<const std::uint32_t*>(scores), lanes, lanes, kPanel};
        }
        softmax_.score_gradient_pairs(scores, grads, tile.rows(), tile.columns(), exponent,
                                      scratch.shift.data(), scratch.delta.data(), scratch.weights.data(),
                                      scratch.score_grads.data(), scratch.panel.data());
        return {reinterpret_cast<const std::uint32_t*>(scratch.weights.data()),
                reinterpret_cast<const std::uint32_t*>(scratch.score_grads.data()), scratch.panel.data(),
                kPanel / 2};
    }

    // sums of a block of keys (+)= rows of weights · rows of the queries' panels.
    void add_rows(const Tile& tile, const std::uint32_t* weights, std::int64_t stride,
                  const std::uint32_t* panels, bool first, float* sums) const {
        const std::int64_t panel_rows = kPanel / lanes_.per_lane;
        for (std::int64_t p = 0; p < lanes_.panels; ++p) {
            const std::int64_t columns = std::min<std::int64_t>(kPanel, attention_.D - p * kPanel);
            for (std::int64_t row = 0; row < tile.rows();) {
                const Tile::Part part = tile.part(row, kRowStep);
                const std::int64_t lane = part.column / lanes_.per_lane;
                multiply_(weights + row * stride + lane, stride, part.rows,
                          panels + (p * panel_rows + lane) * kPanel, columns, part.columns / lanes_.per_lane,
                          !first, sums + (p * kKeys + row) * kPanel);
                row += part.rows;
            }
        }
    }

    // How many tasks add to a block of keys before this one, and in all.
    std::int64_t turn_of(const Task& task, std::int64_t block) const {
        const Range queries = queries_seeing(attention_, unit(task.unit), block);
        return (queries.end - 1 - task.query_block) * group_ + task.head;
    }
    std::int64_t turns_in(const Task& task, std::int64_t block) const {
        const Range queries = queries_seeing(attention_, unit(task.unit), block);
        return (queries.end - queries.begin) * group_;
    }

    void await_turn(const Task& task, std::int64_t block) const {
        const std::int64_t turn = turn_of(task, block);
        const std::atomic<std::int64_t>& now = shared(task.unit).turns[block];
        for (int spins = 0; now.load(std::memory_order_acquire) != turn; ++spins)
            if (spins >= kSpins) std::this_thread::yield();
    }

    void write_block(const Task& task, std::int64_t block, std::int64_t rows, float* key_grads,
                     const float* value_grads) const {
        const Unit& document = unit(task.unit);
        for (std::int64_t p = 0; p < lanes_.panels; ++p) {
            const std::int64_t columns = std::min<std::int64_t>(kPanel, attention_.D - p * kPanel);
            for (std::int64_t row = 0; row < rows; ++row) {
                const std::int64_t token = block * kKeys + row, at = (p * kKeys + row) * kPanel;
                const std::int64_t offset = p * kPanel * lanes_.bytes;
                for (std::int64_t j = 0; j < columns; ++j) key_grads[at + j] *= attention_.scale;
                kernels_.from_float(key_grads + at, attention_.type, columns,
                                    address(dk_, document, document.kv_head, token, lanes_.bytes) + offset);
                kernels_.from_float(value_grads + at, attention_.type, columns,
                                    address(dv_, document, document.kv_head, token, lanes_.bytes) + offset);
            }
        }
    }

    const Kernels& kernels_;
    const SoftmaxKernels& softmax_;
    const Attention& attention_;
    const Packer packer_;
    const Lanes& lanes_;
    decltype(Kernels::multiply) multiply_;
    std::int64_t group_;
    Heads dout_, q_, k_, v_, out_;
    const float* lse_;
    Heads dq_, dk_, dv_;
    std::vector<Unit> units_;
    std::vector<Shared> shared_;
    Aligned<std::uint32_t> packed_;
    Aligned<float> grads_;
    std::vector<std::atomic<std::int64_t>> turns_;
    std::int64_t lanes_size_ = 0, floats_size_ = 0;
};

}  // namespace

void attention_grad(const Kernels& kernels, const Attention& attention, const Heads& dout, const Heads& q,
                    const Heads& k, const Heads& v, const Heads& out, const float* lse, const Heads& dq,
                    const Heads& dk, const Heads& dv, int threads) {
    Backward(kernels, attention, dout, q, k, v, out, lse, dq, dk, dv).run(threads);
}

}  // namespace halfbyte

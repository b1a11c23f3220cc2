// What forward and backward of attention share: the tiles of scores, who sees what in them, blocks of keys
// and queries packed as operands, and the order of the work.
//
// A tile of scores is transposed: its rows are up to kKeys keys, its columns up to kPanel queries. The keys'
// rows are then an operand as they lie in memory, the queries' panel is made once for all keys, every
// statistic of the softmax is a vector over columns, and the rows of weights are an operand again for the
// values' gradient.
//
// Lanes (kernels.hpp) are bf16 pairs where the kernels multiply those and the numbers are bf16, else floats.
#pragma once

#include <vector>

#include "aligned.hpp"
#include "attention.hpp"

namespace halfbyte {
namespace tiles {

constexpr std::int64_t kKeys = 64;                      // rows of a tile
constexpr std::int64_t kVector = 16;                    // columns are handled in multiples of this
constexpr std::int64_t kRowStep = 16, kDepthStep = 32;  // how finely an edge tile is cut: rows, summed keys

constexpr std::int64_t up_to(std::int64_t number, std::int64_t multiple) {
    return (number + multiple - 1) / multiple * multiple;
}

// Sizes that follow from the kernels and the numbers' type.
struct Lanes {
    bool pairs;
    std::int64_t per_lane;  // numbers
    std::int64_t depth;     // lanes of a row of D numbers
    std::int64_t block;     // tokens that fill a panel's columns as lanes: what is packed at a time
    std::int64_t panels;    // of kPanel columns that D takes
    std::int64_t bytes;     // of a number in memory

    Lanes(const Kernels& kernels, const Attention& attention);
};

// One document seen by the query heads of one key head.
struct Unit {
    std::int64_t row, begin, length, kv_head;

    std::int64_t blocks() const { return (length + kKeys - 1) / kKeys; }
};

std::vector<Unit> units_of(const Attention& attention);  // the longest first

// A tile and who sees what in it; keys and queries are counted from the document's beginning.
class Tile {
  public:
    Tile(const Attention& attention, const Unit& unit, std::int64_t query_block, std::int64_t key_block);

    struct Part {
        std::int64_t row, rows, column, columns;
    };
    // Rows row … row + step - 1 of an edge tile with the columns in which any of them is seen, whole vectors;
    // all of a tile that is not at an edge.
    Part part(std::int64_t row, std::int64_t step) const;

    // Replaces what is not seen of an edge tile.
    void mask(float* tile, float with) const;

    bool edge() const { return edge_; }
    std::int64_t rows() const { return rows_; }
    std::int64_t columns() const { return up_to(columns_, kVector); }

  private:
    std::int64_t first(std::int64_t row) const;  // columns [first, last) see the row
    std::int64_t last(std::int64_t row) const;

    bool causal_, edge_;
    std::int64_t key_, query_, rows_, columns_, window_;
};

// Blocks of keys that a block of queries sees: [begin, end).
struct Range {
    std::int64_t begin, end;
};
Range keys_seen(const Attention& attention, const Unit& unit, std::int64_t query_block);

// Blocks of queries that see a block of keys: [begin, end).
Range queries_seeing(const Attention& attention, const Unit& unit, std::int64_t key_block);

// Puts tokens of one head into lanes. Memory is read once, row by row, because rows of one head are apart by
// a power of two more often than not and then fight for the same lines of a cache; the rest is made from that
// copy.
class Packer {
  public:
    Packer(const Kernels& kernels, const Attention& attention);

    const Lanes lanes;

    // to[t * lanes.depth + l]: `count` tokens of a document from `token` on, as they are.
    void rows(const Heads& heads, const Unit& unit, std::int64_t head, std::int64_t token, std::int64_t count,
              std::uint32_t* to) const;

    // to[l * kPanel + t]: at most kPanel rows as columns of a panel.
    void columns(const std::uint32_t* rows, std::int64_t count, std::uint32_t* to) const;

    // to[p][t][c], p < lanes.panels: at most kPanel rows as lanes along the tokens, rows of panels that hold
    // numbers p * kPanel + c. Zeros for tokens above.
    void panels_along(const std::uint32_t* rows, std::int64_t count, std::uint32_t* to) const;
    std::int64_t panels_along_size() const { return lanes.panels * kPanel / lanes.per_lane * kPanel; }

    // to[d * kPanel + t]: at most lanes.block rows as lanes along the tokens, one row of kPanel lanes for
    // each number. Zeros for tokens above. Scratch holds rows_along_scratch() lanes.
    void rows_along(const std::uint32_t* rows, std::int64_t count, std::uint32_t* scratch,
                    std::uint32_t* to) const;
    std::int64_t rows_along_scratch() const { return lanes.block / lanes.per_lane * D_; }
    // What a document takes whose blocks are packed one after the other, and where a token stands in that.
    std::int64_t rows_along_size(std::int64_t tokens) const {
        return up_to(tokens, lanes.block) / lanes.block * D_ * kPanel;
    }
    std::int64_t rows_along_offset(std::int64_t token) const {
        return token / lanes.block * D_ * kPanel + token % lanes.block / lanes.per_lane;
    }

    // sums[t] = row t · token t of `heads`; scratch holds D floats.
    void dots(const std::uint32_t* rows, const Heads& heads, const Unit& unit, std::int64_t head,
              std::int64_t token, std::int64_t count, float* scratch, float* sums) const;

    // Writes tokens that stand as columns (sums[d * kPanel + t]); scratch holds kPanel * kPanel floats.
    void write_columns(const float* sums, std::int64_t count, float* scratch, const Heads& heads,
                       const Unit& unit, std::int64_t head, std::int64_t token) const;

  private:
    // Lanes along a row and the next one, or along a single one, for numbers d … d + count - 1.
    void along(const std::uint32_t* row, bool has_next, std::int64_t d, std::int64_t count,
               std::uint32_t* to) const;

    const Kernels& kernels_;
    Type type_;
    std::int64_t D_;
};

// One block of queries of one head.
struct Task {
    std::int64_t unit, head, query_block;  // head within the unit's group
};

// All tasks of units [first, last), those of one unit by descending query block, then ascending head; units
// are mixed `mixed` at a time, so that neighbours in time seldom share keys.
std::vector<Task> tasks_of(const std::vector<Unit>& units, std::int64_t first, std::int64_t last,
                           std::int64_t group, int mixed);

// Cuts units into runs that are packed and done one after the other, by the bytes each unit needs: enough
// units to keep all threads busy, and few enough that what they share stays near the processor.
std::vector<Range> waves_of(const std::vector<std::int64_t>& sizes, int threads);

// Address of number 0 of a head of a token of a document.
inline char* address(const Heads& heads, const Unit& unit, std::int64_t head, std::int64_t token,
                     std::int64_t bytes) {
    const std::int64_t element =
        unit.row * heads.batch + (unit.begin + token) * heads.token + head * heads.head;
    return static_cast<char*>(heads.data) + element * bytes;
}

}  // namespace tiles
}  // namespace halfbyte

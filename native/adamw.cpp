// Finds the pieces of a map and splits the blocks of a step over threads, so that no bit depends on how many.
#include "adamw.hpp"

#include "parallel.hpp"

namespace halfbyte {
namespace {

constexpr std::int64_t kAlone = 64;  // blocks below which waking a second thread costs more than it saves

// Magnitudes `first` … `last`, which are evenly spaced and end where number last + 1 begins.
void set_piece(DynamicMap& map, int piece, const float* magnitudes, int first, int last) {
    const double low = magnitudes[first], high = magnitudes[last];
    const double slope = last > first ? (last - first) / (high - low) : 0.0;
    map.end[piece] = map.thresholds[last];
    map.slope[piece] = static_cast<float>(slope);
    map.shift[piece] = static_cast<float>(first - slope * low);
    map.most[piece] = static_cast<float>(last);
}

}  // namespace

DynamicMap dynamic_map(const float* magnitudes, const float* thresholds, int last) {
    DynamicMap map{};
    map.thresholds = thresholds;
    map.last = last;
    // 0 and the first of the lowest decade; what else that holds; decades of twice as many each. The signed
    // map's hold 1, 2, 4, …, 64, so that it has one piece less; the unsigned one's 2, 4, …, 128.
    const bool is_signed = last == 128;
    int piece = 0, first = 2;
    set_piece(map, piece++, magnitudes, 0, 1);
    if (!is_signed) set_piece(map, piece++, magnitudes, first++, 2);
    for (int size = is_signed ? 2 : 4; first < last; size *= 2) {
        set_piece(map, piece++, magnitudes, first, first + size - 1);
        first += size;
    }
    if (is_signed) set_piece(map, piece, magnitudes, first - 1, first - 1);
    return map;
}

void adamw_8bit(const Kernels& kernels, const AdamStep& step, int threads) {
    const std::int64_t blocks = (step.count + kStateBlock - 1) / kStateBlock;
    auto part = [&](std::int64_t, std::int64_t first, std::int64_t last) {
        kernels.adamw_8bit(step, first, last);
    };
    parallel(blocks, blocks < kAlone ? 1 : threads, part);
}

}  // namespace halfbyte

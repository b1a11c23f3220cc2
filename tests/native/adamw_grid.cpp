// Runs the step of AdamW with 8-bit states of every instruction set of this machine on buffers of exactly the
// promised size, so that the sanitizers see any step outside, on one thread and on three, and compares with
// the portable version byte by byte. Exits 1 and says what differs.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "../../native/adamw.hpp"
#include "../../native/dispatch.hpp"

using namespace halfbyte;

namespace {

using Floats = std::vector<float>;
using Bytes = std::vector<std::uint8_t>;

// A dynamic map and the middles between its values.
struct Map {
    Floats values{0.0f, 1.0f}, thresholds;

    explicit Map(bool is_signed) {
        double unit = 1e-6;
        for (int decade = 0; decade < 7; ++decade, unit *= 10.0) {
            const int parts = is_signed ? 1 << decade : 2 << decade;
            for (int i = 0; i < parts; ++i) {
                const auto value = static_cast<float>(unit * (0.1 + 0.9 * (i + 0.5) / parts));
                values.push_back(value);
                if (is_signed) values.push_back(-value);
            }
        }
        std::sort(values.begin(), values.end());
        for (std::size_t i = 0; i + 1 < values.size(); ++i)
            thresholds.push_back((values[i] + values[i + 1]) / 2.0f);
    }
};

// Everything a few steps write, one after the other.
Bytes steps(const Kernels& kernels, std::int64_t count, int threads) {
    static const Map of_m(true), of_v(false);
    const auto size = static_cast<std::size_t>(count);
    const std::size_t blocks = (size + kStateBlock - 1) / kStateBlock;
    Floats p(size), g(size), m_scale(blocks), v_scale(blocks);
    Bytes m(size), v(size);
    std::mt19937 generator(1);
    std::normal_distribution<float> normal;
    for (float& number : p) number = normal(generator);
    for (int step = 0; step < 3; ++step) {
        for (float& number : g) number = normal(generator) * std::exp(4.0f * normal(generator));
        const AdamStep work{.p = p.data(),
                            .g = g.data(),
                            .m = m.data(),
                            .v = v.data(),
                            .m_scale = m_scale.data(),
                            .v_scale = v_scale.data(),
                            .count = count,
                            .m_values = of_m.values.data(),
                            .v_values = of_v.values.data(),
                            .m_map = dynamic_map(&of_m.values[kZero], &of_m.thresholds[kZero], 128),
                            .v_map = dynamic_map(of_v.values.data(), of_v.thresholds.data(), 255),
                            .beta1 = 0.9f,
                            .m_share = 0.1f,
                            .beta2 = 0.999f,
                            .v_share = 0.001f,
                            .decay = 0.999f,
                            .step = -0.01f,
                            .eps = 1e-8f};
        adamw_8bit(kernels, work, threads);
    }
    Bytes all = m;
    all.insert(all.end(), v.begin(), v.end());
    for (const Floats* floats : {&p, &m_scale, &v_scale}) {
        const auto* first = reinterpret_cast<const std::uint8_t*>(floats->data());
        all.insert(all.end(), first, first + floats->size() * sizeof(float));
    }
    return all;
}

}  // namespace

int main() {
    int tried = 0, failures = 0;
    for (int i = 0; i < kInstructionSets; ++i) {
        const InstructionSet& set = instruction_sets()[i];
        if (set.kernels == nullptr || !set.runs) continue;
        ++tried;
        for (const std::int64_t count : {1, 7, 255, 256, 257, 1000, 20000}) {
            const Bytes expected = steps(*portable_kernels(), count, 1);
            for (const int threads : {1, 3})
                if (steps(*set.kernels, count, threads) != expected) {
                    std::printf("%s differs at %d numbers on %d threads\n", set.name, static_cast<int>(count),
                                threads);
                    ++failures;
                }
        }
        std::printf("%s: %d differences so far\n", set.name, failures);
    }
    return tried > 0 && failures == 0 ? 0 : 1;
}

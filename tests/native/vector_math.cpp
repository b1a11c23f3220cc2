// Prints the largest error of each function of vector_math.hpp over a sample of all floats, in units of 2^-24
// of the true value, and what it makes of infinities and NaN. The argument is the distance between sampled
// bit patterns.
#include "../../native/vector_math.hpp"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>

using namespace halfbyte;

namespace {

constexpr int kBatch = 1024;
const double kUnit = std::ldexp(1.0, -24);

struct Function {
    const char* name;
    float (*fast)(float);
    double (*exact)(double);
    double (*allowance)(double);  // error that grows with the argument, in units; the rest is printed
};

double none(double) { return 0.0; }
double exact_sigmoid(double x) { return x < 0 ? std::exp(x) / (1 + std::exp(x)) : 1 / (1 + std::exp(-x)); }
double exact_cumulative(double x) { return 0.5 * std::erfc(-x / std::sqrt(2.0)); }
double exact_density(double x) { return std::exp(-0.5 * x * x) / std::sqrt(2 * std::acos(-1.0)); }
double squared(double x) { return x * x; }
float cumulative(float x) { return vector::normal(vector::One(x)).cumulative.v; }
float density(float x) { return vector::normal(vector::One(x)).density.v; }
double exact_exp(double x) { return std::exp(x); }
double exact_tanh(double x) { return std::tanh(x); }

const Function kFunctions[] = {
    {"exp", vector::exp, exact_exp, none},
    {"sigmoid", vector::sigmoid, exact_sigmoid, none},
    {"tanh", vector::tanh, exact_tanh, none},
    {"normal.cumulative", cumulative, exact_cumulative, squared},
    {"normal.density", density, exact_density, squared},
};

// Distance from the true value in units of 2^-24 of it; the spacing of subnormal numbers, two roundings, is
// free.
double error(float got, double exact) {
    if (std::isnan(got)) return std::numeric_limits<double>::infinity();
    const double most = std::numeric_limits<float>::max() * (1 + kUnit);
    if (std::fabs(exact) >= most || std::isinf(got))
        return static_cast<double>(got) == exact ||
                       (std::isinf(got) && std::fabs(exact) > most * (1 - 4 * kUnit))
                   ? 0.0
                   : std::numeric_limits<double>::infinity();
    const double off = std::fabs(static_cast<double>(got) - exact) - std::ldexp(1.0, -149);
    return off <= 0 ? 0.0 : off / (std::fabs(exact) * kUnit);
}

void measure(const Function& function, std::uint64_t step) {
    double worst = 0, at = 0;
    float x[kBatch], y[kBatch];
    std::uint64_t bits = 0;
    while (bits < 0x100000000u) {
        int count = 0;
        for (; count < kBatch && bits < 0x100000000u; bits += step) {
            const float number = plain::bits_as<float>(static_cast<std::uint32_t>(bits));
            if (number - number == 0.0f) x[count++] = number;
        }
        for (int i = 0; i < count; ++i) y[i] = function.fast(x[i]);
        for (int i = 0; i < count; ++i) {
            const double wide = static_cast<double>(x[i]);
            const double off = error(y[i], function.exact(wide)) - function.allowance(wide);
            if (off > worst) worst = off, at = wide;
        }
    }
    const float infinity = std::numeric_limits<float>::infinity();
    std::printf("%s %.3f at %.9g, limits %g %g, nan %d\n", function.name, worst, at,
                static_cast<double>(function.fast(-infinity)), static_cast<double>(function.fast(infinity)),
                std::isnan(function.fast(std::numeric_limits<float>::quiet_NaN())));
}

}  // namespace

int main(int argc, char** argv) {
    const std::uint64_t step = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 257;
    for (const Function& function : kFunctions) measure(function, step);
    return 0;
}

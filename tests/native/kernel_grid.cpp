// Runs every kernel of every instruction set of this machine on buffers of exactly the promised size, so that
// the sanitizers see any step outside, and compares with the portable version. Exits 1 and says what differs.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <initializer_list>
#include <random>
#include <vector>

#include "../../native/attention.hpp"
#include "../../native/dispatch.hpp"
#include "../../native/loss.hpp"
#include "../../native/parallel.hpp"
#include "../../native/product.hpp"

using namespace halfbyte;

namespace {

int failures = 0;

void check(bool ok, const char* what, const char* isa, std::int64_t rows, std::int64_t cols, int type,
           double off) {
    if (ok) return;
    ++failures;
    std::printf("%s of %s differs at %ld x %ld, type %d: %g\n", what, isa, static_cast<long>(rows),
                static_cast<long>(cols), type, off);
}

const float kNf4[16] = {-1.0f,         -0.69619280f, -0.52507305f, -0.39491749f, -0.28444138f, -0.18477343f,
                        -0.091050036f, 0.0f,         0.079580300f, 0.16093020f,  0.24611230f,  0.33791524f,
                        0.44070983f,   0.56261700f,  0.72295684f,  1.0f};

Codebook nf4() {
    Codebook codebook{};
    for (int i = 0; i < 16; ++i) {
        codebook.values[i] = kNf4[i];
        codebook.order[i] = static_cast<std::uint8_t>(i);
        if (i < 15) codebook.thresholds[i] = (kNf4[i] + kNf4[i + 1]) / 2;
    }
    return codebook;
}

struct Buffer {  // exactly as many bytes as asked for
    std::vector<unsigned char> bytes;
    explicit Buffer(std::int64_t count, Type type)
        : bytes(static_cast<std::size_t>(count * (type == Type::f32 ? 4 : 2))) {}
    void* data() { return bytes.data(); }
};

Buffer random_numbers(std::int64_t count, Type type, unsigned seed) {
    std::mt19937 generator(seed);
    std::normal_distribution<float> normal;
    std::vector<float> wide(static_cast<std::size_t>(count));
    for (float& number : wide) number = normal(generator);
    Buffer buffer(count, type);
    portable_kernels()->from_float(wide.data(), type, count, buffer.data());
    return buffer;
}

std::vector<float> widened(Buffer& buffer, std::int64_t count, Type type) {
    std::vector<float> wide(static_cast<std::size_t>(count));
    portable_kernels()->to_float(buffer.data(), type, count, wide.data());
    return wide;
}

double farthest(const std::vector<float>& got, const std::vector<float>& expected) {
    double most = 0;
    for (std::size_t i = 0; i < got.size(); ++i) {
        const double off = std::fabs(static_cast<double>(got[i]) - static_cast<double>(expected[i]));
        if (!(off <= most)) most = off;  // NaN counts
    }
    return most;
}

struct Quantised {
    std::vector<float> scales;
    std::vector<std::uint8_t> codes;
};

Quantised quantise(const Kernels& kernels, Buffer& numbers, Type type, std::int64_t count, bool search) {
    const std::int64_t blocks = (count + 63) / 64;
    Quantised q{std::vector<float>(static_cast<std::size_t>(blocks)),
                std::vector<std::uint8_t>(static_cast<std::size_t>((count + 1) / 2))};
    const Codebook codebook = nf4();
    if (search)
        kernels.search_scales(numbers.data(), type, count, 64, codebook, {0.64f, 1.08f, 23, 2}, 0, blocks,
                              q.scales.data());
    else
        kernels.block_scales(numbers.data(), type, count, 64, 0, blocks, q.scales.data());
    kernels.encode(numbers.data(), type, count, 64, codebook, q.scales.data(), 0, blocks, q.codes.data());
    return q;
}

// x · Wᵀ + bias, and dy · W.
void linear(const Kernels& kernels, const Weight& weight, Type type, const void* x, std::int64_t M,
            const void* bias, void* y, int threads) {
    const Term term{x, weight.cols, {&weight, nullptr, weight.rows, weight.cols, 0}};
    const Forward product{&term, 1, bias, nullptr, {y, weight.rows, type}};
    forward(kernels, type, M, &product, 1, threads);
}

void linear_grad(const Kernels& kernels, const Weight& weight, Type type, const void* dy, std::int64_t M,
                 void* dx, int threads) {
    const Term term{dy, weight.rows, {&weight, nullptr, weight.rows, weight.cols, 0}};
    const Backward product{M, &term, 1, nullptr, {dx, weight.cols, type}};
    backward(kernels, type, &product, 1, threads);
}

void grid(const Kernels& kernels, std::int64_t rows, std::int64_t cols, Type type) {
    const Kernels& plain = *portable_kernels();
    const int t = static_cast<int>(type);
    const std::int64_t count = rows * cols;
    Buffer numbers = random_numbers(count, type, 1);
    const Quantised expected = quantise(plain, numbers, type, count, false);
    const Quantised got = quantise(kernels, numbers, type, count, false);
    check(got.scales == expected.scales, "block_scales", kernels.name, rows, cols, t, 0);
    check(got.codes == expected.codes, "encode", kernels.name, rows, cols, t, 0);
    const double searched = farthest(quantise(kernels, numbers, type, count, true).scales,
                                     quantise(plain, numbers, type, count, true).scales);
    check(searched < 0.5, "search_scales", kernels.name, rows, cols, t, searched);

    const Weight weight{
        expected.codes.data(), expected.scales.data(), kNf4, nullptr, nullptr, 0, 64, rows, cols};
    Buffer dense(count, type), dense_expected(count, type);
    dequantize(plain, weight, type, dense_expected.data(), 1);
    dequantize(kernels, weight, type, dense.data(), 2);
    check(dense.bytes == dense_expected.bytes, "decode", kernels.name, rows, cols, t, 0);

    const double tolerance = type == Type::f32 ? 1e-4 : 0.2;
    for (const std::int64_t M : {1, 2, 5, 8, 9, 23, 70}) {
        Buffer x = random_numbers(M * cols, type, 2), dy = random_numbers(M * rows, type, 3);
        Buffer bias = random_numbers(rows, type, 4);
        Buffer y(M * rows, type), y_expected(M * rows, type), dx(M * cols, type), dx_expected(M * cols, type);
        linear(plain, weight, type, x.data(), M, bias.data(), y_expected.data(), 1);
        linear(kernels, weight, type, x.data(), M, bias.data(), y.data(), 3);
        double off = farthest(widened(y, M * rows, type), widened(y_expected, M * rows, type));
        check(off < tolerance, "linear", kernels.name, rows, cols, t, off);
        linear_grad(plain, weight, type, dy.data(), M, dx_expected.data(), 1);
        linear_grad(kernels, weight, type, dy.data(), M, dx.data(), 3);
        off = farthest(widened(dx, M * cols, type), widened(dx_expected, M * cols, type));
        check(off < tolerance, "linear_grad", kernels.name, rows, cols, t, off);
    }
}

// Rows of losses: the same bits as the portable version's, in as many threads as one likes.
struct Losses {
    std::vector<float> logits;
    std::vector<double> nll, objective;
};

Losses losses(const Kernels& kernels, std::int64_t rows, std::int64_t count, const Bend& bend, Type type,
              int threads) {
    Buffer random = random_numbers(rows * count, Type::f32, 5), bias = random_numbers(count, Type::f32, 6);
    Losses found{widened(random, rows * count, Type::f32),
                 std::vector<double>(static_cast<std::size_t>(rows)),
                 std::vector<double>(static_cast<std::size_t>(rows))};
    std::vector<std::int64_t> targets;
    for (std::int64_t i = 0; i < rows; ++i) targets.push_back((i * 7) % count);
    const LossRows job{.logits = found.logits.data(),
                       .targets = targets.data(),
                       .bias = bend.cap == 0.0f ? nullptr : reinterpret_cast<const float*>(bias.data()),
                       .rows = rows,
                       .count = count,
                       .bend = bend,
                       .smoothing = bend.cap == 0.0f ? 0.0 : 0.1,
                       .z_loss = bend.cap == 0.0f ? 0.0 : 1e-3,
                       .nll = found.nll.data(),
                       .objective = found.objective.data()};
    loss_rows(kernels, job, type, 0.125, threads);
    return found;
}

void loss_grid(const Kernels& kernels) {
    for (const std::int64_t count : {1, 5, 16, 255, 256, 257, 1003})
        for (const Type type : {Type::f32, Type::bf16, Type::f16})
            for (const Bend bend : {Bend{1.0f, 0.0f}, Bend{0.5f, 3.0f}}) {
                const Losses got = losses(kernels, 5, count, bend, type, 3);
                const Losses expected = losses(*portable_kernels(), 5, count, bend, type, 1);
                const bool same = std::memcmp(got.logits.data(), expected.logits.data(),
                                              got.logits.size() * sizeof(float)) == 0 &&
                                  got.nll == expected.nll && got.objective == expected.objective;
                check(same, "loss_rows", kernels.name, 5, count, static_cast<int>(type),
                      farthest(got.logits, expected.logits));
            }
}

struct Attended {
    std::vector<float> out, lse, dq, dk, dv;
};

// Heads of tokens that stand next to each other, in a buffer of exactly their size.
Attended attend(const Kernels& kernels, Attention what, std::int64_t B, int threads) {
    const std::int64_t queries = B * what.T * what.H * what.D, keys = B * what.T * what.Hkv * what.D;
    Buffer q = random_numbers(queries, what.type, 5), k = random_numbers(keys, what.type, 6);
    Buffer v = random_numbers(keys, what.type, 7), dout = random_numbers(queries, what.type, 8);
    Buffer out(queries, what.type), dq(queries, what.type), dk(keys, what.type), dv(keys, what.type);
    std::vector<float> lse(static_cast<std::size_t>(B * what.H * what.T));
    const auto of = [&](Buffer& buffer, std::int64_t heads) {
        return Heads{buffer.data(), what.T * heads * what.D, heads * what.D, what.D};
    };
    attention(kernels, what, of(q, what.H), of(k, what.Hkv), of(v, what.Hkv), of(out, what.H), lse.data(),
              threads);
    attention_grad(kernels, what, of(dout, what.H), of(q, what.H), of(k, what.Hkv), of(v, what.Hkv),
                   of(out, what.H), lse.data(), of(dq, what.H), of(dk, what.Hkv), of(dv, what.Hkv), threads);
    return {widened(out, queries, what.type), lse, widened(dq, queries, what.type),
            widened(dk, keys, what.type), widened(dv, keys, what.type)};
}

void attentions(const Kernels& kernels, std::int64_t T, std::int64_t D, Type type) {
    const std::int32_t half = static_cast<std::int32_t>(T / 2), all = static_cast<std::int32_t>(T);
    const std::int32_t documents[] = {0, 0, all, 1, 0, half, 1, half, all};
    for (const std::int64_t window : {0, 3, 70}) {
        const Attention what{.type = type,
                             .T = T,
                             .H = 3,
                             .Hkv = T % 2 == 0 ? 3 : 1,
                             .D = D,
                             .documents = documents,
                             .count = T > 1 ? 3 : 1,
                             .scale = 0.3f,
                             .causal = window > 0 || T % 3 != 0,
                             .window = window};
        const Attended expected = attend(*portable_kernels(), what, 2, 1), got = attend(kernels, what, 2, 3);
        const int t = static_cast<int>(type);
        // Numbers are of the order of 1, gradients of keys sum up to T of them: bf16 rounds to 2^-8 of that.
        const double tolerance = (type == Type::f32 ? 1e-4 : 0.02) * (2 + std::sqrt(static_cast<double>(T)));
        check(farthest(got.lse, expected.lse) < 1e-3, "lse", kernels.name, T, D, t, 0);
        const struct {
            const char* name;
            const std::vector<float>&got, &expected;
        } results[] = {{"attention", got.out, expected.out},
                       {"attention dq", got.dq, expected.dq},
                       {"attention dk", got.dk, expected.dk},
                       {"attention dv", got.dv, expected.dv}};
        for (const auto& result : results) {
            const double off = farthest(result.got, result.expected);
            check(off < tolerance, result.name, kernels.name, T, D, t, off);
        }
    }
}

// 2^x of every score from -130 to 120 in steps of 1/512, and of the ends.
void exponentials(const Kernels& kernels) {
    std::vector<float> scores(kPanel), sums(kPanel), shift(kPanel), expected(kPanel);
    double most = 0;
    for (int n = -130 * 512; n < 120 * 512; n += kPanel) {
        for (int j = 0; j < kPanel; ++j)
            scores[static_cast<std::size_t>(j)] = static_cast<float>(n + j) / 512.0f;
        expected = scores;
        kernels.softmax.exponentials(scores.data(), 1, kPanel, 1.0f, shift.data(), sums.data());
        for (std::size_t j = 0; j < kPanel; ++j) {
            const double exact = expected[j] < -126 ? 0 : std::exp2(static_cast<double>(expected[j]));
            const double off = exact == 0 ? scores[j] : std::fabs(scores[j] / exact - 1);
            if (!(off <= most)) most = off;
        }
    }
    check(most < 0x1p-22, "exponentials", kernels.name, 0, 0, 0, most);
    scores[0] = -INFINITY, scores[1] = NAN, scores[2] = 0;
    kernels.softmax.exponentials(scores.data(), 1, 16, 1.0f, shift.data(), sums.data());
    check(scores[0] == 0 && std::isnan(scores[1]) && scores[2] == 1, "exponentials at the ends", kernels.name,
          0, 0, 0, 0);
}

void conversions(const Kernels& kernels) {
    std::vector<float> numbers;
    for (std::uint32_t high = 0; high < 0x10000; ++high)
        for (const std::uint32_t low :
             {0x0000u, 0x0001u, 0x0fffu, 0x1000u, 0x1001u, 0x7fffu, 0x8000u, 0x8001u}) {
            const std::uint32_t bits = high << 16 | low;
            float number;
            std::memcpy(&number, &bits, sizeof number);
            numbers.push_back(number);
        }
    const auto count = static_cast<std::int64_t>(numbers.size());
    for (const Type type : {Type::bf16, Type::f16}) {
        Buffer got(count, type), expected(count, type);
        kernels.from_float(numbers.data(), type, count, got.data());
        portable_kernels()->from_float(numbers.data(), type, count, expected.data());
        const std::vector<float> a = widened(got, count, type), b = widened(expected, count, type);
        std::int64_t differing = 0;
        for (std::size_t i = 0; i < a.size(); ++i)
            if (!(a[i] == b[i] || (std::isnan(a[i]) && std::isnan(b[i]) && std::isnan(numbers[i]))))
                ++differing;
        check(differing == 0, "from_float", kernels.name, count, 1, static_cast<int>(type),
              static_cast<double>(differing));
    }
}

}  // namespace

int main(int argc, char** argv) {
    int tried = 0;
    for (int i = 0; i < kInstructionSets; ++i) {
        const InstructionSet& set = instruction_sets()[i];
        if (set.kernels == nullptr || !set.runs) continue;
        ++tried;
        conversions(*set.kernels);
        loss_grid(*set.kernels);
        const std::int64_t shapes[][2] = {{1, 1},   {3, 5},    {17, 64}, {37, 101},
                                          {64, 96}, {70, 172}, {66, 530}};
        for (const auto& shape : shapes)
            for (const Type type : {Type::f32, Type::bf16, Type::f16})
                grid(*set.kernels, shape[0], shape[1], type);
        exponentials(*set.kernels);
        const std::int64_t tokens[][2] = {{1, 1}, {3, 8}, {70, 33}, {129, 64}, {200, 80}, {66, 130}};
        for (const auto& shape : tokens)
            for (const Type type : {Type::f32, Type::bf16, Type::f16})
                attentions(*set.kernels, shape[0], shape[1], type);
        std::printf("%s: %d differences so far\n", set.name, failures);
    }
    if (argc > 1 && std::strcmp(argv[1], "--overrun") == 0) {  // shows that the sanitizer is awake
        Buffer small(7, Type::f32);
        std::vector<float> out(8);
        portable_kernels()->to_float(small.data(), Type::f32, 8, out.data());
    }
    return tried > 0 && failures == 0 ? 0 : 1;
}

// Asks the processor (CPUID) and the operating system (XCR0: does it save these registers?) what may run.
#include "dispatch.hpp"

#include <cstdint>

#if defined(HALFBYTE_X86)
#if defined(_MSC_VER)
#include <intrin.h>
#else
#include <cpuid.h>
#endif
#endif

namespace halfbyte {
namespace {

struct Features {
    bool avx2 = false, avx512 = false, avx512_bf16 = false, neon = false;
};

#if defined(HALFBYTE_X86)
struct Registers {
    std::uint32_t eax, ebx, ecx, edx;
};

Registers cpuid(std::uint32_t leaf, std::uint32_t subleaf) {
    Registers r{};
#if defined(_MSC_VER)
    int out[4];
    __cpuidex(out, static_cast<int>(leaf), static_cast<int>(subleaf));
    r = {static_cast<std::uint32_t>(out[0]), static_cast<std::uint32_t>(out[1]),
         static_cast<std::uint32_t>(out[2]), static_cast<std::uint32_t>(out[3])};
#else
    __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);
#endif
    return r;
}

std::uint64_t saved_registers() {
#if defined(_MSC_VER)
    return _xgetbv(0);
#else
    std::uint32_t low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return static_cast<std::uint64_t>(high) << 32 | low;
#endif
}

constexpr bool has(std::uint32_t bits, int bit) { return (bits >> bit & 1u) != 0; }

Features detect() {
    Features found;
    const Registers basic = cpuid(1, 0);
    constexpr int kFma = 12, kOsxsave = 27, kAvx = 28, kF16c = 29;
    if (!has(basic.ecx, kOsxsave) || !has(basic.ecx, kAvx)) return found;
    constexpr std::uint64_t kYmm = 0x6, kZmm = 0xe6;
    const std::uint64_t saved = saved_registers();
    const Registers extended = cpuid(7, 0), more = cpuid(7, 1);
    constexpr int kAvx2 = 5, kBmi2 = 8, kAvx512f = 16, kAvx512dq = 17, kAvx512bw = 30, kAvx512vl = 31,
                  kBf16 = 5;
    found.avx2 =
        (saved & kYmm) == kYmm && has(basic.ecx, kFma) && has(basic.ecx, kF16c) && has(extended.ebx, kAvx2);
    found.avx512 = found.avx2 && (saved & kZmm) == kZmm && has(extended.ebx, kBmi2) &&
                   has(extended.ebx, kAvx512f) && has(extended.ebx, kAvx512dq) &&
                   has(extended.ebx, kAvx512bw) && has(extended.ebx, kAvx512vl);
    found.avx512_bf16 = found.avx512 && extended.eax >= 1 && has(more.eax, kBf16);
    return found;
}
#elif defined(HALFBYTE_ARM64)
Features detect() {
    Features found;
    found.neon = true;  // every AArch64 processor has it
    return found;
}
#else
Features detect() { return {}; }
#endif

}  // namespace

const InstructionSet* instruction_sets() {
    static const Features found = detect();
    static const InstructionSet sets[kInstructionSets] = {
        {"portable", portable_kernels(), true},
#if defined(HALFBYTE_ARM64)
        {"neon", neon_kernels(), found.neon},
#else
        {"neon", nullptr, false},
#endif
#if defined(HALFBYTE_X86)
        {"avx2", avx2_kernels(), found.avx2},
        {"avx512", avx512_kernels(), found.avx512},
        {"avx512_bf16", avx512_bf16_kernels(), found.avx512_bf16},
#else
        {"avx2", nullptr, false},
        {"avx512", nullptr, false},
        {"avx512_bf16", nullptr, false},
#endif
    };
    return sets;
}

const Kernels* best_kernels() {
    const Kernels* best = nullptr;
    for (int i = 0; i < kInstructionSets; ++i) {
        const InstructionSet& set = instruction_sets()[i];
        if (set.kernels != nullptr && set.runs) best = set.kernels;
    }
    return best;
}

}  // namespace halfbyte

// Which instruction sets were compiled in, which this processor and system run, and which is in use.
#pragma once

#include "kernels.hpp"

namespace halfbyte {

struct InstructionSet {
    const char* name;
    const Kernels* kernels;  // null: not compiled in
    bool runs;               // processor and operating system have it
};

// All known ones, slowest first; the count is `kInstructionSets`.
constexpr int kInstructionSets = 5;
const InstructionSet* instruction_sets();

// The fastest that runs here.
const Kernels* best_kernels();

}  // namespace halfbyte

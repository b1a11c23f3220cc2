// What the files of the Python module share: the instruction set in use, and the part that each binds.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>

#include "kernels.hpp"

namespace halfbyte {

using Pointer = std::uintptr_t;

template <class T>
T* at(Pointer pointer) {
    return reinterpret_cast<T*>(pointer);
}

// Of the instruction set in use: the one chosen with `use`, else the best that runs here.
const Kernels& active_kernels();

// One function per file of bindings.
void bind_adamw(nanobind::module_& m);
void bind_attention(nanobind::module_& m);
void bind_elementwise(nanobind::module_& m);
void bind_loss(nanobind::module_& m);

}  // namespace halfbyte

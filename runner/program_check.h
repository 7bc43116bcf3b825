// Checks a program before ExecuTorch loads it, whose runtime trusts much of what a file says.
#pragma once

#include <cstddef>
#include <cstdint>

namespace et_moe {

/// Checks a program (ExecuTorch's schema/program.fbs) of `size` bytes, without its trailer:
/// offsets, indices and sizes, that every tensor has memory of its size, and that every kernel is
/// one of those that `et-moe export` uses (kernel_signatures.h) and is given what it takes.
///
/// Throws std::runtime_error that says what is wrong, and in which method.
void check_program(const uint8_t* data, size_t size);

}  // namespace et_moe

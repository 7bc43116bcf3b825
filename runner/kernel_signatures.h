// What the kernels that a program may call take.
#pragma once

#include <string>
#include <string_view>

namespace et_moe {

/// The arguments that a kernel takes, one letter each: t a tensor, o a tensor or None, i an
/// integer, n a number, b a Boolean, m an integer or None, l a list of integers, L a list of
/// integers or None, s a list of tensors. Kernels of this project (`et_moe::`) check theirs
/// themselves; of these it is "*".
///
/// Throws std::runtime_error for any other kernel than those that `et-moe export` uses.
std::string_view kernel_signature(const std::string& name);

}  // namespace et_moe

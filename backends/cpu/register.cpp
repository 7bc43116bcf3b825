// Registers the kernels when the program starts. Compiled for the baseline of the architecture, so
// that a processor without AVX2 gets a message and not an illegal instruction.
#include <executorch/runtime/kernel/operator_registry.h>

#include "backends/cpu/boxing.h"
#include "backends/cpu/ops.h"

namespace et_moe::cpu {
namespace {

using executorch::runtime::Error;
using executorch::runtime::Kernel;

/// Whether it has what x86-64-v3 names, for which the kernels are compiled.
bool processor_supported() {
#ifdef __x86_64__
  static const bool supported = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                                __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
                                __builtin_cpu_supports("f16c") && __builtin_cpu_supports("lzcnt") &&
                                __builtin_cpu_supports("movbe");
  return supported;
#else
  return true;
#endif
}

#define ET_MOE_KERNEL(name)                                                                   \
  Kernel("et_moe::" #name ".out", [](KernelRuntimeContext& context, Span<EValue*> stack) {    \
    if (!processor_supported()) {                                                             \
      ET_LOG(Error, "et_moe::" #name ": this processor is older than x86-64-v3 (AVX2, FMA)"); \
      return context.fail(Error::NotSupported);                                               \
    }                                                                                         \
    call("et_moe::" #name, name, context, stack);                                             \
  })

const Kernel kKernels[] = {
    ET_MOE_KERNEL(quantize_int8),   ET_MOE_KERNEL(silu_quantize_int8),
    ET_MOE_KERNEL(linear),          ET_MOE_KERNEL(linear_w4a8),
    ET_MOE_KERNEL(linear_w4a16),    ET_MOE_KERNEL(linear_w8a8),
    ET_MOE_KERNEL(linear_w8a16),    ET_MOE_KERNEL(embedding_w8),
    ET_MOE_KERNEL(moe_router),      ET_MOE_KERNEL(moe),
    ET_MOE_KERNEL(moe_w4a8),        ET_MOE_KERNEL(moe_w4a16),
    ET_MOE_KERNEL(moe_w8a8),        ET_MOE_KERNEL(moe_w8a16),
    ET_MOE_KERNEL(causal_conv1d),   ET_MOE_KERNEL(gated_delta_rule),
    ET_MOE_KERNEL(gated_delta_net), ET_MOE_KERNEL(attention),
    ET_MOE_KERNEL(sample),          ET_MOE_KERNEL(rms_norm),
    ET_MOE_KERNEL(token_shift),     ET_MOE_KERNEL(embedding_w4),
};

#undef ET_MOE_KERNEL

[[maybe_unused]] const Error kRegistered =
    executorch::runtime::register_kernels({kKernels, std::size(kKernels)});

}  // namespace
}  // namespace et_moe::cpu

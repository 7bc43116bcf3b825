// Turns the runtime's argument stack into a kernel's typed arguments. ExecuTorch's own
// EXECUTORCH_LIBRARY aborts the process on an argument of another kind and trusts the stack's
// length; a damaged program must end in an error instead.
#pragma once

#include <executorch/runtime/core/evalue.h>
#include <executorch/runtime/core/event_tracer_hooks.h>

#include <type_traits>
#include <utility>

#include "backends/cpu/op.h"

namespace et_moe::cpu {

using executorch::runtime::EValue;
using executorch::runtime::Span;

template <class T>
struct Unboxed;

template <>
struct Unboxed<Tensor> {
  static constexpr const char* kKind = "a tensor";
  static bool holds(const EValue& value) { return value.isTensor(); }
  static Tensor& get(EValue& value) { return value.toTensor(); }
};

template <>
struct Unboxed<OptionalTensor> {
  static constexpr const char* kKind = "a tensor or None";
  static bool holds(const EValue& value) { return value.isTensor() || value.isNone(); }
  static OptionalTensor get(EValue& value) { return value.toOptional<Tensor>(); }
};

template <>
struct Unboxed<int64_t> {
  static constexpr const char* kKind = "an integer";
  static bool holds(const EValue& value) { return value.isInt(); }
  static int64_t get(EValue& value) { return value.toInt(); }
};

template <>
struct Unboxed<double> {
  static constexpr const char* kKind = "a number";
  static bool holds(const EValue& value) { return value.isDouble(); }
  static double get(EValue& value) { return value.toDouble(); }
};

template <>
struct Unboxed<bool> {
  static constexpr const char* kKind = "a Boolean";
  static bool holds(const EValue& value) { return value.isBool(); }
  static bool get(EValue& value) { return value.toBool(); }
};

template <class T>
bool holds(Op& op, const Span<EValue*>& stack, size_t i) {
  return Unboxed<T>::holds(*stack[i]) || op.fail("argument %zu is not %s", i, Unboxed<T>::kKind);
}

template <class... Args, size_t... I>
void call(Op& op, void (*kernel)(Op&, Args...), Span<EValue*> stack, std::index_sequence<I...>) {
  if (stack.size() < sizeof...(Args)) {
    op.fail("expected %zu arguments, got %zu", sizeof...(Args), stack.size());
    return;
  }
  if (!(holds<std::decay_t<Args>>(op, stack, I) && ...)) return;
  kernel(op, Unboxed<std::decay_t<Args>>::get(*stack[I])...);
}

template <class... Args>
void call(const char* name, void (*kernel)(Op&, Args...), KernelRuntimeContext& context,
          Span<EValue*> stack) {
  executorch::runtime::internal::EventTracerProfileOpScope profile(context.internal_event_tracer(),
                                                                   name);
  Op op(context, name);
  call(op, kernel, stack, std::index_sequence_for<Args...>());
}

}  // namespace et_moe::cpu

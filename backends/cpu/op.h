// What every kernel needs around its arithmetic: argument checks, scratch memory and threads.
#pragma once

#include <executorch/runtime/core/exec_aten/exec_aten.h>
#include <executorch/runtime/kernel/kernel_runtime_context.h>
#include <executorch/runtime/kernel/thread_parallel_interface.h>

#include <cstdint>
#include <initializer_list>
#include <optional>

namespace et_moe::cpu {

using executorch::aten::ScalarType;
using executorch::aten::Tensor;
using executorch::runtime::KernelRuntimeContext;
using OptionalTensor = std::optional<Tensor>;
using Types = std::initializer_list<ScalarType>;
using Sizes = std::initializer_list<int64_t>;

inline constexpr Types kFloats = {ScalarType::Float, ScalarType::BFloat16};

// Of the scales of INT4 weights.
inline constexpr Types kScales = {ScalarType::BFloat16, ScalarType::Half};

// A size that may be anything.
inline constexpr int64_t kAny = -1;

// One call of a kernel. Whatever fails is logged with the op's and the argument's name and makes
// the runtime abandon the method with an error; a kernel then returns without touching its results.
class Op {
 public:
  Op(KernelRuntimeContext& context, const char* name) : context_(context), name_(name) {}

  // Fails with InvalidArgument and a printf-style message. Returns false.
  __attribute__((format(printf, 2, 3))) bool fail(const char* format, ...);

  // Fails unless the tensor is contiguous and has one of these dtypes and these sizes (kAny stands
  // for any size). Returns whether it has.
  bool check(const char* argument, const Tensor& tensor, Types types, Sizes sizes);
  bool check(const char* argument, const OptionalTensor& tensor, Types types, Sizes sizes);

  // Gives a result its sizes, within the memory planned for it.
  bool output(const char* argument, Tensor& out, ScalarType dtype, Sizes sizes);

  // Fails unless it is a group size of the INT4 format and divides `columns`.
  bool group_size(int64_t group_size, int64_t columns);

  // Uninitialised memory, aligned to a cache line, that lives until the kernel returns; null, after
  // failing, if there is none.
  template <class T>
  T* scratch(int64_t count) {
    return static_cast<T*>(allocate(count, sizeof(T)));
  }

  // Calls body(begin, end) on parts of 0..items, by several threads if the work (multiply-adds, or
  // as costly) is worth it. Bodies must not depend on how the range is cut.
  template <class Body>
  void parallel(int64_t items, int64_t work_per_item, const Body& body) {
    if (items <= 0) return;
    const int64_t grain = kMinimumWork / (work_per_item > 0 ? work_per_item : 1) + 1;
    if (items <= grain) return body(0, items);
    if (!executorch::extension::parallel_for(0, items, grain, body)) {
      fail("the thread pool refused the work");
    }
  }

 private:
  // About ten microseconds of one core.
  static constexpr int64_t kMinimumWork = 1 << 17;

  void* allocate(int64_t count, size_t size);

  KernelRuntimeContext& context_;
  const char* name_;
};

}  // namespace et_moe::cpu

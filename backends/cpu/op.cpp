#include "backends/cpu/op.h"

#include <executorch/runtime/core/exec_aten/util/dim_order_util.h>
#include <executorch/runtime/core/exec_aten/util/scalar_type_util.h>
#include <executorch/runtime/core/exec_aten/util/tensor_util.h>

#include <cstdarg>
#include <cstdio>
#include <string>

namespace et_moe::cpu {

using executorch::runtime::Error;

namespace {

std::string describe(int64_t size) { return size == kAny ? "*" : std::to_string(size); }

template <class Range>
std::string describe_sizes(const Range& sizes) {
  std::string text = "[";
  for (auto size : sizes) text += (text.size() > 1 ? ", " : "") + describe(size);
  return text + "]";
}

std::string describe_types(Types types) {
  std::string text;
  for (ScalarType type : types) {
    text += (text.empty() ? "" : " or ");
    text += executorch::runtime::toString(type);
  }
  return text;
}

bool has_sizes(const Tensor& tensor, Sizes sizes) {
  if (tensor.dim() != static_cast<ssize_t>(sizes.size())) return false;
  ssize_t i = 0;
  for (int64_t size : sizes) {
    if (size != kAny && tensor.size(i) != size) return false;
    ++i;
  }
  return true;
}

bool has_type(const Tensor& tensor, Types types) {
  for (ScalarType type : types) {
    if (tensor.scalar_type() == type) return true;
  }
  return false;
}

}  // namespace

bool Op::fail(const char* format, ...) {
  char message[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(message, sizeof(message), format, arguments);
  va_end(arguments);
  ET_LOG(Error, "%s: %s", name_, message);
  context_.fail(Error::InvalidArgument);
  return false;
}

bool Op::check(const char* argument, const Tensor& tensor, Types types, Sizes sizes) {
  if (!has_type(tensor, types) || !has_sizes(tensor, sizes)) {
    return fail("%s: expected %s %s, got %s %s", argument, describe_types(types).c_str(),
                describe_sizes(sizes).c_str(), executorch::runtime::toString(tensor.scalar_type()),
                describe_sizes(tensor.sizes()).c_str());
  }
  if (!executorch::runtime::is_contiguous_dim_order(tensor.dim_order().data(), tensor.dim())) {
    return fail("%s: expected a contiguous tensor", argument);
  }
  if (tensor.numel() > 0 && tensor.const_data_ptr() == nullptr) {
    return fail("%s: the tensor has no data", argument);
  }
  return true;
}

bool Op::check(const char* argument, const OptionalTensor& tensor, Types types, Sizes sizes) {
  return !tensor.has_value() || check(argument, *tensor, types, sizes);
}

bool Op::output(const char* argument, Tensor& out, ScalarType dtype, Sizes sizes) {
  executorch::aten::SizesType shape[8];
  size_t rank = 0;
  for (int64_t size : sizes) shape[rank++] = static_cast<executorch::aten::SizesType>(size);
  if (out.dim() != static_cast<ssize_t>(rank) ||
      executorch::runtime::resize_tensor(out, {shape, rank}) != Error::Ok) {
    return fail("%s: cannot be resized from %s to %s", argument,
                describe_sizes(out.sizes()).c_str(), describe_sizes(sizes).c_str());
  }
  return check(argument, out, {dtype}, sizes);
}

bool Op::group_size(int64_t group_size, int64_t columns) {
  if (group_size != 32 && group_size != 64 && group_size != 128) {
    return fail("group_size: expected 32, 64 or 128, got %lld", (long long)group_size);
  }
  if (columns % group_size != 0) {
    return fail("group_size: %lld does not divide the input dimension %lld", (long long)group_size,
                (long long)columns);
  }
  return true;
}

void* Op::allocate(int64_t count, size_t size) {
  size_t bytes = 0;
  if (count < 0 || __builtin_mul_overflow(static_cast<size_t>(count), size, &bytes)) {
    fail("scratch memory of %lld x %zu bytes", (long long)count, size);
    return nullptr;
  }
  auto memory = context_.allocate_temp(bytes + 1, 64);
  if (!memory.ok()) {
    ET_LOG(Error, "%s: no %zu bytes of scratch memory", name_, bytes);
    context_.fail(memory.error());
    return nullptr;
  }
  return memory.get();
}

}  // namespace et_moe::cpu

// The functions that AOTInductor's code calls for its tensors. Signatures and meaning are those of
// torch/csrc/inductor/aoti_torch/c/shim.h in PyTorch 2.13; a function returns 0 on success. Names
// have the prefix `et_moe_`, so that libtorch or ExecuTorch's own delegate in the same process,
// which have functions of the original names, are not mixed up with these.

#include <cstdio>
#include <cstring>
#include <exception>
#include <string>
#include <utility>

#include "backends/cuda/runtime/tensor.h"

namespace et_moe::cuda {
namespace {

thread_local Arena* current_arena = nullptr;
thread_local std::optional<DelegateError> first_error;

enum : int32_t { kCpu = 0, kCuda = 1 };

/// Runs `body`; an exception becomes an error code, and is kept for `take_error`.
template <typename Body>
int32_t guarded(const char* name, const Body& body) {
  try {
    body();
    return 0;
  } catch (const std::exception& e) {
    if (!first_error) first_error.emplace(error_code(e), std::string(name) + ": " + e.what());
    return 1;
  }
}

Tensor* make(std::byte* data, int64_t dim, const int64_t* sizes, const int64_t* strides,
             int64_t offset, int32_t dtype, Arena::Block owner) {
  return new Tensor{data,  {sizes, sizes + dim}, {strides, strides + dim}, offset,
                    dtype, std::move(owner)};
}

}  // namespace

std::optional<DelegateError> take_error() { return std::exchange(first_error, std::nullopt); }

int64_t itemsize(int32_t dtype) {
  switch (dtype) {
    case 0:   // uint8
    case 1:   // int8
    case 11:  // bool
      return 1;
    case 5:   // float16
    case 15:  // bfloat16
      return 2;
    case 3:  // int32
    case 6:  // float32
      return 4;
    case 4:  // int64
      return 8;
    default:
      return 0;
  }
}

int64_t Tensor::numel() const {
  int64_t count = 1;
  for (int64_t size : sizes) count *= size;
  return count;
}

int64_t Tensor::itemsize() const { return cuda::itemsize(dtype); }

int64_t Tensor::nbytes() const {
  if (numel() == 0) return 0;
  int64_t last = 0;
  for (size_t i = 0; i < sizes.size(); ++i) last += (sizes[i] - 1) * strides[i];
  return (last + 1) * itemsize();
}

std::unique_ptr<Tensor> view(std::byte* data, std::vector<int64_t> sizes, int32_t dtype) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;) strides[i - 1] = strides[i] * sizes[i];
  return std::make_unique<Tensor>(
      Tensor{data, std::move(sizes), std::move(strides), 0, dtype, nullptr});
}

ArenaScope::ArenaScope(Arena& arena) : previous_(current_arena) { current_arena = &arena; }
ArenaScope::~ArenaScope() { current_arena = previous_; }

}  // namespace et_moe::cuda

using et_moe::cuda::current_arena;
using et_moe::cuda::guarded;
using et_moe::cuda::make;
using et_moe::cuda::Tensor;

#define ET_MOE_SHIM extern "C" __attribute__((visibility("default")))

ET_MOE_SHIM int32_t et_moe_aoti_torch_device_type_cpu() { return et_moe::cuda::kCpu; }
ET_MOE_SHIM int32_t et_moe_aoti_torch_device_type_cuda() { return et_moe::cuda::kCuda; }
ET_MOE_SHIM int32_t et_moe_aoti_torch_dtype_uint8() { return 0; }
ET_MOE_SHIM int32_t et_moe_aoti_torch_dtype_int8() { return 1; }
ET_MOE_SHIM int32_t et_moe_aoti_torch_dtype_int32() { return 3; }
ET_MOE_SHIM int32_t et_moe_aoti_torch_dtype_int64() { return 4; }
ET_MOE_SHIM int32_t et_moe_aoti_torch_dtype_float16() { return 5; }
ET_MOE_SHIM int32_t et_moe_aoti_torch_dtype_float32() { return 6; }
ET_MOE_SHIM int32_t et_moe_aoti_torch_dtype_bool() { return 11; }
ET_MOE_SHIM int32_t et_moe_aoti_torch_dtype_bfloat16() { return 15; }
ET_MOE_SHIM bool et_moe_aoti_torch_grad_mode_is_enabled() { return false; }
ET_MOE_SHIM void et_moe_aoti_torch_grad_mode_set_enabled(bool) {}
ET_MOE_SHIM void et_moe_aoti_torch_warn(const char*, const char*, uint32_t, const char* text) {
  std::fprintf(stderr, "%s\n", text);
}
// Everything runs on the stream that the container is given.
ET_MOE_SHIM int32_t et_moe_aoti_torch_create_cuda_stream_guard(void*, int32_t, void** guard) {
  *guard = nullptr;
  return 0;
}
ET_MOE_SHIM int32_t et_moe_aoti_torch_delete_cuda_stream_guard(void*) { return 0; }

ET_MOE_SHIM int32_t et_moe_aoti_torch_empty_strided(int64_t dim, const int64_t* sizes,
                                                    const int64_t* strides, int32_t dtype,
                                                    int32_t device, int32_t, Tensor** result) {
  return guarded("aoti_torch_empty_strided", [&] {
    if (device != et_moe::cuda::kCuda || !current_arena || et_moe::cuda::itemsize(dtype) == 0) {
      throw std::runtime_error("only CUDA tensors of known dtypes can be made, during a run");
    }
    std::unique_ptr<Tensor> tensor(make(nullptr, dim, sizes, strides, 0, dtype, nullptr));
    tensor->owner = current_arena->allocate(static_cast<size_t>(tensor->nbytes()));
    tensor->data = tensor->owner.get();
    *result = tensor.release();
  });
}

ET_MOE_SHIM int32_t et_moe_aoti_torch_create_tensor_from_blob(void* data, int64_t dim,
                                                              const int64_t* sizes,
                                                              const int64_t* strides,
                                                              int64_t offset, int32_t dtype,
                                                              int32_t, int32_t, Tensor** result) {
  return guarded("aoti_torch_create_tensor_from_blob", [&] {
    *result = make(static_cast<std::byte*>(data), dim, sizes, strides, offset, dtype, nullptr);
  });
}

ET_MOE_SHIM int32_t et_moe_aoti_torch_create_tensor_from_blob_v2(
    void* data, int64_t dim, const int64_t* sizes, const int64_t* strides, int64_t offset,
    int32_t dtype, int32_t device, int32_t index, Tensor** result, int32_t, const uint8_t*,
    int64_t) {
  return et_moe_aoti_torch_create_tensor_from_blob(data, dim, sizes, strides, offset, dtype, device,
                                                   index, result);
}

ET_MOE_SHIM int32_t et_moe_aoti_torch__reinterpret_tensor(Tensor* self, int64_t dim,
                                                          const int64_t* sizes,
                                                          const int64_t* strides, int64_t offset,
                                                          Tensor** result) {
  return guarded("aoti_torch__reinterpret_tensor", [&] {
    *result =
        make(self->data, dim, sizes, strides, self->offset + offset, self->dtype, self->owner);
  });
}

ET_MOE_SHIM int32_t et_moe_aoti_torch_new_tensor_handle(Tensor* self, Tensor** result) {
  return guarded("aoti_torch_new_tensor_handle", [&] { *result = new Tensor(*self); });
}

ET_MOE_SHIM int32_t et_moe_aoti_torch_delete_tensor_object(Tensor* self) {
  delete self;
  return 0;
}

// Compiled code clones only its constants, and it has none.
ET_MOE_SHIM int32_t et_moe_aoti_torch_clone(Tensor*, Tensor**) { return 1; }
ET_MOE_SHIM int32_t et_moe_aoti_torch_clone_preserve_strides(Tensor*, Tensor**) { return 1; }

ET_MOE_SHIM int32_t et_moe_aoti_torch_get_data_ptr(Tensor* self, void** result) {
  *result = self->data + self->offset * self->itemsize();
  return 0;
}
ET_MOE_SHIM int32_t et_moe_aoti_torch_get_device_type(Tensor*, int32_t* result) {
  *result = et_moe::cuda::kCuda;
  return 0;
}
ET_MOE_SHIM int32_t et_moe_aoti_torch_get_dtype(Tensor* self, int32_t* result) {
  *result = self->dtype;
  return 0;
}
ET_MOE_SHIM int32_t et_moe_aoti_torch_get_dim(Tensor* self, int64_t* result) {
  *result = static_cast<int64_t>(self->sizes.size());
  return 0;
}
ET_MOE_SHIM int32_t et_moe_aoti_torch_get_numel(Tensor* self, int64_t* result) {
  *result = self->numel();
  return 0;
}
ET_MOE_SHIM int32_t et_moe_aoti_torch_get_sizes(Tensor* self, int64_t** result) {
  *result = self->sizes.data();
  return 0;
}
ET_MOE_SHIM int32_t et_moe_aoti_torch_get_strides(Tensor* self, int64_t** result) {
  *result = self->strides.data();
  return 0;
}
ET_MOE_SHIM int32_t et_moe_aoti_torch_get_storage_offset(Tensor* self, int64_t* result) {
  *result = self->offset;
  return 0;
}
ET_MOE_SHIM int32_t et_moe_aoti_torch_get_storage_size(Tensor* self, int64_t* result) {
  *result = self->nbytes() + self->offset * self->itemsize();
  return 0;
}

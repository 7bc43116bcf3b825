// The delegate: registers the backend `EtMoeCudaBackend` with ExecuTorch's runtime. Its id is its
// own, so that it can live in one process with the delegate of ExecuTorch's CUDA wheels.

#include <executorch/runtime/backend/interface.h>
#include <executorch/runtime/core/error.h>
#include <executorch/runtime/core/evalue.h>
#include <executorch/runtime/core/exec_aten/util/tensor_util.h>
#include <executorch/runtime/platform/log.h>

#include "backends/cuda/runtime/compiled_method.h"
#include "backends/cuda/runtime/errors.h"

namespace et_moe::cuda {
namespace {

using executorch::runtime::ArrayRef;
using executorch::runtime::BackendExecutionContext;
using executorch::runtime::BackendInitContext;
using executorch::runtime::CompileSpec;
using executorch::runtime::DelegateHandle;
using executorch::runtime::EValue;
using executorch::runtime::FreeableBuffer;
using executorch::runtime::Result;
using executorch::runtime::Span;

/// Runs `body`; an exception is logged and becomes its error code.
template <typename Body>
Error guarded(const Body& body) {
  try {
    body();
    return Error::Ok;
  } catch (const std::exception& e) {
    ET_LOG(Error, "%s", e.what());
    return error_code(e);
  }
}

/// The tensor of an argument; throws DelegateError (InvalidArgument) if it does not fit.
const executorch::aten::Tensor& tensor_of(const MethodInfo& info, const EValue& argument,
                                          const char* kind, const TensorSpec& spec) {
  if (argument.isTensor()) {
    const auto& tensor = argument.toTensor();
    const auto sizes = tensor.sizes();
    if (spec.accepts(tensor.scalar_type(), sizes.data(), sizes.size())) return tensor;
  }
  throw DelegateError(Error::InvalidArgument, "method " + info.method + ": the " + kind + " " +
                                                  spec.name + " does not fit, expected " +
                                                  spec.describe());
}

void resize(const executorch::aten::Tensor& tensor, const TensorSpec& spec) {
  const Error error = executorch::runtime::resize_tensor(
      tensor, ArrayRef<executorch::aten::SizesType>(spec.shape.data(), spec.shape.size()));
  if (error != Error::Ok) {
    throw DelegateError(error, "the output " + spec.name + " cannot become " + spec.describe());
  }
}

/// The arguments of a call, inputs before outputs, as the method's code takes them. Outputs get the
/// length of the inputs, where it varies.
HostTensors bind(const MethodInfo& info, Span<EValue*> arguments) {
  const auto& [inputs, outputs, _] = info.spec;
  if (arguments.size() != inputs.size() + outputs.size()) {
    throw DelegateError(Error::InvalidProgram,
                        "method " + info.method + " is given " + std::to_string(arguments.size()) +
                            " tensors, expected " + std::to_string(inputs.size()) + " inputs and " +
                            std::to_string(outputs.size()) + " outputs");
  }
  HostTensors tensors;
  bool varies = false;
  for (size_t i = 0; i < inputs.size(); ++i) {
    const auto& tensor = tensor_of(info, *arguments[i], "input", inputs[i]);
    if (const auto free = free_dimension(inputs[i])) {
      const int64_t length = tensor.sizes()[*free];
      if (varies && length != tensors.length) {
        throw DelegateError(Error::InvalidArgument,
                            "method " + info.method + ": the input " + inputs[i].name +
                                " has another length, " + std::to_string(length) +
                                ", than an input before it, " + std::to_string(tensors.length));
      }
      tensors.length = length;
      varies = true;
    }
    tensors.inputs.push_back(tensor.const_data_ptr());
  }
  for (const OutputSpec& output : outputs) {
    const EValue& argument = *arguments[inputs.size() + output.index];
    const auto& tensor = tensor_of(info, argument, "output", output);
    if (free_dimension(output)) resize(tensor, with_length(output, tensors.length));
    tensors.outputs.push_back(tensor.mutable_data_ptr());
  }
  return tensors;
}

class EtMoeCudaBackend final : public executorch::runtime::BackendInterface {
 public:
  // A missing driver is reported by `init`, with a message.
  bool is_available() const override { return true; }

  Result<DelegateHandle*> init(BackendInitContext& context, FreeableBuffer* processed,
                               ArrayRef<CompileSpec>) const override {
    CompiledMethod* method = nullptr;
    const Error error = guarded([&] {
      const auto* data = context.get_named_data_map();
      if (!data) {
        throw DelegateError(Error::InvalidProgram, "the program is loaded without its data");
      }
      const auto* text = static_cast<const char*>(processed->data());
      method = new CompiledMethod(MethodInfo::parse({text, processed->size()}), *data);
    });
    processed->Free();
    if (error != Error::Ok) return error;
    return method;
  }

  Error execute(BackendExecutionContext&, DelegateHandle* handle,
                Span<EValue*> arguments) const override {
    return guarded([&] {
      auto* method = static_cast<CompiledMethod*>(handle);
      method->run(bind(method->info(), arguments));
    });
  }

  void destroy(DelegateHandle* handle) const override {
    delete static_cast<CompiledMethod*>(handle);
  }
};

EtMoeCudaBackend backend;
[[maybe_unused]] const auto registered =
    executorch::runtime::register_backend({"EtMoeCudaBackend", &backend});

}  // namespace
}  // namespace et_moe::cuda

// The delegate: registers the backend `EtMoeCudaBackend` with ExecuTorch's runtime. Its id is its
// own, so that it can live in one process with the delegate of ExecuTorch's CUDA wheels.

#include <executorch/runtime/backend/interface.h>
#include <executorch/runtime/core/error.h>
#include <executorch/runtime/core/evalue.h>
#include <executorch/runtime/platform/log.h>

#include <new>

#include "backends/cuda/runtime/compiled_method.h"

namespace et_moe::cuda {
namespace {

using executorch::runtime::ArrayRef;
using executorch::runtime::BackendExecutionContext;
using executorch::runtime::BackendInitContext;
using executorch::runtime::CompileSpec;
using executorch::runtime::DelegateHandle;
using executorch::runtime::Error;
using executorch::runtime::EValue;
using executorch::runtime::FreeableBuffer;
using executorch::runtime::Result;
using executorch::runtime::Span;

/// Runs `body`; an exception is logged and becomes an error.
template <typename Body>
Error guarded(const Body& body) {
  try {
    body();
    return Error::Ok;
  } catch (const std::exception& e) {
    ET_LOG(Error, "%s", e.what());
    return Error::DelegateInvalidCompatibility;
  }
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
      if (!data) throw std::runtime_error("the program is loaded without its data");
      method = new CompiledMethod(Context::current(),
                                  {static_cast<const char*>(processed->data()), processed->size()},
                                  *data);
    });
    processed->Free();
    if (error != Error::Ok) return error;
    return method;
  }

  Error execute(BackendExecutionContext&, DelegateHandle* handle,
                Span<EValue*> args) const override {
    return guarded([&] {
      auto* method = static_cast<CompiledMethod*>(handle);
      const MethodInfo& info = method->info();
      const size_t count = info.inputs.size();
      if (args.size() < count + 2) throw std::runtime_error("too few arguments");
      std::vector<const void*> inputs;
      for (size_t i = 0; i < count; ++i) {
        const auto& tensor = args[i]->toTensor();
        if (tensor.nbytes() > info.inputs[i].nbytes() ||
            static_cast<int32_t>(tensor.scalar_type()) != info.inputs[i].dtype) {
          throw std::runtime_error("the input " + info.inputs[i].name + " does not fit");
        }
        inputs.push_back(tensor.const_data_ptr());
      }
      method->run(Context::current(), inputs, args[0]->toTensor().size(1),
                  args[args.size() - 2]->toTensor().mutable_data_ptr<int64_t>(),
                  args[args.size() - 1]->toTensor().mutable_data_ptr<float>());
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

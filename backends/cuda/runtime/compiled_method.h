// A method's compiled code: loaded, given its tensors, and run, eagerly or as a CUDA graph.
#pragma once

#include <executorch/runtime/core/named_data_map.h>

#include <memory>
#include <string_view>

#include "backends/cuda/runtime/context.h"
#include "backends/cuda/runtime/metadata.h"
#include "backends/cuda/runtime/tensor.h"

namespace et_moe::cuda {

/// A shared object in memory, loaded by way of an anonymous file.
class SharedObject {
 public:
  /// Throws std::runtime_error that names `name`, for messages, and what the loader says.
  SharedObject(const void* data, size_t size, const std::string& name);
  ~SharedObject();
  SharedObject(const SharedObject&) = delete;
  SharedObject& operator=(const SharedObject&) = delete;

  /// A function of C linkage; throws std::runtime_error if there is none of this name.
  template <typename Function>
  Function* function(const char* name) const {
    return reinterpret_cast<Function*>(symbol(name));
  }

 private:
  void* symbol(const char* name) const;
  // Open as long as the code is loaded: the loader takes a path it knows for the code it knows, and
  // the number of a closed file is given out again.
  int file_ = -1;
  void* handle_ = nullptr;
  std::string name_;
};

class CompiledMethod {
 public:
  /// Loads the code for this GPU, after checking its digest, and the weights if the context has
  /// none yet. `description` is JSON, see MethodInfo. Throws std::runtime_error.
  CompiledMethod(Context& context, std::string_view description,
                 const executorch::runtime::NamedDataMap& data);
  ~CompiledMethod();

  const MethodInfo& info() const { return info_; }

  /// One call. `inputs` are host addresses of the method's runtime inputs in order, `tokens` the
  /// length of the first, which is padded to a bucket where the method takes several lengths.
  /// `token` receives the next token's id, `logits` the logits if the context copies them.
  /// Throws std::runtime_error if the session runs ahead with another call.
  void run(Context& context, const std::vector<const void*>& inputs, int64_t tokens, int64_t* token,
           float* logits);

 private:
  struct Container;
  /// Runs the code on the inputs that are on the GPU; returns where its logits are.
  const std::byte* enqueue(Context& context, Session& session, Calls& calls, int64_t tokens);
  /// Starts the call at calls.position, as a graph if it may be one.
  void launch(Context& context, Session& session, Calls& calls, int64_t tokens);
  /// Brings inputs to the GPU and starts the call.
  void start(Context& context, Session& session, Calls& calls,
             const std::vector<const void*>& inputs, int64_t tokens);
  /// Whether these inputs are those of the last call that was started, one that runs ahead.
  bool is_last(const Calls& calls, const std::vector<const void*>& inputs) const;
  int64_t bucket(int64_t tokens) const;

  MethodInfo info_;
  std::unique_ptr<Container> container_;
  std::vector<size_t> offsets_;  // of the runtime inputs in their memory; the end of the last
  size_t position_;              // which input it is
  bool capture_failed_ = false;
};

}  // namespace et_moe::cuda

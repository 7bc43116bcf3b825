#include "backends/cuda/runtime/compiled_method.h"

#include <dlfcn.h>
#include <sodium/crypto_hash_sha256.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>

namespace et_moe::cuda {
namespace {

using executorch::runtime::NamedDataMap;

constexpr size_t kToken = sizeof(int64_t);

std::string sha256(const void* data, size_t size) {
  unsigned char digest[crypto_hash_sha256_BYTES];
  crypto_hash_sha256(digest, static_cast<const unsigned char*>(data), size);
  std::string text;
  for (unsigned char byte : digest) {
    char digits[3];
    std::snprintf(digits, sizeof digits, "%02x", byte);
    text += digits;
  }
  return text;
}

size_t find_position(const MethodInfo& info) {
  for (size_t i = 1; i < info.inputs.size(); ++i) {
    if (info.inputs[i].name == "position" && info.inputs[i].nbytes() == kToken) return i;
  }
  throw std::runtime_error("the method " + info.method + " has no input position");
}

}  // namespace

SharedObject::SharedObject(const void* data, size_t size, const std::string& name)
    : file_(memfd_create("et_moe", MFD_CLOEXEC)), name_(name) {
  const auto* bytes = static_cast<const char*>(data);
  size_t written = 0;
  while (file_ >= 0 && written < size) {
    const ssize_t count = write(file_, bytes + written, size - written);
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) break;
    written += static_cast<size_t>(count);
  }
  std::string error;
  if (file_ < 0 || written < size) {
    error = std::strerror(errno);
  } else {
    const std::string path = "/proc/self/fd/" + std::to_string(file_);
    handle_ = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (!handle_) error = dlerror();
  }
  if (!handle_) {
    if (file_ >= 0) close(file_);
    throw std::runtime_error("the code " + name + " cannot be loaded: " + error);
  }
}

SharedObject::~SharedObject() {
  dlclose(handle_);
  close(file_);
}

void* SharedObject::symbol(const char* name) const {
  void* address = dlsym(handle_, name);
  if (!address) throw std::runtime_error("the code " + name_ + " has no function " + name);
  return address;
}

/// AOTInductor's C interface of one shared object (torch/csrc/inductor/aoti_runtime/interface.h).
struct CompiledMethod::Container {
  using Create = int32_t(void**, size_t, const char*, const char*);
  using Delete = int32_t(void*);
  using Run = int32_t(void*, Tensor**, size_t, Tensor**, size_t, void*, void*);
  using LastError = int32_t(const char**);

  Container(const void* data, size_t size, const std::string& name)
      : code(data, size, name),
        run(code.function<Run>("AOTInductorModelContainerRunSingleThreaded")),
        remove(code.function<Delete>("AOTInductorModelContainerDelete")),
        last_error(code.function<LastError>("AOTInductorGetLastError")) {
    auto* create = code.function<Create>("AOTInductorModelContainerCreateWithDevice");
    if (create(&handle, 1, "cuda", nullptr) != 0) fail(name + " cannot be set up");
  }
  ~Container() { remove(handle); }
  [[noreturn]] void fail(const std::string& what) const {
    if (const std::string cause = take_error(); !cause.empty()) {
      throw std::runtime_error(what + ": " + cause);
    }
    const char* text = nullptr;
    std::string message = what;
    if (last_error(&text) == 0 && text && *text) message += std::string(": ") + text;
    const cudaError_t error = cudaGetLastError();
    if (message.find("CUDA error: ") != std::string::npos && error != cudaSuccess) {
      message += std::string(" (") + cudaGetErrorName(error) + ")";  // the text lacks the name
    }
    throw std::runtime_error(message);
  }

  SharedObject code;
  Run* run;
  Delete* remove;
  LastError* last_error;
  void* handle = nullptr;
};

CompiledMethod::CompiledMethod(Context& context, std::string_view description,
                               const NamedDataMap& data)
    : info_(MethodInfo::parse(description)),
      offsets_(aligned_offsets(info_.inputs)),
      position_(find_position(info_)) {
  const CodeInfo& code = info_.code_for(architecture());
  const auto blob = data.get_data(code.data);
  if (!blob.ok() || blob->size() != code.bytes) {
    throw std::runtime_error("the program lacks the code " + code.data);
  }
  if (sha256(blob->data(), blob->size()) != code.sha256) {
    throw std::runtime_error("the code " + code.data +
                             " is not what was exported: digest mismatch; it will not be run");
  }
  container_ = std::make_unique<Container>(blob->data(), blob->size(), code.data);
  context.adopt(data, info_);
}

CompiledMethod::~CompiledMethod() = default;

int64_t CompiledMethod::bucket(int64_t tokens) const {
  const int64_t most = info_.inputs[0].shape[1];
  if (most == 1) return 1;
  // An eighth of the power of two below, at least 16: padding stays under 1/8 of long prompts.
  int64_t step = 16;
  while (step * 16 <= tokens) step *= 2;
  return std::min(most, (tokens + step - 1) / step * step);
}

const std::byte* CompiledMethod::enqueue(Context& context, Session& session, Calls& calls,
                                         int64_t tokens) {
  std::vector<Tensor*> handles;
  for (size_t i = 0; i < info_.inputs.size(); ++i) {
    auto shape = info_.inputs[i].shape;
    if (i == 0) shape[1] = tokens;
    handles.push_back(
        view(calls.inputs.data() + offsets_[i], shape, info_.inputs[i].dtype).release());
  }
  for (const TensorInfo& t : info_.state) {
    handles.push_back(view(session.at(t.name), t.shape, t.dtype).release());
  }
  for (const TensorInfo& t : info_.weights) {
    handles.push_back(view(context.weights_->at(t.name), t.shape, t.dtype).release());
  }
  handles.push_back(view(calls.drawn.device_data(), {2}, info_.outputs[0].dtype).release());
  Tensor* outputs[2] = {};
  int32_t status;
  {
    const ArenaScope scope(context.arena_);
    status = container_->run(container_->handle, handles.data(), handles.size(), outputs, 2,
                             context.stream_.get(), nullptr);
  }
  for (Tensor* handle : handles) delete handle;  // the code made null those that it took over
  if (status != 0) container_->fail("the code of " + info_.method + " failed");
  const std::unique_ptr<Tensor> token(outputs[0]), logits(outputs[1]);
  // The scratch memory goes back here but keeps its content until the next call.
  return logits->data + logits->offset * logits->itemsize();
}

void CompiledMethod::launch(Context& context, Session& session, Calls& calls, int64_t tokens) {
  const Event& done = calls.done(calls.position);
  if (!context.use_graphs || capture_failed_ || calls.warm.insert(tokens).second) {
    calls.logits = enqueue(context, session, calls, tokens);
    return done.record(context.stream_);
  }
  auto found = calls.graphs.find(tokens);
  if (found == calls.graphs.end()) {
    try {
      context.arena_.set_frozen(true);
      const std::byte* logits = nullptr;
      Graph graph = Graph::capture(context.stream_,
                                   [&] { logits = enqueue(context, session, calls, tokens); });
      context.arena_.set_frozen(false);
      found = calls.graphs.emplace(tokens, Calls::Captured{std::move(graph), logits}).first;
    } catch (const std::exception& e) {
      context.arena_.set_frozen(false);
      capture_failed_ = true;
      std::fprintf(stderr, "no CUDA graph for %s, running without: %s\n", info_.method.c_str(),
                   e.what());
      return launch(context, session, calls, tokens);
    }
  }
  found->second.graph.launch(context.stream_);
  calls.logits = found->second.logits;
  done.record(context.stream_);
}

void CompiledMethod::start(Context& context, Session& session, Calls& calls,
                           const std::vector<const void*>& inputs, int64_t tokens) {
  const int64_t padded = bucket(tokens);
  std::byte* memory = calls.staging.data();
  for (size_t i = 0; i < inputs.size(); ++i) {
    const size_t size = i == 0 ? static_cast<size_t>(tokens) * kToken : info_.inputs[i].nbytes();
    std::memcpy(memory + offsets_[i], inputs[i], size);
  }
  std::memset(memory + static_cast<size_t>(tokens) * kToken, 0,
              static_cast<size_t>(padded - tokens) * kToken);
  std::memcpy(&calls.position, inputs[position_], kToken);
  // Not in the graph, see backends/cuda/triton/hand_over/op.py.
  ET_MOE_CUDA(cudaMemcpyAsync(calls.inputs.data(), memory, offsets_.back(), cudaMemcpyHostToDevice,
                              context.stream_.get()));
  launch(context, session, calls, padded);
}

bool CompiledMethod::is_last(const Calls& calls, const std::vector<const void*>& inputs) const {
  for (size_t i = 1; i < inputs.size(); ++i) {
    const void* expected = i == position_ ? static_cast<const void*>(&calls.position)
                                          : calls.staging.data() + offsets_[i];
    if (std::memcmp(expected, inputs[i], info_.inputs[i].nbytes()) != 0) return false;
  }
  const int64_t token = calls.token(calls.position - 1);
  return std::memcmp(&token, inputs[0], kToken) == 0;
}

void CompiledMethod::run(Context& context, const std::vector<const void*>& inputs, int64_t tokens,
                         int64_t* token, float* logits) {
  Session& session = context.session();
  Calls& calls = session.calls_.try_emplace(this, offsets_.back()).first->second;
  if (!session.ahead_) {
    start(context, session, calls, inputs, tokens);
  } else if (session.ahead_ != &calls || !is_last(calls, inputs)) {
    throw std::runtime_error(
        "the session has gone on from the token it drew, as it was asked to: "
        "reset it before another call of " +
        info_.method);
  }
  session.ahead_ = nullptr;
  const int64_t position = calls.position;
  if (context.copy_logits) {
    ET_MOE_CUDA(cudaMemcpyAsync(logits, calls.logits, info_.outputs[1].nbytes(),
                                cudaMemcpyDeviceToHost, context.stream_.get()));
    context.stream_.synchronize();
  } else if (context.run_ahead && info_.inputs[0].shape[1] == 1) {
    ++calls.position;
    launch(context, session, calls, 1);
    session.ahead_ = &calls;
  }
  calls.done(position).synchronize();
  *token = calls.token(position);
}

}  // namespace et_moe::cuda

#include "runner/model.h"

#include <executorch/extension/memory_allocator/malloc_memory_allocator.h>
#include <executorch/extension/tensor/tensor.h>
#include <executorch/runtime/platform/runtime.h>

#include <atomic>
#include <cstring>
#include <nlohmann/json.hpp>
#include <stdexcept>

#include "runner/log.h"
#include "runner/sealed_file.h"

namespace et_moe {
namespace {

using executorch::aten::ScalarType;
using executorch::extension::from_blob;
using executorch::extension::MallocMemoryAllocator;
using executorch::extension::MmapDataLoader;
using executorch::extension::TensorPtr;
using executorch::runtime::Error;
using executorch::runtime::EValue;
using executorch::runtime::HierarchicalAllocator;
using executorch::runtime::MemoryManager;
using executorch::runtime::Method;
using executorch::runtime::Program;
using executorch::runtime::Span;

constexpr int64_t kFormatVersion = 1;
constexpr size_t kAlignment = 64;

ScalarType parse_dtype(const std::string& name) {
  static const std::map<std::string, ScalarType> types = {
      {"uint8", ScalarType::Byte},    {"int8", ScalarType::Char},
      {"int32", ScalarType::Int},     {"int64", ScalarType::Long},
      {"float32", ScalarType::Float}, {"bfloat16", ScalarType::BFloat16}};
  const auto found = types.find(name);
  if (found == types.end()) throw std::runtime_error("unknown dtype " + name);
  return found->second;
}

std::vector<TensorSpec> parse_specs(const nlohmann::json& list) {
  std::vector<TensorSpec> specs;
  for (const auto& entry : list) {
    specs.push_back({entry.at(0).get<std::string>(), parse_dtype(entry.at(1).get<std::string>()),
                     entry.at(2).get<std::vector<int32_t>>()});
  }
  return specs;
}

TensorPtr view(const TensorSpec& spec, const void* data) {
  return from_blob(const_cast<void*>(data), {spec.sizes.begin(), spec.sizes.end()}, spec.dtype);
}

}  // namespace

/// A method with the memory it runs in and the tensors that its inputs view.
struct Model::LoadedMethod {
  MallocMemoryAllocator allocator, temporary;
  std::vector<std::vector<uint8_t>> planned;
  std::vector<Span<uint8_t>> spans;
  std::unique_ptr<HierarchicalAllocator> hierarchical;
  std::unique_ptr<MemoryManager> memory;
  std::optional<Method> method;

  // Runtime inputs; the method reads them where they stand.
  int64_t position = 0, num_tokens = 0, top_k = 0, seed = 0;
  float temperature = 0, top_p = 1;
  bool bound = false;
  uint64_t bound_session = 0;
};

Session::Session(const std::vector<TensorSpec>& state) {
  static std::atomic<uint64_t> sessions{0};
  id_ = ++sessions;
  for (const TensorSpec& spec : state) {
    const size_t size = (spec.nbytes() + kAlignment - 1) / kAlignment * kAlignment;
    buffers_.emplace_back(std::aligned_alloc(kAlignment, size));
    if (!buffers_.back()) throw std::runtime_error("out of memory for the state " + spec.name);
    sizes_.push_back(size);
  }
}

Session::Session(std::unique_ptr<cuda::Session> gpu) : id_(0), gpu_(std::move(gpu)) {}

Model::Model(const std::string& pte_path, const std::string& ptd_path, const ModelOptions& options)
    : pte_path_(pte_path) {
  executorch::runtime::runtime_init();
  capture_log();
  MappedFile file(pte_path);
  if (check_seal(file, pte_path) != file.size() - kTrailerSize) {
    throw std::runtime_error(pte_path + ": damaged: its checksum does not cover all of it");
  }
  auto loader = MmapDataLoader::from(pte_path.c_str(), MmapDataLoader::MlockConfig::NoMlock);
  if (!loader.ok()) throw std::runtime_error(pte_path + ": cannot be mapped");
  loader_.emplace(std::move(*loader));
  auto program = Program::load(&*loader_, Program::Verification::InternalConsistency);
  if (!program.ok()) {
    throw std::runtime_error(pte_path + ": not an ExecuTorch program" + take_log());
  }
  program_.emplace(std::move(*program));
  read_info();
  weights_ = std::make_unique<Weights>(ptd_path, weight_specs_);
  if (cuda_) {
    cuda_->use_graphs = options.cuda_graph;
    const cuda::Context::Scope scope(*cuda_);
    load_methods();
    gpu_memory_.free_after_load = static_cast<int64_t>(cuda::memory_info().free);
  } else {
    load_methods();
  }
}

Model::~Model() = default;

void Model::load_methods() {
  for (const char* name : {"prefill", "decode"}) {
    const size_t inputs = load_method(name).method->inputs_size();
    const size_t runtime_inputs = std::strcmp(name, "decode") == 0 ? 6 : 7;
    // A CUDA program's delegate binds state and weights itself.
    const size_t bound = cuda_ ? 0 : state_.size() + weight_specs_.size();
    if (inputs != runtime_inputs + bound) {
      throw std::runtime_error(pte_path_ + ": method " + name + " has unexpected inputs");
    }
  }
}

std::unique_ptr<Session> Model::new_session() const {
  std::unique_ptr<Session> session(cuda_ ? new Session(cuda_->new_session()) : new Session(state_));
  reset(*session);
  return session;
}

void Model::reset(Session& session) const {
  if (session.gpu_) return cuda_->reset(*session.gpu_);
  for (size_t i = 0; i < session.buffers_.size(); ++i) {
    std::memset(session.buffers_[i].get(), 0, session.sizes_[i]);
  }
}

void Model::want_logits() {
  if (cuda_) cuda_->copy_logits = true;
}

std::optional<llm::GpuMemory> Model::gpu_memory() const {
  if (!cuda_) return std::nullopt;
  llm::GpuMemory memory = gpu_memory_;
  memory.free_after_generate = static_cast<int64_t>(cuda::memory_info().free);
  return memory;
}

Model::LoadedMethod& Model::load_method(const std::string& name) {
  auto& slot = methods_[name];
  if (slot) return *slot;
  slot = std::make_unique<LoadedMethod>();
  const auto meta = program_->method_meta(name.c_str());
  if (!meta.ok()) throw std::runtime_error(pte_path_ + ": has no method " + name);
  for (size_t i = 0; i < meta->num_memory_planned_buffers(); ++i) {
    slot->planned.emplace_back(static_cast<size_t>(*meta->memory_planned_buffer_size(i)));
    slot->spans.emplace_back(slot->planned.back().data(), slot->planned.back().size());
  }
  slot->hierarchical = std::make_unique<HierarchicalAllocator>(
      Span<Span<uint8_t>>(slot->spans.data(), slot->spans.size()));
  slot->memory =
      std::make_unique<MemoryManager>(&slot->allocator, slot->hierarchical.get(), &slot->temporary);
  auto method = program_->load_method(name.c_str(), slot->memory.get(), nullptr,
                                      cuda_ && weights_ ? &weights_->map() : nullptr);
  if (!method.ok()) {
    throw std::runtime_error(pte_path_ + ": method " + name + " cannot be loaded: " +
                             executorch::runtime::to_string(method.error()) + take_log());
  }
  slot->method.emplace(std::move(*method));
  return *slot;
}

EValue Model::constant(const std::string& name) {
  Method& method = *load_method(name).method;
  if (method.outputs_size() != 1 || method.execute() != Error::Ok) {
    throw std::runtime_error(pte_path_ + ": " + name + " is not a constant method");
  }
  return method.get_output(0);
}

void Model::read_info() {
  const auto number = [this](const char* name) {
    const EValue value = constant(name);
    if (!value.isInt() || value.toInt() < 0 || value.toInt() > INT32_MAX) {
      throw std::runtime_error(pte_path_ + ": " + name + " is not a count");
    }
    return value.toInt();
  };
  const auto json = [this](const char* name) {
    const EValue value = constant(name);
    if (!value.isString()) throw std::runtime_error(pte_path_ + ": " + name + " is not a text");
    return nlohmann::json::parse(value.toString());
  };
  const int64_t version = number("get_format_version");
  if (version != kFormatVersion) {
    throw std::runtime_error(pte_path_ + ": format version " + std::to_string(version) +
                             ", this runner reads version " + std::to_string(kFormatVersion));
  }
  info_ = {number("get_max_seq_len"),
           number("get_max_prefill_tokens"),
           number("get_vocab_size"),
           number("get_n_layers"),
           {}};
  try {
    info_.eos_ids = json("get_eos_ids").get<std::vector<int64_t>>();
    if (json("get_backend") == "cuda") {
      cuda_ = std::make_unique<cuda::Context>();
      const cuda::MemoryInfo memory = cuda::memory_info();
      gpu_memory_.total = static_cast<int64_t>(memory.total);
      gpu_memory_.free_before_load = static_cast<int64_t>(memory.free);
    }
    const auto bindings = json("get_bindings");
    state_ = parse_specs(bindings.at("state"));
    weight_specs_ = parse_specs(bindings.at("weights"));
  } catch (const std::exception& e) {
    throw std::runtime_error(pte_path_ + ": " + e.what());
  }
}

void Model::bind(LoadedMethod& loaded, Session& session) {
  // A GPU session has no tensors to bind, and all of them the id 0.
  const bool first = !loaded.bound;
  if (!first && loaded.bound_session == session.id_) return;
  const bool prefill = &loaded == methods_["prefill"].get();
  std::vector<TensorPtr> tensors;
  const auto scalar = [&tensors](void* data, ScalarType type) {
    tensors.push_back(from_blob(data, {1}, type));
  };
  // After the tokens, which change with every call, in the order of the exporter's INPUTS.
  scalar(&loaded.position, ScalarType::Long);
  if (prefill) scalar(&loaded.num_tokens, ScalarType::Long);
  scalar(&loaded.temperature, ScalarType::Float);
  scalar(&loaded.top_k, ScalarType::Long);
  scalar(&loaded.top_p, ScalarType::Float);
  scalar(&loaded.seed, ScalarType::Long);
  const size_t state_begin = tensors.size(), state_end = state_begin + session.buffers_.size();
  for (size_t i = 0; i < session.buffers_.size(); ++i) {
    tensors.push_back(view(state_[i], session.buffers_[i].get()));
  }
  if (first && !cuda_) {
    for (size_t i = 0; i < weight_specs_.size(); ++i) {
      tensors.push_back(view(weight_specs_[i], weights_->data(i)));
    }
  }
  for (size_t i = first ? 0 : state_begin; i < (first ? tensors.size() : state_end); ++i) {
    if (loaded.method->set_input(EValue(*tensors[i]), i + 1) != Error::Ok) {
      throw std::runtime_error(pte_path_ + ": input " + std::to_string(i + 1) +
                               " does not take the tensor its bindings name" + take_log());
    }
  }
  loaded.bound = true;
  loaded.bound_session = session.id_;
}

Step Model::run(Session& session, const int64_t* tokens, size_t count, int64_t position,
                const Sampling& sampling, bool more) {
  if (count == 0 || count > static_cast<size_t>(info_.max_prefill_tokens)) {
    throw std::runtime_error("a call takes 1 to " + std::to_string(info_.max_prefill_tokens) +
                             " tokens, got " + std::to_string(count));
  }
  for (size_t i = 0; i < count; ++i) {
    if (tokens[i] < 0 || tokens[i] >= info_.vocab_size) {
      throw std::runtime_error("token id " + std::to_string(tokens[i]) +
                               " is outside the vocabulary of " + std::to_string(info_.vocab_size));
    }
  }
  if (position < 0 || position + static_cast<int64_t>(count) > info_.max_seq_len) {
    throw std::runtime_error(std::to_string(position + static_cast<int64_t>(count)) +
                             " tokens do not fit the context of " +
                             std::to_string(info_.max_seq_len));
  }
  const char* name = count == 1 ? "decode" : "prefill";
  LoadedMethod& loaded = *methods_.at(name);
  bind(loaded, session);
  loaded.position = position;
  loaded.num_tokens = static_cast<int64_t>(count);
  loaded.temperature = sampling.temperature;
  loaded.top_k = sampling.top_k;
  loaded.top_p = sampling.top_p;
  loaded.seed = sampling.seed;
  const TensorPtr input =
      from_blob(const_cast<int64_t*>(tokens), {1, static_cast<int32_t>(count)}, ScalarType::Long);
  Error error = loaded.method->set_input(EValue(*input), 0);
  if (error == Error::Ok) {
    std::optional<cuda::Context::Scope> scope;
    if (cuda_) {
      scope.emplace(*cuda_, session.gpu_.get());
      cuda_->run_ahead = more && position + 1 < info_.max_seq_len;
    }
    error = loaded.method->execute();
  }
  if (error != Error::Ok) {
    throw std::runtime_error(pte_path_ + ": " + name +
                             " failed: " + executorch::runtime::to_string(error) + take_log());
  }
  // A CPU program returns the updated state first.
  const size_t outputs = loaded.method->outputs_size();
  const EValue& token = loaded.method->get_output(outputs - 2);
  const EValue& logits = loaded.method->get_output(outputs - 1);
  return {token.toTensor().const_data_ptr<int64_t>()[0], logits.toTensor().const_data_ptr<float>()};
}

}  // namespace et_moe

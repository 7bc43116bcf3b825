#include "runner/program.h"

#include <executorch/extension/memory_allocator/malloc_memory_allocator.h>
#include <executorch/extension/tensor/tensor.h>
#include <executorch/runtime/platform/runtime.h>

#include <stdexcept>
#include <utility>

#include "runner/errors.h"
#include "runner/log.h"
#include "runner/program_check.h"
#include "runner/sealed_file.h"

namespace et_moe {
namespace {

using executorch::aten::ScalarType;
using executorch::extension::BufferDataLoader;
using executorch::extension::from_blob;
using executorch::extension::MallocMemoryAllocator;
using executorch::runtime::Error;
using executorch::runtime::EValue;
using executorch::runtime::HierarchicalAllocator;
using executorch::runtime::MemoryManager;
using executorch::runtime::Method;
using executorch::runtime::MethodMeta;
using executorch::runtime::NamedDataMap;
using executorch::runtime::Program;
using executorch::runtime::Result;
using executorch::runtime::Span;
using executorch::runtime::TensorInfo;

/// Whether a program's tensor has the dtype and the largest shape of a description.
bool agrees(const Result<TensorInfo>& tensor, const TensorSpec& spec) {
  if (!tensor.ok() || tensor->scalar_type() != spec.dtype) return false;
  const auto sizes = tensor->sizes();
  return std::vector<int32_t>(sizes.begin(), sizes.end()) == spec.shape;
}

}  // namespace

struct LoadedMethod::Memory {
  /// What an argument was last set to.
  struct Argument {
    const void* data = nullptr;
    std::vector<int32_t> shape;
  };

  MallocMemoryAllocator allocator, temporary;
  std::vector<std::vector<uint8_t>> planned;
  std::vector<Span<uint8_t>> spans;
  std::unique_ptr<HierarchicalAllocator> hierarchical;
  std::unique_ptr<MemoryManager> manager;
  std::optional<Method> method;
  std::vector<Argument> arguments;
};

LoadedMethod::LoadedMethod() : memory_(std::make_unique<Memory>()) {}
LoadedMethod::~LoadedMethod() = default;

const MethodSpec& LoadedMethod::spec() const { return spec_; }

void LoadedMethod::fail(const std::string& what) const {
  throw std::runtime_error(path_ + ": method " + name_ + " " + what);
}

void LoadedMethod::fail_with_data(const std::string& what) const {
  const std::string files = data_path_.empty() ? path_ : both_files(path_, data_path_);
  throw std::runtime_error(files + ": method " + name_ + " " + what);
}

template <typename Body>
auto LoadedMethod::checked(const Body& body, const char* what) const {
  try {
    const AbortsThrow scope;
    return body();
  } catch (const std::runtime_error& e) {
    fail_with_data(what + std::string(e.what()));
  }
}

void LoadedMethod::check(const MethodMeta& meta, const std::vector<TensorSpec>& bound) const {
  const size_t given = spec_.inputs.size();
  if (meta.num_inputs() != given + bound.size()) {
    fail("takes " + std::to_string(meta.num_inputs()) + " tensors, its bindings name " +
         std::to_string(given + bound.size()));
  }
  for (size_t i = 0; i < meta.num_inputs(); ++i) {
    const TensorSpec& input = i < given ? spec_.inputs[i] : bound[i - given];
    if (!agrees(meta.input_tensor_meta(i), input)) {
      fail("does not take the input " + input.name + ", " + input.describe() +
           ", that its bindings name");
    }
  }
  for (const OutputSpec& output : spec_.outputs) {
    if (output.index >= meta.num_outputs() ||
        !agrees(meta.output_tensor_meta(output.index), output)) {
      fail("does not return the output " + output.name + ", " + output.describe() +
           ", that its bindings name");
    }
  }
}

void LoadedMethod::set_argument(size_t index, const std::string& name, ScalarType dtype,
                                const std::vector<int32_t>& shape, const void* data) {
  auto& arguments = memory_->arguments;
  if (index >= arguments.size()) fail("does not take the tensor " + name);
  auto& known = arguments[index];
  if (known.data == data && known.shape == shape) return;
  // ExecuTorch keeps the address, not the tensor.
  const auto tensor = from_blob(const_cast<void*>(data), {shape.begin(), shape.end()}, dtype);
  if (memory_->method->set_input(EValue(*tensor), index) != Error::Ok) {
    fail("does not take the tensor " + name + take_log());
  }
  known = {data, shape};
}

std::vector<const void*> LoadedMethod::run(const Call& call) {
  for (size_t i = 0; i < spec_.inputs.size(); ++i) {
    const TensorSpec& spec = spec_.inputs[i];
    const Input* given = nullptr;
    for (const Input& input : call.inputs) {
      if (input.name == spec.name) given = &input;
    }
    if (!given || !spec.accepts(given->dtype, given->shape.data(), given->shape.size())) {
      fail("is called without the input " + spec.name + ", " + spec.describe());
    }
    set_argument(i, spec.name, given->dtype, given->shape, given->data);
  }
  Method& method = *memory_->method;
  const Error error = checked([&] { return method.execute(); }, "failed: ");
  if (error != Error::Ok) {
    fail_with_data(std::string("failed: ") + executorch::runtime::to_string(error) + take_log());
  }
  std::vector<const void*> outputs;
  for (const std::string& name : call.outputs) {
    const size_t i = find_tensor(spec_.outputs, name);
    if (i == spec_.outputs.size()) fail("has no output " + name);
    outputs.push_back(method.get_output(spec_.outputs[i].index).toTensor().const_data_ptr());
  }
  return outputs;
}

ProgramFile::ProgramFile(const std::string& path) : path_(path), file_(path) {
  executorch::runtime::runtime_init();
  capture_log();
  check_kind(file_, path, "ET12", "an ExecuTorch program (.pte)");
  const size_t size = file_.size() - kTrailerSize;
  if (check_seal(file_, path) != size) {
    throw std::runtime_error(path + ": damaged: its checksum does not cover all of it");
  }
  try {
    check_program(file_.data(), size);
  } catch (const std::exception& e) {
    throw std::runtime_error(path + ": not an ExecuTorch program of `et-moe export`: " + e.what());
  }
  loader_.emplace(file_.data(), size);
  auto program = Program::load(&*loader_, Program::Verification::InternalConsistency);
  if (!program.ok()) throw std::runtime_error(path + ": not an ExecuTorch program" + take_log());
  program_.emplace(std::move(*program));
}

ProgramFile::~ProgramFile() = default;

std::unique_ptr<LoadedMethod> ProgramFile::load(const std::string& name, const NamedDataMap* data,
                                                const std::string& data_path) const {
  const auto meta = program_->method_meta(name.c_str());
  if (!meta.ok()) throw std::runtime_error(path_ + ": has no method " + name);
  std::unique_ptr<LoadedMethod> loaded(new LoadedMethod());
  loaded->path_ = path_;
  loaded->data_path_ = data_path;
  loaded->name_ = name;
  auto& memory = *loaded->memory_;
  for (size_t i = 0; i < meta->num_memory_planned_buffers(); ++i) {
    memory.planned.emplace_back(static_cast<size_t>(*meta->memory_planned_buffer_size(i)));
    memory.spans.emplace_back(memory.planned.back().data(), memory.planned.back().size());
  }
  memory.hierarchical = std::make_unique<HierarchicalAllocator>(
      Span<Span<uint8_t>>(memory.spans.data(), memory.spans.size()));
  memory.manager = std::make_unique<MemoryManager>(&memory.allocator, memory.hierarchical.get(),
                                                   &memory.temporary);
  auto method = loaded->checked(
      [&] { return program_->load_method(name.c_str(), memory.manager.get(), nullptr, data); },
      "cannot be loaded: ");
  if (!method.ok()) {
    loaded->fail_with_data(std::string("cannot be loaded: ") +
                           executorch::runtime::to_string(method.error()) + take_log());
  }
  memory.method.emplace(std::move(*method));
  memory.arguments.resize(memory.method->inputs_size());
  return loaded;
}

std::unique_ptr<LoadedMethod> ProgramFile::load_method(const std::string& name,
                                                       const MethodSpec& spec,
                                                       const std::vector<TensorSpec>& bound,
                                                       const std::string& data_path,
                                                       const NamedDataMap* data) const {
  auto loaded = load(name, data, data_path);
  loaded->spec_ = spec;
  loaded->check(*program_->method_meta(name.c_str()), bound);
  return loaded;
}

std::pair<std::unique_ptr<LoadedMethod>, EValue> ProgramFile::constant(
    const std::string& name) const {
  auto loaded = load(name);
  Method& method = *loaded->memory_->method;
  const auto execute = [&method] { return method.execute(); };
  if (method.outputs_size() != 1 || loaded->checked(execute, "failed: ") != Error::Ok) {
    throw std::runtime_error(path_ + ": " + name + " is not a constant method");
  }
  EValue value = method.get_output(0);
  return {std::move(loaded), value};
}

bool ProgramFile::has(const std::string& name) const {
  // To ask for a method that is not there would be noted as an error.
  for (size_t i = 0; i < program_->num_methods(); ++i) {
    const auto method = program_->get_method_name(i);
    if (method.ok() && name == *method) return true;
  }
  return false;
}

int64_t ProgramFile::count(const std::string& name) const {
  const auto [method, value] = constant(name);
  if (!value.isInt() || value.toInt() < 0 || value.toInt() > INT32_MAX) {
    throw std::runtime_error(path_ + ": " + name + " is not a count");
  }
  return value.toInt();
}

std::string ProgramFile::text(const std::string& name) const {
  const auto [method, value] = constant(name);
  if (!value.isString()) throw std::runtime_error(path_ + ": " + name + " is not a text");
  return std::string(value.toString());
}

}  // namespace et_moe

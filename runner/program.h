// A program file: its constants and its methods, by ExecuTorch's runtime.
#pragma once

#include <executorch/extension/data_loader/buffer_data_loader.h>
#include <executorch/runtime/executor/program.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "backends/bindings.h"
#include "runner/call.h"
#include "runner/files.h"

namespace et_moe {

/// A method that is loaded, with the memory it runs in. Not thread-safe.
class LoadedMethod {
 public:
  ~LoadedMethod();

  const MethodSpec& spec() const;

  /// Makes the method read its `index`-th argument at `data`, which stays in place until the next
  /// time this is called for the argument. Throws std::runtime_error that names the tensor.
  void set_argument(size_t index, const std::string& name, executorch::aten::ScalarType dtype,
                    const std::vector<int32_t>& shape, const void* data);

  /// Runs the method on the inputs that it takes. Returns where the wanted outputs are, in the
  /// order of `call.outputs`; they are there until the next run.
  /// Throws std::runtime_error: an input or output that the call lacks or that does not fit, or
  /// what the program says of its failure, with both files: what it computes with comes from both.
  std::vector<const void*> run(const Call& call);

 private:
  friend class ProgramFile;
  struct Memory;
  LoadedMethod();
  /// Throws std::runtime_error unless what the program says of the method agrees with `spec`.
  void check(const executorch::runtime::MethodMeta& meta,
             const std::vector<TensorSpec>& bound) const;
  [[noreturn]] void fail(const std::string& what) const;
  [[noreturn]] void fail_with_data(const std::string& what) const;
  /// What `body` returns; a check of ExecuTorch that fails in it is an error that begins with
  /// `what`.
  template <typename Body>
  auto checked(const Body& body, const char* what) const;

  std::string path_, data_path_, name_;
  MethodSpec spec_;
  std::unique_ptr<Memory> memory_;
};

/// A `.pte`, mapped and checked. Not thread-safe.
class ProgramFile {
 public:
  /// Throws std::runtime_error that names the file and says what is wrong with it.
  explicit ProgramFile(const std::string& path);
  ~ProgramFile();

  const std::string& path() const { return path_; }

  /// Whether there is a method of this name.
  bool has(const std::string& name) const;
  /// What a constant method returns. Throws std::runtime_error if there is none of this name, or if
  /// it returns something else than an integer from 0 to INT32_MAX, or than a text.
  int64_t count(const std::string& name) const;
  std::string text(const std::string& name) const;

  /// Loads a method that takes the inputs of `spec` and, behind them, the tensors `bound`. It must
  /// go before the program and before `data`, the weights as a delegate takes them, if it does.
  /// `data_path` is where the weights come from, for messages.
  /// Throws std::runtime_error that names method and tensor.
  std::unique_ptr<LoadedMethod> load_method(
      const std::string& name, const MethodSpec& spec, const std::vector<TensorSpec>& bound,
      const std::string& data_path, const executorch::runtime::NamedDataMap* data = nullptr) const;

 private:
  /// The value that a constant method returns, and the method that owns it.
  std::pair<std::unique_ptr<LoadedMethod>, executorch::runtime::EValue> constant(
      const std::string& name) const;
  std::unique_ptr<LoadedMethod> load(const std::string& name,
                                     const executorch::runtime::NamedDataMap* data = nullptr,
                                     const std::string& data_path = "") const;

  std::string path_;
  MappedFile file_;  // what was checked is what is run, whatever becomes of the path
  std::optional<executorch::extension::BufferDataLoader> loader_;
  std::optional<executorch::runtime::Program> program_;
};

}  // namespace et_moe

// A loaded program: its methods, weights, and the sessions that run on it.
#pragma once

#include <executorch/runtime/executor/program.h>

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "backends/cuda/runtime/context.h"
#include "runner/stats.h"
#include "runner/weights.h"

namespace et_moe {

/// What the program's constant methods say.
struct ModelInfo {
  int64_t max_seq_len;         // capacity of the KV cache in tokens
  int64_t max_prefill_tokens;  // most tokens of one prefill call
  int64_t vocab_size;
  int64_t n_layers;
  std::vector<int64_t> eos_ids;
};

/// How the next token is drawn; the op `sample` (backends/ops/sampling.py) defines the meaning.
struct Sampling {
  float temperature = 0.0f;  // 0 is greedy
  int64_t top_k = 0;         // 0 keeps all
  float top_p = 1.0f;        // 1 keeps all
  int64_t seed = 0;
};

/// The state of one sequence: KV cache, convolution and recurrent state.
/// In host memory for a CPU program, on the GPU for a CUDA program.
class Session {
 private:
  friend class Model;
  explicit Session(const std::vector<TensorSpec>& state);
  explicit Session(std::unique_ptr<cuda::Session> gpu);
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::vector<std::unique_ptr<void, Free>> buffers_;
  std::vector<size_t> sizes_;
  uint64_t id_;  // never used twice, unlike an address
  std::unique_ptr<cuda::Session> gpu_;
};

/// The next token and the logits it was drawn from; `logits` holds vocab_size floats and is valid
/// until the model runs again. A CUDA program leaves them on the GPU unless they were asked for.
struct Step {
  int64_t token;
  const float* logits;
};

/// How a program is run.
struct ModelOptions {
  bool cuda_graph = false;  // capture and replay CUDA graphs; a CPU program ignores it
};

/// A `.pte` with its `.ptd`. Not thread-safe; any number of sessions may take turns.
class Model {
 public:
  /// Throws std::runtime_error that names the file and says what is wrong with it.
  Model(const std::string& pte_path, const std::string& ptd_path, const ModelOptions& options = {});
  ~Model();
  Model(const Model&) = delete;
  Model& operator=(const Model&) = delete;

  const ModelInfo& info() const { return info_; }
  std::unique_ptr<Session> new_session() const;
  /// Zeroes a session's state: its next token starts a new sequence.
  void reset(Session& session) const;
  /// From now on steps have logits, also those of a CUDA program.
  void want_logits();
  /// Of a CUDA program: memory before and after loading, and now. Nothing for a CPU program.
  std::optional<llm::GpuMemory> gpu_memory() const;

  /// Feeds `count` tokens that follow the first `position` of the session and draws the next one:
  /// one token through the method `decode`, more through `prefill`.
  /// `more`: the next call on the session feeds the token drawn by this one, with the same
  /// sampling, or resets it. Of a CUDA program that call may begin at once. Throws
  /// std::runtime_error: no tokens or more than max_prefill_tokens, an id outside the vocabulary,
  /// more tokens than max_seq_len, or a failure of the program.
  Step run(Session& session, const int64_t* tokens, size_t count, int64_t position,
           const Sampling& sampling, bool more = false);

 private:
  struct LoadedMethod;
  LoadedMethod& load_method(const std::string& name);
  executorch::runtime::EValue constant(const std::string& name);
  void read_info();
  void load_methods();
  void bind(LoadedMethod& method, Session& session);

  std::string pte_path_;
  std::optional<executorch::extension::MmapDataLoader> loader_;
  std::optional<executorch::runtime::Program> program_;
  std::vector<TensorSpec> state_, weight_specs_;  // what the runner binds
  std::unique_ptr<Weights> weights_;
  std::unique_ptr<cuda::Context> cuda_;  // null for a CPU program
  llm::GpuMemory gpu_memory_;
  std::map<std::string, std::unique_ptr<LoadedMethod>> methods_;
  ModelInfo info_{};
};

}  // namespace et_moe

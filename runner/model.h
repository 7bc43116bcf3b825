// A loaded text model: what its program says of it, and the sequences that run on it.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "runner/device.h"
#include "runner/program.h"
#include "runner/stats.h"
#include "runner/text_inputs.h"
#include "runner/weights.h"

namespace et_moe {

/// What the program's constant methods say.
struct ModelInfo {
  int64_t max_seq_len;         // capacity of the KV cache in tokens
  int64_t max_prefill_tokens;  // most tokens of one prefill call
  int64_t vocab_size;
  int64_t n_layers;
  std::vector<int64_t> eos_ids;
  std::string backend;  // "cpu" or "cuda"
};

/// One sequence on a model: its state, and how far it has come. It must go before the model does.
class Session {
 public:
  /// Number of tokens that were fed since it was made or reset.
  int64_t position() const { return position_; }

 private:
  friend class Model;
  explicit Session(std::unique_ptr<SequenceState> state) : state_(std::move(state)) {}

  std::unique_ptr<SequenceState> state_;
  int64_t position_ = 0;
  int64_t drawn_ = 0;  // the token that the last call drew, and how
  Sampling sampling_;
  bool failed_ = false;  // the last call did: who knows what it has done to the state
};

/// The next token, and the logits it was drawn from if they were asked for, else null: vocab_size
/// floats in host memory, valid until the model runs again.
struct Step {
  int64_t token;
  const float* logits;
};

/// How one call is made.
struct CallOptions {
  bool logits = false;     // whether the step has logits
  bool run_ahead = false;  // whether the next call on the session feeds the token that this one
                           // draws, with the same sampling: a GPU may begin it at once
};

/// A `.pte` with its `.ptd`. Not thread-safe; any number of sessions may take turns.
class Model {
 public:
  /// Throws std::runtime_error that names the file and says what is wrong with it.
  Model(const std::string& pte_path, const std::string& ptd_path,
        const DeviceOptions& options = {});
  ~Model();
  Model(const Model&) = delete;
  Model& operator=(const Model&) = delete;

  const ModelInfo& info() const { return info_; }
  /// A session that has been fed nothing. Throws std::runtime_error if there is no memory for it.
  std::unique_ptr<Session> new_session();
  /// Zeroes a session's state: its next token starts a new sequence.
  void reset(Session& session);
  /// Of a CUDA program: memory before and after loading, and now. Nothing for a CPU program.
  std::optional<llm::GpuMemory> gpu_memory() const { return device_->memory(); }

  /// Feeds `count` tokens that follow those of the session, and draws the next one: one token
  /// through the method `decode`, more through `prefill`.
  ///
  /// A session that was asked to run ahead may have been fed the token it drew already, so the next
  /// call must begin with that token. If it has no other token its sampling must be the same, too.
  ///
  /// Throws std::runtime_error: no tokens or more than max_prefill_tokens, an id outside the
  /// vocabulary, more tokens than max_seq_len, another token than the one that a session that runs
  /// ahead was fed, or a failure of the program. After a failure the session has to be reset.
  Step run(Session& session, const int64_t* tokens, size_t count, const Sampling& sampling,
           const CallOptions& options = {});

 private:
  void read_info();
  /// Throws std::runtime_error unless the methods have inputs and outputs of a text model.
  void check_methods(const Bindings& bindings) const;
  void check_call(const Session& session, const int64_t* tokens, size_t count) const;
  /// Settles a session that runs ahead, unless the call is the one that it runs. Returns how many
  /// of the tokens it has been fed.
  size_t settle(Session& session, const int64_t* tokens, size_t count, const Sampling& sampling);

  ProgramFile program_;
  std::optional<Weights> weights_;
  std::unique_ptr<Device> device_;
  std::optional<TextInputs> inputs_;
  ModelInfo info_{};
};

}  // namespace et_moe

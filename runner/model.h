// A loaded text model: what its program says of it, and the sequences that run on it.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "runner/device.h"
#include "runner/prefix_cache.h"
#include "runner/program.h"
#include "runner/state_pool.h"
#include "runner/stats.h"
#include "runner/text_inputs.h"
#include "runner/weights.h"

namespace et_moe {

/// What the program's constant methods say. Only programs with drafts have `get_draft_tokens` and
/// `get_draft_sequences`, and only those with the method `score` have `get_score_tokens`.
struct ModelInfo {
  int64_t max_seq_len;         // most tokens of a sequence
  int64_t max_prefill_tokens;  // most tokens of one prefill call
  int64_t max_sequences;       // most sequences of one decode call
  int64_t page_size;           // tokens of a page of the KV cache
  int64_t max_pages;           // of a sequence
  int64_t draft_tokens;        // of a decode call that is fed drafts; 0: there is none
  int64_t draft_sequences;     // most sequences of such a call; 0: there is none
  int64_t score_tokens;        // most tokens of one `score` call; 0: there is no such method
  int64_t vocab_size;
  int64_t n_layers;
  std::vector<int64_t> eos_ids;
  std::string backend;  // "cpu" or "cuda"
};

/// Without `backend`. Throws std::runtime_error that names the file and what is wrong with it.
ModelInfo read_info(const ProgramFile& program);

struct ModelOptions {
  DeviceOptions device;
  size_t max_sequences = 1;     // sessions there may be at once; the state of all is allocated
  size_t snapshots = 0;         // of recurrent state, for a prefix cache; 0: there is none
  std::optional<size_t> pages;  // of the KV cache; none: as many as the longest sequences take
  std::optional<double> memory_fraction;  // of a GPU's memory, for all that is there: weights,
                                          // state, and what calls take; bounds the number of pages
                                          // where `pages` does not say it
};

/// All pages of the KV cache are in use. Nothing was changed.
class OutOfPages : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

class Model;

using Tokens = std::vector<int64_t>;

/// What a decode call drew for one sequence.
struct Drawn {
  int64_t accepted = 0;         // of the drafts that it was fed
  int64_t token = 0;            // behind them
  std::vector<int64_t> drafts;  // of those behind this one; none of a method without drafts
};

/// One sequence on a model: where its state lies, and how far it has come. It must go before the
/// model does.
class Session {
 public:
  ~Session();
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;

  /// Number of tokens that were fed since it was made or reset.
  int64_t position() const { return position_; }
  /// Number of pages of the KV cache that it holds.
  size_t pages() const { return pages_.size(); }

 private:
  friend class Model;
  Session(Model& model, int32_t slot) : model_(model), slot_(slot) {}

  Model& model_;
  const int32_t slot_;
  std::vector<int32_t> pages_;
  int64_t position_ = 0;
  int64_t version_ = 0;          // of the state in the slot, that goes on from here
  int64_t drawn_ = 0;            // the token that the last call drew last, and how
  std::vector<int64_t> drafts_;  // of those behind it
  Sampling sampling_;
  std::vector<int64_t> tokens_;  // that were fed, where there is a prefix cache
  /// What a call drew that was fed `drawn_`, and perhaps `drafts_`, and ran ahead while other calls
  /// were asked for.
  std::optional<Drawn> overtaken_;
  bool failed_ = false;  // the last call did: who knows what it has done to the state
};

/// A sequence that takes part in a decode call, and its next token.
struct Feed {
  Session* session;
  int64_t token;
  Sampling sampling;
  int64_t most = INT64_MAX;  // tokens that may be drawn, in this call and those that follow
  bool remember = true;      // whether nothing that this call feeds will be taken back
};

/// What a call drew: the next token, and with drafts one more for each that was accepted. The
/// logits that the token was drawn from are there if they were asked for: vocab_size floats in host
/// memory, none of them NaN or +infinity, valid until the model runs again. Else null, as they are
/// for a token that was drawn ahead of a call that was not the one expected. If full logits were
/// asked for there are those behind each token that was fed, one row after the other.
struct Step {
  std::vector<int64_t> tokens;
  const float* logits;
  size_t drafts = 0;  // that were fed
};

/// How one call is made.
struct CallOptions {
  bool logits = false;     // whether the steps have logits; not with drafts
  bool run_ahead = false;  // whether the next call feeds the same sequences the tokens that this
                           // one draws, with the same sampling, unless one has no more to draw: a
                           // GPU may begin it at once
  bool remember = true;    // whether the prefix cache, if there is one, is left what was fed so far
  bool drafts = false;     // whether a decode call is fed drafts, too; of a program that has them
  bool full_logits = false;  // whether `run` returns the logits behind every token, through the
                             // method `score`; of a program that has it
};

/// A `.pte` with its `.ptd`, and the state of the sequences on it. Not thread-safe.
class Model {
 public:
  /// Throws std::runtime_error that names the file and says what is wrong with it, or how much
  /// state there is no memory for.
  Model(const std::string& pte_path, const std::string& ptd_path, const ModelOptions& options = {});
  ~Model();
  Model(const Model&) = delete;
  Model& operator=(const Model&) = delete;

  const ModelInfo& info() const { return info_; }
  /// A session that has been fed nothing. Throws std::runtime_error if there are max_sequences.
  std::unique_ptr<Session> new_session();
  /// Zeroes a session's state and gives back its pages: its next token starts a new sequence.
  void reset(Session& session);
  /// Of a CUDA program: memory before and after loading, and now. Nothing for a CPU program.
  std::optional<llm::GpuMemory> gpu_memory() const { return device_->memory(); }

  size_t pages() const { return static_cast<size_t>(pool_->sizes.pages); }
  /// Those that no session holds: what the prefix cache has is dropped when it is needed.
  size_t free_pages() const { return pool_->pages.size() + pool_->pages.idle(); }
  /// How many pages a session lacks for `count` more tokens.
  size_t missing_pages(const Session& session, size_t count) const;
  /// For how many tokens a decode call needs pages: drafts of its own lie behind those it is fed.
  size_t decode_tokens(bool drafts) const {
    return drafts ? 1 + 2 * static_cast<size_t>(info_.draft_tokens) : 1;
  }

  /// What a session was given of tokens that others were fed before: so many `tokens`, which then
  /// count as fed to it. `known` of its tokens are in pages that are known; a call that ends behind
  /// them leaves a snapshot there, so that the next session can be given all of them.
  struct Reuse {
    size_t tokens = 0, known = 0;
  };
  /// Gives a session that has been fed nothing the longest prefix of some tokens, at most `limit`,
  /// that the prefix cache has. Without a cache that is none.
  Reuse reuse(Session& session, const std::vector<int64_t>& tokens, size_t limit);

  /// Feeds `count` tokens that follow those of the session, and draws the next one: one token as
  /// `decode` does, more through the method `prefill`. They may begin with the token that the last
  /// call drew, if the session was asked to run ahead. With full logits all go through `score`, and
  /// the session must not have been asked to run ahead.
  ///
  /// Throws std::runtime_error: no tokens or more than max_prefill_tokens (score_tokens with full
  /// logits), an id outside the
  /// vocabulary, more tokens than max_seq_len, another token than the one that a session that ran
  /// ahead was fed, or a failure of the program, which names the files: it says so, or what it
  /// returns are no tokens and logits; OutOfPages. After a failure the session has to be reset.
  Step run(Session& session, const int64_t* tokens, size_t count, const Sampling& sampling,
           const CallOptions& options = {});

  /// Feeds a token to each of at most info().max_sequences sessions, none of them twice, and draws
  /// the next ones: a single one through the method `decode`, several through `decode_batch`.
  ///
  /// A session that was asked to run ahead may have been fed already the token it drew, so it must
  /// be given that token next, with the same sampling.
  ///
  /// With drafts these are the methods `draft_decode` and `draft_decode_batch`. A session is fed
  /// its token, and behind it the drafts that the last call made, if that made some and drew this
  /// token, as far as the sequence may draw more. What is drawn is the same without them.
  ///
  /// Throws like `run`. After a failure of the program all the sessions have to be reset.
  std::vector<Step> decode(const std::vector<Feed>& feeds, const CallOptions& options = {});

  /// Takes back the last `count` tokens that a session was fed: drafts of its last call. Returns
  /// false if it cannot, since the device has gone on from them; the session has to be reset then.
  bool take_back(Session& session, size_t count);

 private:
  friend class Session;
  /// Throws std::runtime_error unless the methods have inputs and outputs of a text model.
  void check_methods(const Bindings& bindings) const;
  void allocate(const ModelOptions& options, const Bindings& bindings);
  /// How many pages there are to be. Throws std::runtime_error if one sequence takes more.
  size_t choose_pages(const ModelOptions& options, const Bindings& bindings);
  /// How many pages a fraction of the GPU's memory leaves room for, beside all else that is there.
  /// Throws std::runtime_error that says what takes how much if one sequence takes more.
  size_t pages_within(double fraction, const ModelOptions& options, const Bindings& bindings);
  /// Bytes that calls take beside weights and state: scratch memory, kernels, which are loaded as
  /// they are called, and CUDA graphs. It makes calls of up to options.max_sequences sequences, on
  /// a state of its own, and leaves scratch memory and kernels to those that follow.
  int64_t measure_calls(const ModelOptions& options, const Bindings& bindings);
  /// A call of each method that has one length.
  void call_singles();
  /// A call of each other method for every power of two of its lengths.
  void call_ranges(size_t max_sequences);
  /// A call of a method in which all but one token is padding; page 0 and slot 0 are written.
  void call_with(const std::string& method, size_t sequences, size_t tokens);
  /// Throws std::runtime_error unless a session may be fed these, at most `most` in a call.
  void check_call(const Session& session, const int64_t* tokens, size_t count, int64_t most) const;
  /// Throws std::runtime_error, with the files, unless tokens that were drawn are of the
  /// vocabulary, and no more drafts were accepted than there were among `fed` tokens.
  void check_drawn(const Drawn& drawn, size_t fed) const;
  /// Throws std::runtime_error, with the files, for NaN and +infinity.
  void check_logits(const float* logits, size_t rows) const;
  /// Throws std::runtime_error unless this token, drawn like this, is what the session was fed, and
  /// what that drew in turn are tokens. If not, the session has failed.
  void check_overtaken(Session& session, int64_t token, const Sampling& sampling) const;
  /// Makes what was fed ahead of its call count as fed. Returns the step.
  Step take_overtaken(Session& session);
  /// Makes what a session was fed in a call count, and what was drawn.
  Step advance(Session& session, const Tokens& fed, Drawn drawn);
  /// What a session was fed ahead of its call.
  static Tokens fed_ahead(const Session& session);
  /// How many values a decode call returns of a sequence: `token`, or `step`.
  size_t drawn_width(bool drafts) const {
    return drafts ? static_cast<size_t>(2 + info_.draft_tokens) : 1;
  }
  /// What the method of a call drew for each sequence, of the values that it returns.
  std::vector<Drawn> read_drawn(const int64_t* values, size_t sequences, bool drafts) const;
  /// What a decode call feeds of a sequence.
  Tokens tokens_of(const Feed& feed, bool drafts) const;
  /// Whether the device may go on from a call that feeds these tokens.
  bool may_run_ahead(const Feed& feed, const Tokens& tokens, bool drafts) const;
  /// Most tokens that a decode call draws for a sequence.
  int64_t reach(bool drafts) const { return drafts ? 1 + info_.draft_tokens : 1; }
  /// Takes pages for so many more tokens of each session, and for some more if there are any and
  /// the call may be followed by others at once. Throws OutOfPages.
  void take_pages(const std::vector<Feed>& feeds, size_t count, bool run_ahead);
  /// Whether a session has a page for a token at a position.
  bool has_page(const Session& session, int64_t position) const;
  /// Whether these feeds are the call that runs ahead.
  bool is_ahead(const std::vector<Feed>& feeds, bool drafts) const;
  /// Ends running ahead: its sessions keep the tokens that were drawn.
  void settle();
  /// A call of the device that feeds each sequence its tokens. Returns what it drew for each, and
  /// in `logits` where these are, if they are wanted: a row of each sequence, or of `score` of each
  /// token. If it fails nothing runs ahead any more.
  std::vector<Drawn> run_or_settle(const Call& call, const std::vector<Tokens>& fed,
                                   const float** logits);
  /// One call of sessions whose pages are there, which feeds each its tokens.
  std::vector<Step> call(const std::vector<Feed>& feeds, const std::vector<Tokens>& tokens,
                         const CallOptions& options);
  /// Leaves to the prefix cache what a session has been fed, the last call from position `before`
  /// on: pages that are full, and the state behind them. `passing`: a decode call.
  void remember(const Session& session, int64_t before, bool passing);
  /// Gives back a session's pages, and gives up a token that it was asked to draw ahead.
  void drop(Session& session);

  ProgramFile program_;
  std::optional<Weights> weights_;
  std::unique_ptr<Device> device_;
  std::optional<TextInputs> inputs_;
  std::optional<StatePool> pool_;
  std::optional<PrefixCache> cache_;
  ModelInfo info_{};
  std::vector<Session*> ahead_;  // the sessions of the call that runs ahead, in order
  bool ahead_drafts_ = false;    // whether it is fed drafts
};

}  // namespace et_moe

// llm::Stats: what a run took, with the field names and JSON keys of ExecuTorch's runners
// (extension/llm/runner/stats.h).
#pragma once

#include <chrono>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace et_moe::llm {

/// Milliseconds on a monotonic clock, with fractions.
double now_ms();

/// GPU memory in bytes, as cudaMemGetInfo reports it.
struct GpuMemory {
  int64_t total = 0;
  int64_t free_before_load = 0;
  int64_t free_after_load = 0;
  int64_t free_after_generate = 0;
};

/// Of many requests at once: what each of their callers waits for.
struct BatchStats {
  std::vector<double> first_token_ms;  // from the start, one of each request that drew a token
  // From each token to the next one of its request; tokens of one step share its time.
  std::vector<double> between_tokens_ms;
  int64_t generated_in_prefill = 0;      // tokens of all requests until the end of prefill
  std::optional<int64_t> cached_tokens;  // of prompts, taken from a prefix cache, if there is one
};

/// Of tokens that were guessed before they were drawn.
struct DraftStats {
  int64_t steps = 0;              // calls that were fed drafts
  int64_t tokens = 0;             // drafts that they were fed
  std::vector<int64_t> accepted;  // in how many of them the first one was right, the first two, ...

  int64_t accepted_tokens() const;
  /// Counts a call: `fed` drafts, of which so many were accepted and kept. None is no such call.
  void add(size_t fed, size_t kept);
  void add(const DraftStats& other);
};

/// The value below which a part of the values lies, interpolated. There must be one.
double quantile(std::vector<double> values, double part);

struct Stats {
  // Points in time, from now_ms().
  double model_load_start_ms = 0;
  double model_load_end_ms = 0;
  double inference_start_ms = 0;        // the prompt is tokenized after this
  double model_execution_start_ms = 0;  // first call of the program
  double prompt_eval_end_ms = 0;        // end of prefill, of many requests that of the last one
  double first_token_ms = 0;            // of many requests that of the first one
  double model_execution_end_ms = 0;
  double inference_end_ms = 0;
  // Durations. Sampling is part of the program: it is not timed apart and stays 0.
  double aggregate_sampling_time_ms = 0;
  double aggregate_model_execution_time_ms = 0;
  int64_t num_prompt_tokens = 0;
  int64_t num_generated_tokens = 0;  // the one that prefill draws included
  std::optional<DraftStats> drafts;  // only of a program that makes drafts
  std::optional<GpuMemory> gpu;      // only where a GPU was used
  std::optional<BatchStats> batch;   // only of many requests at once; the numbers are their sums

  /// Prompt tokens per second of prefill.
  double prefill_token_per_sec() const;
  /// Tokens per second between prefill and the end.
  double decode_token_per_sec() const;
  /// Generated tokens per second from start to end.
  double output_token_per_sec() const;
  /// One JSON object on one line. Times are rounded to whole milliseconds, rates are not.
  std::string to_json() const;
  /// A table for people.
  std::string to_table() const;
};

}  // namespace et_moe::llm

// The runner's command line.
#pragma once

#include <CLI/CLI.hpp>
#include <cstdint>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "runner/engine.h"
#include "runner/tokenizer/tokenizer.h"

namespace et_moe {

struct Flags {
  std::string model_path, data_path, tokenizer_path;
  std::optional<std::string> prompt, prompt_file, prompt_ids, prompt_ids_path, prompts_path,
      score_ids_path;
  std::string output_ids_path, logprobs_path, logits_path, stats_path;
  GenerationConfig generation;
  std::optional<size_t> max_sequences;
  std::optional<double> memory_fraction;
  int warmup = 0, num_iters = 1;
  bool cuda_graph = false, parse_special = true, prefix_cache = false;
};

void add_flags(CLI::App& app, Flags& flags);

/// Throws std::runtime_error where the outputs that the flags name cannot be written, are files
/// that are read or another output, where a score has none, or for those that it does not have.
void check_outputs(const Flags& flags);

/// How the flags want a model to be loaded, for so many sequences at once.
ModelOptions model_options(const Flags& flags, size_t max_sequences);

/// A prompt as it is given.
using PromptSource = std::variant<std::string, std::vector<int64_t>>;

/// The text of --prompt or --prompt_file, or the ids of --prompt_ids or --prompt_ids_path. To be
/// called once: the file may be a pipe. Throws std::runtime_error that names the flag or the file
/// at fault.
PromptSource read_prompt_source(const Flags& flags);

/// The ids of a text by the tokenizer, which may be null. Throws std::runtime_error: there is none,
/// it refuses the text, or it gives an id that a program with so large a vocabulary does not take;
/// that names both files.
std::vector<int64_t> encode(const Flags& flags, const Tokenizer* tokenizer, const std::string& text,
                            int64_t vocab_size);

/// The ids of a prompt, those of a text by `encode`. Throws std::runtime_error that names the flag
/// or the file at fault.
std::vector<int64_t> read_prompt(const Flags& flags, const PromptSource& source,
                                 const Tokenizer* tokenizer, int64_t vocab_size);

}  // namespace et_moe

// The runner's command line.
#pragma once

#include <CLI/CLI.hpp>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "runner/engine.h"
#include "runner/tokenizer/tokenizer.h"

namespace et_moe {

struct Flags {
  std::string model_path, data_path, tokenizer_path;
  std::optional<std::string> prompt, prompt_file, prompt_ids, score_ids_path;
  std::string output_ids_path, logprobs_path, logits_path, stats_path;
  GenerationConfig generation;
  int warmup = 0, num_iters = 1;
  bool cuda_graph = false, parse_special = true;
};

void add_flags(CLI::App& app, Flags& flags);

/// Throws std::runtime_error where the outputs that the flags name cannot be written, are files
/// that are read or another output, or where a score has none.
void check_outputs(const Flags& flags);

/// The text of --prompt or --prompt_file; empty with --prompt_ids. To be called once: the file may
/// be a pipe. Throws std::runtime_error that names the file.
std::string read_prompt_text(const Flags& flags);

/// The ids of --prompt_ids, or of the text by the tokenizer, which may be null. Throws
/// std::runtime_error that names the flag or the file at fault.
std::vector<int64_t> read_prompt(const Flags& flags, const std::string& text,
                                 const Tokenizer* tokenizer);

}  // namespace et_moe

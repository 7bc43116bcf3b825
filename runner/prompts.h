// Prompts from a file of JSON lines, each with parameters of its own.
#pragma once

#include <vector>

#include "runner/flags.h"
#include "runner/request.h"

namespace et_moe {

/// The requests of the file --prompts_path, in the order of its lines. Each line is an object with
/// `prompt`, a text, or `prompt_ids`, and any of max_new_tokens, temperature, top_k, top_p, min_p,
/// seed, presence_penalty, frequency_penalty and repetition_penalty; the flags have what it leaves
/// out. The tokenizer may be null.
///
/// Throws std::runtime_error that names file, line and what is wrong with it: everything that the
/// engine for a program of this `info` would refuse, and keys that are unknown or there twice.
std::vector<Request> read_prompts(const Flags& flags, const Tokenizer* tokenizer,
                                  const ModelInfo& info);

}  // namespace et_moe

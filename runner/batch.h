// Many prompts at once, from a file to answers and stats.
#pragma once

#include "runner/flags.h"
#include "runner/tokenizer/tokenizer.h"

namespace et_moe {

/// Answers the prompts of --prompts_path, all in flight at once, as often as the flags say. Prints
/// the answers under their numbers, in order, each when it and those before have ended; with
/// --output_ids_path it writes them instead. Prints and writes stats. The tokenizer may be null.
///
/// Throws std::runtime_error that names what is at fault, a prompt by file and line; ReaderGone;
/// Interrupted once the stats up to a signal are printed.
void generate_batch(const Flags& flags, const Tokenizer* tokenizer);

}  // namespace et_moe

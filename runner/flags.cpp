#include "runner/flags.h"

#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstdlib>
#include <filesystem>
#include <limits>
#include <map>
#include <stdexcept>
#include <utility>

#include "backends/messages.h"
#include "runner/errors.h"
#include "runner/files.h"
#include "runner/request.h"

namespace et_moe {
namespace {

/// Whether a text is an integer as people write it. CLI11 takes more, such as 010 for 8 and 0x10.
bool is_decimal(const std::string& text) {
  const std::string digits = text.substr(text.rfind('-', 0) == 0 || text.rfind('+', 0) == 0);
  return !digits.empty() && digits.find_first_not_of("0123456789") == std::string::npos &&
         (digits.size() == 1 || digits[0] != '0');
}

/// Adds an option that takes an integer from `least` to `most`; `value` may be optional.
template <typename Value, typename Integer = Value>
CLI::Option* add_integer(CLI::App& app, const std::string& name, Value& value,
                         const std::string& description,
                         Integer least = std::numeric_limits<Integer>::min(),
                         Integer most = std::numeric_limits<Integer>::max()) {
  const auto check = [least, most](const std::string& text) -> std::string {
    if (!is_decimal(text)) return "Value " + shortened(text) + " is no decimal integer";
    errno = 0;
    const long long found = std::strtoll(text.c_str(), nullptr, 10);
    if (errno != ERANGE && found >= least && found <= most) return "";
    return "Value " + shortened(text) + " not in range " + std::to_string(least) + " to " +
           std::to_string(most);
  };
  return app.add_option(name, value, description)->check(check)->capture_default_str();
}

CLI::Option* add_number(CLI::App& app, const std::string& name, float& value,
                        const std::string& description) {
  const auto check = [](const std::string& text) -> std::string {
    float found = 0;
    return CLI::detail::lexical_cast(text, found) ? ""
                                                  : "Value " + shortened(text) + " is no number";
  };
  return app.add_option(name, value, description)->check(check)->capture_default_str();
}

/// Adds an option that takes a path, to `to`: an app or a group of its options.
template <typename Path>
CLI::Option* add_path(CLI::App& to, const std::string& name, Path& path,
                      const std::string& description) {
  const auto check = [](const std::string& text) -> std::string {
    return text.empty() ? "expected a path, got an empty text" : "";
  };
  return to.add_option(name, path, description)->check(check);
}

std::string check_fraction(const std::string& text) {
  double value = 0;
  if (CLI::detail::lexical_cast(text, value) && value > 0 && value <= 1) return "";
  return "Value " + shortened(text) + ": expected more than 0 and at most 1";
}

/// Token ids separated by commas; none of an empty text.
std::vector<int64_t> parse_ids(const std::string& text) {
  std::vector<int64_t> ids;
  for (size_t begin = 0; begin <= text.size() && !text.empty();) {
    const size_t end = std::min(text.find(',', begin), text.size());
    int64_t id = 0;
    const auto [rest, error] = std::from_chars(text.data() + begin, text.data() + end, id);
    if (error != std::errc() || rest != text.data() + end) {
      throw std::runtime_error("--prompt_ids: \"" + shortened(text.substr(begin, end - begin)) +
                               "\" is not a token id");
    }
    ids.push_back(id);
    begin = end + 1;
  }
  return ids;
}

/// Where a path leads, through links: the same text for the same file, unless that has two names.
std::string place_of(const std::string& path) {
  struct stat status{};
  if (stat(path.c_str(), &status) == 0) {
    return std::to_string(status.st_dev) + ":" + std::to_string(status.st_ino);
  }
  std::error_code error;
  const auto place = std::filesystem::weakly_canonical(follow_links(path), error);
  return error ? path : place.string();
}

/// Whether an output is written to a regular file, which is there or will be.
bool is_or_becomes_regular(const std::string& path) {
  std::error_code error;
  const auto status = std::filesystem::status(path, error);
  return !std::filesystem::exists(status) || std::filesystem::is_regular_file(status);
}

}  // namespace

void add_flags(CLI::App& app, Flags& f) {
  add_path(app, "--model_path", f.model_path, "The program, model.pte")->required();
  add_path(app, "--data_path", f.data_path, "The weights, model.ptd")->required();
  add_path(app, "--tokenizer_path", f.tokenizer_path,
           "tokenizer.json; without it prompts and results are token ids");
  auto* prompt = app.add_option_group("prompt", "exactly one of");
  prompt->add_option("--prompt", f.prompt, "The prompt");
  add_path(*prompt, "--prompt_file", f.prompt_file, "A file that holds the prompt");
  prompt->add_option("--prompt_ids", f.prompt_ids, "The prompt as token ids: 1,2,3");
  add_path(*prompt, "--prompt_ids_path", f.prompt_ids_path,
           "A file that holds the prompt as a JSON list of token ids");
  auto* prompts = add_path(
      *prompt, "--prompts_path", f.prompts_path,
      "Prompts that are answered at once: a JSON object on each line, with prompt or prompt_ids "
      "and "
      "any of max_new_tokens, temperature, top_k, top_p, min_p, seed, presence_penalty, "
      "frequency_penalty, repetition_penalty; what a line leaves out comes from the flags");
  auto* score = add_path(*prompt, "--score_ids_path", f.score_ids_path,
                         "A JSON list of token ids to score instead of generating, or a list of "
                         "such lists, each a text of its own");
  prompt->require_option(1);
  add_path(app, "--logprobs_path", f.logprobs_path,
           "Where scoring writes a JSON list of log-probabilities, one per id after the first, or "
           "a list of such lists")
      ->needs(score);
  add_path(app, "--logits_path", f.logits_path,
           "Where scoring writes the logits behind them, float32 [rows, vocabulary] .npy, in the "
           "order of the ids; row by row where it is a pipe")
      ->needs(score);
  auto& g = f.generation;
  add_integer(app, "--max_new_tokens", g.max_new_tokens, "Most tokens to generate");
  add_number(app, "--temperature", g.sampling.temperature, "0 is greedy");
  add_integer(app, "--top_k", g.sampling.top_k, "Sample from the k likeliest, 0 for all");
  add_number(app, "--top_p", g.sampling.top_p, "Sample from the likeliest that make up this mass");
  add_integer(app, "--seed", g.sampling.seed, "Of the sampler, any 64-bit integer");
  add_integer(app, "--max_sequences", f.max_sequences,
              "Most prompts of --prompts_path that are answered at once; without it as many "
              "as a call of the program takes",
              1, 1000000)
      ->needs(prompts);
  app.add_flag("--prefix_cache", f.prefix_cache,
               "Prompts of --prompts_path that begin as earlier ones did take over what these "
               "computed; so do those of further runs (--num_iters)")
      ->needs(prompts);
  app.add_option("--memory_fraction", f.memory_fraction,
                 "Of a GPU's memory, for weights, state and what calls take together, more than 0 "
                 "and at most 1: bounds how many tokens are cached")
      ->check(check_fraction);
  app.add_flag("--parse_special,!--no_parse_special", f.parse_special,
               "Special tokens written in the prompt become their ids (the default)");
  add_integer(app, "--warmup", f.warmup, "Runs before the measured ones", 0, 1000000)
      ->excludes(score);
  add_integer(app, "--num_iters", f.num_iters, "Measured runs", 1, 1000000)->excludes(score);
  app.add_flag("--cuda_graph", f.cuda_graph, "Capture CUDA graphs; a CPU program ignores it");
  add_path(
      app, "--output_ids_path", f.output_ids_path,
      "Where to write the generated ids, a JSON list; with --prompts_path a list of such lists "
      "in the order of the lines, and the answers are not printed");
  add_path(app, "--stats_path", f.stats_path,
           "Where to write the stats, one JSON object per measured run and line");
}

void check_outputs(const Flags& f) {
  if (f.score_ids_path && f.logprobs_path.empty() && f.logits_path.empty()) {
    throw std::runtime_error("--score_ids_path needs --logprobs_path or --logits_path");
  }
  for (const auto& [flag, path] :
       {std::pair("--output_ids_path", &f.output_ids_path), {"--stats_path", &f.stats_path}}) {
    if (f.score_ids_path && !path->empty()) {
      throw std::runtime_error(std::string(flag) + ": scoring writes none, see --score_ids_path");
    }
  }
  std::map<std::string, std::string> files;  // regular ones, by their place -> flag
  const auto take = [&files](const std::string& flag, const std::string& path, bool is_output) {
    const auto [known, is_new] = files.try_emplace(place_of(path), flag);
    if (is_output && !is_new && is_or_becomes_regular(path)) {
      throw std::runtime_error(flag + " " + path + ": the same file as that of " + known->second);
    }
  };
  for (const auto& [flag, path] : {std::pair("--model_path", &f.model_path),
                                   {"--data_path", &f.data_path},
                                   {"--tokenizer_path", &f.tokenizer_path}}) {
    if (!path->empty()) take(flag, *path, false);
  }
  for (const auto& [flag, path] : {std::pair("--prompt_file", &f.prompt_file),
                                   {"--prompt_ids_path", &f.prompt_ids_path},
                                   {"--prompts_path", &f.prompts_path},
                                   {"--score_ids_path", &f.score_ids_path}}) {
    if (*path) take(flag, **path, false);
  }
  for (const auto& [flag, path] : {std::pair("--output_ids_path", &f.output_ids_path),
                                   {"--stats_path", &f.stats_path},
                                   {"--logprobs_path", &f.logprobs_path},
                                   {"--logits_path", &f.logits_path}}) {
    if (path->empty()) continue;
    take(flag, *path, true);
    check_writable(*path);
  }
}

ModelOptions model_options(const Flags& f, size_t max_sequences) {
  ModelOptions options;
  options.device.cuda_graph = f.cuda_graph;
  options.max_sequences = max_sequences;
  options.memory_fraction = f.memory_fraction;
  return options;
}

PromptSource read_prompt_source(const Flags& f) {
  if (f.prompt_ids) return parse_ids(*f.prompt_ids);
  if (f.prompt_ids_path) return read_ids(*f.prompt_ids_path);
  return f.prompt ? *f.prompt : read_file(*f.prompt_file);
}

std::vector<int64_t> encode(const Flags& f, const Tokenizer* tokenizer, const std::string& text,
                            int64_t vocab_size) {
  if (!tokenizer) throw std::runtime_error("--tokenizer_path is needed to read a text prompt");
  std::vector<int64_t> ids = tokenizer->encode(text, f.parse_special);
  check_ids(ids, vocab_size, both_files(f.model_path, f.tokenizer_path) + ": ");
  return ids;
}

std::vector<int64_t> read_prompt(const Flags& f, const PromptSource& source,
                                 const Tokenizer* tokenizer, int64_t vocab_size) {
  if (const auto* ids = std::get_if<std::vector<int64_t>>(&source)) return *ids;
  return in_context(f.prompt ? "--prompt" : *f.prompt_file, [&] {
    const std::string& text = std::get<std::string>(source);
    if (text.empty()) throw std::runtime_error("the prompt is empty");
    return encode(f, tokenizer, text, vocab_size);
  });
}

}  // namespace et_moe

#include "runner/flags.h"

#include <sys/stat.h>

#include <cerrno>
#include <charconv>
#include <cstdlib>
#include <filesystem>
#include <map>
#include <sstream>
#include <stdexcept>
#include <utility>

#include "runner/errors.h"
#include "runner/files.h"

namespace et_moe {
namespace {

/// What CLI11 takes for an integer and would bring into the range of int64 by itself.
std::string check_int64(const std::string& text) {
  errno = 0;
  std::strtoll(text.c_str(), nullptr, 0);
  if (errno != ERANGE) return "";
  return "Value " + text + " not in range " + std::to_string(INT64_MIN) + " to " +
         std::to_string(INT64_MAX);
}

std::string check_fraction(const std::string& text) {
  double value = 0;
  if (CLI::detail::lexical_cast(text, value) && value > 0 && value <= 1) return "";
  return "Value " + text + ": expected more than 0 and at most 1";
}

/// Token ids separated by commas.
std::vector<int64_t> parse_ids(const std::string& text) {
  std::vector<int64_t> ids;
  std::istringstream fields(text);
  for (std::string field; std::getline(fields, field, ',');) {
    int64_t id = 0;
    const char* end = field.data() + field.size();
    const auto [rest, error] = std::from_chars(field.data(), end, id);
    if (error != std::errc() || rest != end) {
      throw std::runtime_error("--prompt_ids: \"" + field + "\" is not a token id");
    }
    ids.push_back(id);
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
  app.add_option("--model_path", f.model_path, "The program, model.pte")->required();
  app.add_option("--data_path", f.data_path, "The weights, model.ptd")->required();
  app.add_option("--tokenizer_path", f.tokenizer_path,
                 "tokenizer.json; without it prompts and results are token ids");
  auto* prompt = app.add_option_group("prompt", "exactly one of");
  prompt->add_option("--prompt", f.prompt, "The prompt");
  prompt->add_option("--prompt_file", f.prompt_file, "A file that holds the prompt");
  prompt->add_option("--prompt_ids", f.prompt_ids, "The prompt as token ids: 1,2,3");
  prompt->add_option("--prompt_ids_path", f.prompt_ids_path,
                     "A file that holds the prompt as a JSON list of token ids");
  auto* prompts = prompt->add_option(
      "--prompts_path", f.prompts_path,
      "Prompts that are answered at once: a JSON object on each line, with prompt or prompt_ids "
      "and "
      "any of max_new_tokens, temperature, top_k, top_p, min_p, seed, presence_penalty, "
      "frequency_penalty, repetition_penalty; what a line leaves out comes from the flags");
  auto* score = prompt->add_option("--score_ids_path", f.score_ids_path,
                                   "A JSON list of token ids to score instead of generating");
  prompt->require_option(1);
  app.add_option(
         "--logprobs_path", f.logprobs_path,
         "Where scoring writes a JSON list of log-probabilities, one per id after the first")
      ->needs(score);
  app.add_option("--logits_path", f.logits_path,
                 "Where scoring writes the logits behind them, float32 [ids - 1, vocabulary] .npy")
      ->needs(score);
  auto& g = f.generation;
  app.add_option("--max_new_tokens", g.max_new_tokens, "Most tokens to generate")
      ->check(check_int64)
      ->capture_default_str();
  app.add_option("--temperature", g.sampling.temperature, "0 is greedy")->capture_default_str();
  app.add_option("--top_k", g.sampling.top_k, "Sample from the k likeliest, 0 for all")
      ->check(check_int64)
      ->capture_default_str();
  app.add_option("--top_p", g.sampling.top_p, "Sample from the likeliest that make up this mass")
      ->capture_default_str();
  app.add_option("--seed", g.sampling.seed, "Of the sampler, any 64-bit integer")
      ->check(check_int64)
      ->capture_default_str();
  app.add_option(
         "--max_sequences", f.max_sequences,
         "Most prompts of --prompts_path that are answered at once; without it as many as a "
         "call of the program takes")
      ->check(CLI::Range(1, 1000000))
      ->needs(prompts);
  app.add_option("--memory_fraction", f.memory_fraction,
                 "Of a GPU's memory, for weights and state together, more than 0 and at most 1: "
                 "bounds how many tokens are cached")
      ->check(check_fraction);
  app.add_flag("--parse_special,!--no_parse_special", f.parse_special,
               "Special tokens written in the prompt become their ids (the default)");
  app.add_option("--warmup", f.warmup, "Runs before the measured ones")
      ->check(CLI::Range(0, 1000000));
  app.add_option("--num_iters", f.num_iters, "Measured runs")->check(CLI::Range(1, 1000000));
  app.add_flag("--cuda_graph", f.cuda_graph, "Capture CUDA graphs; a CPU program ignores it");
  app.add_option(
      "--output_ids_path", f.output_ids_path,
      "Where to write the generated ids, a JSON list; with --prompts_path a list of such "
      "lists in the order of the lines, and the answers are not printed");
  app.add_option("--stats_path", f.stats_path,
                 "Where to write the stats, one JSON object per measured run and line");
}

void check_outputs(const Flags& f) {
  if (f.score_ids_path && f.logprobs_path.empty() && f.logits_path.empty()) {
    throw std::runtime_error("--score_ids_path needs --logprobs_path or --logits_path");
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

std::vector<int64_t> read_prompt(const Flags& f, const PromptSource& source,
                                 const Tokenizer* tokenizer) {
  if (const auto* ids = std::get_if<std::vector<int64_t>>(&source)) return *ids;
  if (!tokenizer) throw std::runtime_error("--tokenizer_path is needed to read a text prompt");
  return in_context(f.prompt ? "--prompt" : *f.prompt_file, [&] {
    const std::string& text = std::get<std::string>(source);
    if (text.empty()) throw std::runtime_error("the prompt is empty");
    return tokenizer->encode(text, f.parse_special);
  });
}

}  // namespace et_moe

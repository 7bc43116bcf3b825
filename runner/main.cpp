// Runs a Qwen3.5 MoE program: parses flags, feeds the engine, prints text and stats.

#include <CLI/CLI.hpp>
#include <charconv>
#include <csignal>
#include <cstdio>
#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "runner/engine.h"
#include "runner/files.h"
#include "runner/tokenizer/tokenizer.h"
#include "runner/tokenizer/utf8.h"

namespace {

using et_moe::Engine;
using et_moe::llm::Stats;

struct Flags {
  std::string model_path, data_path, tokenizer_path;
  std::optional<std::string> prompt, prompt_file, prompt_ids, score_ids_path;
  std::string output_ids_path, logprobs_path, logits_path, stats_path;
  et_moe::GenerationConfig generation;
  int warmup = 0, num_iters = 1;
  bool cuda_graph = false, parse_special = true;
};

void add_flags(CLI::App& app, Flags& f) {
  app.add_option("--model_path", f.model_path, "The program, model.pte")->required();
  app.add_option("--data_path", f.data_path, "The weights, model.ptd")->required();
  app.add_option("--tokenizer_path", f.tokenizer_path,
                 "tokenizer.json; without it prompts and results are token ids");
  auto* prompt = app.add_option_group("prompt", "exactly one of");
  prompt->add_option("--prompt", f.prompt, "The prompt");
  prompt->add_option("--prompt_file", f.prompt_file, "A file that holds the prompt");
  prompt->add_option("--prompt_ids", f.prompt_ids, "The prompt as token ids: 1,2,3");
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
      ->capture_default_str();
  app.add_option("--temperature", g.sampling.temperature, "0 is greedy")->capture_default_str();
  app.add_option("--top_k", g.sampling.top_k, "Sample from the k likeliest, 0 for all")
      ->capture_default_str();
  app.add_option("--top_p", g.sampling.top_p, "Sample from the likeliest that make up this mass")
      ->capture_default_str();
  app.add_option("--seed", g.sampling.seed, "Of the sampler")->capture_default_str();
  app.add_flag("--parse_special,!--no_parse_special", f.parse_special,
               "Special tokens written in the prompt become their ids (the default)");
  app.add_option("--warmup", f.warmup, "Runs before the measured ones")
      ->check(CLI::Range(0, 1000000));
  app.add_option("--num_iters", f.num_iters, "Measured runs")->check(CLI::Range(1, 1000000));
  app.add_flag("--cuda_graph", f.cuda_graph, "Capture CUDA graphs; a CPU program ignores it");
  app.add_option("--output_ids_path", f.output_ids_path,
                 "Where to write the generated ids, a JSON list");
  app.add_option("--stats_path", f.stats_path,
                 "Where to write the stats, one JSON object per measured run and line");
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

std::vector<int64_t> read_prompt(const Flags& f, const et_moe::Tokenizer* tokenizer) {
  if (f.prompt_ids) return parse_ids(*f.prompt_ids);
  if (!tokenizer) throw std::runtime_error("--tokenizer_path is needed to read a text prompt");
  const std::string text = f.prompt ? *f.prompt : et_moe::read_file(*f.prompt_file);
  if (text.empty()) throw std::runtime_error("the prompt is empty");
  return tokenizer->encode(text, f.parse_special);
}

/// Prints tokens as they come: text with a tokenizer (special tokens left out), ids without.
class Printer {
 public:
  explicit Printer(const et_moe::Tokenizer* tokenizer) : tokenizer_(tokenizer) {}
  void token(int64_t id) {
    if (!tokenizer_) {
      print(std::to_string(id) + " ");
    } else if (id < tokenizer_->vocab_size() && !tokenizer_->is_special(id)) {
      print(stream_.push(tokenizer_->id_to_bytes(id)));
    }
  }
  void finish() { print(stream_.finish() + "\n"); }

 private:
  static void print(const std::string& text) {
    std::fwrite(text.data(), 1, text.size(), stdout);
    std::fflush(stdout);
  }
  const et_moe::Tokenizer* tokenizer_;
  et_moe::Utf8Stream stream_;
};

void score(Engine& engine, const Flags& f) {
  if (f.logprobs_path.empty() && f.logits_path.empty()) {
    throw std::runtime_error("--score_ids_path needs --logprobs_path or --logits_path");
  }
  const std::vector<int64_t> ids = et_moe::read_ids(*f.score_ids_path);
  const int64_t vocabulary = engine.model().info().vocab_size;
  std::optional<et_moe::NpyWriter> logits_file;
  nlohmann::json logprobs = nlohmann::json::array();
  engine.score(ids, [&](size_t i, const float* logits) {
    if (!f.logits_path.empty()) {
      if (!logits_file) {
        logits_file.emplace(f.logits_path, ids.size() - 1, static_cast<size_t>(vocabulary));
      }
      logits_file->write_row(logits);
    }
    logprobs.push_back(et_moe::log_probability(logits, vocabulary, ids[i]));
  });
  if (logits_file) logits_file->close();
  if (!f.logprobs_path.empty()) et_moe::write_file(f.logprobs_path, logprobs.dump());
}

void generate(Engine& engine, const Flags& f, const et_moe::Tokenizer* tokenizer,
              const Stats& loaded) {
  std::vector<int64_t> ids;
  std::string json_lines;
  for (int i = -f.warmup; i < f.num_iters; ++i) {
    const bool show = i == 0;
    Stats stats = loaded;
    stats.inference_start_ms = et_moe::llm::now_ms();
    const std::vector<int64_t> prompt = read_prompt(f, tokenizer);
    Printer printer(tokenizer);
    const auto on_token = [&](int64_t id) {
      if (show) printer.token(id);
      return true;
    };
    ids = engine.generate(prompt, f.generation, stats, on_token).ids;
    if (show) printer.finish();
    if (i < 0) continue;
    const std::string json = stats.to_json();
    std::printf("PyTorchObserver %s\n", json.c_str());
    json_lines += json + "\n";
    if (i + 1 == f.num_iters) std::printf("%s", stats.to_table().c_str());
  }
  if (!f.output_ids_path.empty()) et_moe::write_file(f.output_ids_path, nlohmann::json(ids).dump());
  if (!f.stats_path.empty()) et_moe::write_file(f.stats_path, json_lines);
}

void run(const Flags& f) {
  std::optional<et_moe::Tokenizer> tokenizer;
  if (!f.tokenizer_path.empty()) tokenizer.emplace(et_moe::Tokenizer::load(f.tokenizer_path));
  Stats stats;
  stats.model_load_start_ms = et_moe::llm::now_ms();
  et_moe::DeviceOptions options;
  options.cuda_graph = f.cuda_graph;
  Engine engine(std::make_shared<et_moe::Model>(f.model_path, f.data_path, options));
  stats.model_load_end_ms = et_moe::llm::now_ms();
  if (f.score_ids_path) return score(engine, f);
  generate(engine, f, tokenizer ? &*tokenizer : nullptr, stats);
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app{
      "Runs a Qwen3.5 MoE program made by `et-moe export`. A program for CUDA holds native code: "
      "loading one from a source you do not trust is running a program from it."};
  Flags flags;
  add_flags(app, flags);
  CLI11_PARSE(app, argc, argv);
  std::signal(SIGPIPE, SIG_IGN);
  try {
    run(flags);
  } catch (const std::exception& e) {
    std::fprintf(stderr, "error: %s\n", e.what());
    return 1;
  }
  if (std::fflush(stdout) != 0 || std::ferror(stdout)) {
    std::fprintf(stderr, "error: the output could not be written\n");
    return 1;
  }
  return 0;
}

// Runs a Qwen3.5 MoE program: feeds the engine, prints text and stats, writes files.

#include <fcntl.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <csignal>
#include <cstdio>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "backends/json.h"
#include "runner/batch.h"
#include "runner/engine.h"
#include "runner/errors.h"
#include "runner/files.h"
#include "runner/flags.h"
#include "runner/printer.h"
#include "runner/signals.h"
#include "runner/tokenizer/tokenizer.h"

namespace {

using et_moe::Engine;
using et_moe::Flags;
using et_moe::Interrupted;
using et_moe::llm::Stats;

/// The windows of --score_ids_path, all of which can be scored.
et_moe::Windows read_scored(const Engine& engine, const std::string& path) {
  et_moe::Windows windows = et_moe::read_windows(path);
  for (size_t i = 0; i < windows.ids.size(); ++i) {
    const std::string where = windows.is_list ? path + ": window " + std::to_string(i) : path;
    et_moe::in_context(where, [&] { engine.check_score(windows.ids[i]); });
  }
  return windows;
}

void score(Engine& engine, const Flags& f) {
  const et_moe::Windows windows = read_scored(engine, *f.score_ids_path);
  const int64_t vocabulary = engine.model().info().vocab_size;
  std::optional<et_moe::NpyWriter> logits_file;
  if (!f.logits_path.empty()) {
    size_t rows = 0;
    for (const auto& ids : windows.ids) rows += ids.size() - 1;
    logits_file.emplace(f.logits_path, rows, static_cast<size_t>(vocabulary));
  }
  auto logprobs = nlohmann::json::array();
  for (const auto& ids : windows.ids) {
    auto found = nlohmann::json::array();
    engine.score(ids, [&](size_t i, const float* logits) {
      if (logits_file) logits_file->write_row(logits);
      if (f.logprobs_path.empty()) return;
      found.push_back(et_moe::log_probability(logits, vocabulary, ids[i]));
    });
    logprobs.push_back(std::move(found));
  }
  if (logits_file) logits_file->close();
  if (f.logprobs_path.empty()) return;
  et_moe::write_file(f.logprobs_path, et_moe::to_text(windows.is_list ? logprobs : logprobs[0]));
}

void generate(Engine& engine, const Flags& f, const et_moe::Tokenizer* tokenizer,
              const Stats& loaded) {
  std::vector<int64_t> ids;
  std::string json_lines;
  const et_moe::PromptSource source = et_moe::read_prompt_source(f);
  for (int i = -f.warmup; i < f.num_iters; ++i) {
    const bool show = i == 0;
    Stats stats = loaded;
    stats.inference_start_ms = et_moe::llm::now_ms();
    const std::vector<int64_t> prompt =
        et_moe::read_prompt(f, source, tokenizer, engine.model().info().vocab_size);
    et_moe::Printer printer(tokenizer);
    // Before the first measured token there are no stats that would be worth waiting for.
    const auto on_token = [&](int64_t id) {
      if (show) et_moe::defer_interrupt();
      if (show) printer.token(id);
      return !et_moe::interrupted();
    };
    ids = engine.generate(prompt, f.generation, stats, on_token).ids;
    if (show) printer.finish();
    if (i < 0) continue;
    const std::string json = stats.to_json();
    et_moe::print("PyTorchObserver " + json + "\n");
    json_lines += json + "\n";
    if (i + 1 == f.num_iters || et_moe::interrupted()) et_moe::print(stats.to_table());
    if (const int signal = et_moe::interrupted()) throw Interrupted{signal};
  }
  if (!f.output_ids_path.empty()) et_moe::write_file(f.output_ids_path, et_moe::to_text(ids));
  if (!f.stats_path.empty()) et_moe::write_file(f.stats_path, json_lines);
}

void run(const Flags& f) {
  et_moe::check_outputs(f);
  if (!f.score_ids_path) et_moe::check_standard_output();
  std::optional<et_moe::Tokenizer> tokenizer;
  if (!f.tokenizer_path.empty()) tokenizer.emplace(et_moe::Tokenizer::load(f.tokenizer_path));
  if (f.prompts_path) return et_moe::generate_batch(f, tokenizer ? &*tokenizer : nullptr);
  et_moe::needing_memory(f.model_path, [&] {
    Stats stats;
    stats.model_load_start_ms = et_moe::llm::now_ms();
    const et_moe::ModelOptions options = et_moe::model_options(f, 1);
    Engine engine(std::make_shared<et_moe::Model>(f.model_path, f.data_path, options));
    stats.model_load_end_ms = et_moe::llm::now_ms();
    if (f.score_ids_path) return score(engine, f);
    generate(engine, f, tokenizer ? &*tokenizer : nullptr, stats);
  });
}

/// Gives numbers 0 to 2 to files that fail to be read or written where they are closed, so that no
/// other file gets them.
void open_standard_streams() {
  for (int stream : {STDIN_FILENO, STDOUT_FILENO, STDERR_FILENO}) {
    if (fcntl(stream, F_GETFD) < 0) open("/dev/null", stream ? O_RDONLY : O_WRONLY);
  }
}

}  // namespace

int main(int argc, char** argv) {
  open_standard_streams();
  CLI::App app{
      "Runs a Qwen3.5 MoE program made by `et-moe export`. A program for CUDA holds native code: "
      "loading one from a source you do not trust is running a program from it."};
  Flags flags;
  et_moe::add_flags(app, flags);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& e) {
    if (e.get_exit_code() == 0) return app.exit(e);  // --help
    std::fprintf(stderr, "error: %s\n", e.what());
    return 2;
  }
  std::signal(SIGPIPE, SIG_IGN);
  et_moe::handle_ending_signals();
  try {
    run(flags);
  } catch (const et_moe::ReaderGone&) {
    return 128 + SIGPIPE;  // as of a program that the signal ends; no message, as of those
  } catch (const Interrupted& e) {
    std::fprintf(stderr, "error: ended by %s\n", e.signal == SIGINT ? "SIGINT" : "SIGTERM");
    return 128 + e.signal;
  } catch (const std::exception& e) {
    std::fprintf(stderr, "error: %s\n", e.what());
    return 1;
  }
  return 0;
}

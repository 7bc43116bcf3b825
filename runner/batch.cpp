#include "runner/batch.h"

#include <poll.h>

#include <algorithm>
#include <cstdio>
#include <map>
#include <stdexcept>
#include <utility>

#include "backends/json.h"
#include "runner/async_engine.h"
#include "runner/errors.h"
#include "runner/files.h"
#include "runner/printer.h"
#include "runner/prompts.h"
#include "runner/signals.h"

namespace et_moe {
namespace {

/// Within which time a signal is noticed that came while nothing else happened.
constexpr int kPollMs = 100;

struct Answer {
  std::vector<int64_t> ids;
  double last_ms = 0;  // when the last of them was drawn
  bool has_ended = false;
};

/// One run of all requests.
class Run {
 public:
  Run(AsyncEngine& engine, const Flags& flags, const std::vector<Request>& requests)
      : engine_(engine), flags_(flags), requests_(requests), answers_(requests.size()) {}

  /// Runs until all have ended. `stats` has the times of loading. A measured run notes signals, and
  /// is cancelled by one. Where `printed` is true, answers are printed.
  void run(llm::Stats& stats, bool is_measured, bool printed, const Tokenizer* tokenizer);

  std::vector<std::vector<int64_t>> take_ids();

 private:
  void submit();
  /// Waits for events and takes them.
  void step(llm::Stats& stats);
  void take(const Event& event, llm::Stats& stats);
  /// Fills the times that follow from those of all tokens.
  void finish(llm::Stats& stats) const;
  /// Prints the answers that have ended and come next.
  void print_next(const Tokenizer* tokenizer);

  AsyncEngine& engine_;
  const Flags& flags_;
  const std::vector<Request>& requests_;
  std::vector<Answer> answers_;
  std::map<uint64_t, size_t> index_;         // request -> its answer
  std::vector<double> first_ms_, drawn_ms_;  // of each answer's first token, of all tokens
  size_t ended_ = 0, printed_ = 0;
};

void Run::submit() {
  for (const uint64_t id : engine_.submit(requests_)) index_.emplace(id, index_.size());
}

void Run::take(const Event& event, llm::Stats& stats) {
  const size_t i = index_.at(event.request_id);
  if (event.end == RequestEnd::kError) {
    throw std::runtime_error(*flags_.prompts_path + ":" + std::to_string(i + 1) + ": " +
                             event.error);
  }
  Answer& answer = answers_[i];
  const std::vector<double>& times = event.drawn_ms;
  for (auto first = times.begin(); first != times.end();) {
    // Tokens of one step come at once, and share its time.
    const double drawn = *first;
    const auto next = std::find_if(first, times.end(), [drawn](double t) { return t != drawn; });
    const auto count = static_cast<size_t>(next - first);
    if (answer.ids.empty()) {
      stats.num_prompt_tokens += static_cast<int64_t>(requests_[i].prompt_ids.size());
      first_ms_.push_back(drawn);
    } else {
      auto& between = stats.batch->between_tokens_ms;
      between.insert(between.end(), count, (drawn - answer.last_ms) / static_cast<double>(count));
    }
    answer.ids.insert(answer.ids.end(), event.token_ids.begin() + (first - times.begin()),
                      event.token_ids.begin() + (next - times.begin()));
    answer.last_ms = drawn;
    drawn_ms_.insert(drawn_ms_.end(), count, drawn);
    first = next;
  }
  stats.num_generated_tokens = static_cast<int64_t>(drawn_ms_.size());
  if (stats.batch->cached_tokens) *stats.batch->cached_tokens += event.cached_tokens;
  if (stats.drafts) stats.drafts->add(event.drafts);
  if (!event.end) return;
  answer.has_ended = true;
  ++ended_;
}

void Run::step(llm::Stats& stats) {
  pollfd events{engine_.fileno(), POLLIN, 0};
  poll(&events, 1, kPollMs);
  for (const Event& event : engine_.take_events()) take(event, stats);
}

void Run::finish(llm::Stats& stats) const {
  stats.inference_end_ms = stats.model_execution_end_ms = llm::now_ms();
  // The model works as long as a request is in flight.
  stats.aggregate_model_execution_time_ms =
      stats.model_execution_end_ms - stats.model_execution_start_ms;
  stats.gpu = engine_.gpu_memory();
  if (first_ms_.empty()) return;
  for (const double first : first_ms_) {
    stats.batch->first_token_ms.push_back(first - stats.inference_start_ms);
  }
  stats.first_token_ms = *std::min_element(first_ms_.begin(), first_ms_.end());
  stats.prompt_eval_end_ms = *std::max_element(first_ms_.begin(), first_ms_.end());
  stats.batch->generated_in_prefill =
      std::count_if(drawn_ms_.begin(), drawn_ms_.end(),
                    [&stats](double drawn) { return drawn <= stats.prompt_eval_end_ms; });
}

void Run::print_next(const Tokenizer* tokenizer) {
  for (; printed_ < answers_.size() && answers_[printed_].has_ended; ++printed_) {
    const Answer& answer = answers_[printed_];
    if (answer.ids.empty()) continue;  // cancelled before it began
    print("[" + std::to_string(printed_ + 1) + "]\n");
    Printer printer(tokenizer);
    for (const int64_t id : answer.ids) printer.token(id);
    printer.finish();
  }
}

void Run::run(llm::Stats& stats, bool is_measured, bool printed, const Tokenizer* tokenizer) {
  stats.batch.emplace();
  if (flags_.prefix_cache) stats.batch->cached_tokens = 0;
  if (engine_.info().draft_tokens > 0) stats.drafts.emplace();
  stats.inference_start_ms = stats.model_execution_start_ms = llm::now_ms();
  submit();
  for (bool is_cancelled = false; ended_ < requests_.size();) {
    step(stats);
    // Before the first measured token there are no stats that would be worth waiting for.
    if (is_measured && stats.num_generated_tokens > 0) defer_interrupt_and_termination();
    if (printed) print_next(tokenizer);
    if (!interrupted() || is_cancelled) continue;
    is_cancelled = true;
    // The last ones first: those that wait must not get the places of others.
    for (auto entry = index_.rbegin(); entry != index_.rend(); ++entry) {
      engine_.cancel(entry->first);
    }
  }
  finish(stats);
}

std::vector<std::vector<int64_t>> Run::take_ids() {
  std::vector<std::vector<int64_t>> ids;
  for (Answer& answer : answers_) ids.push_back(std::move(answer.ids));
  return ids;
}

/// Runs the requests as often as the flags say.
void run_all(AsyncEngine& engine, const Flags& f, const std::vector<Request>& requests,
             const Tokenizer* tokenizer, const llm::Stats& loaded) {
  std::vector<std::vector<int64_t>> ids;
  std::string json_lines;
  for (int i = -f.warmup; i < f.num_iters; ++i) {
    llm::Stats stats = loaded;
    Run run(engine, f, requests);
    run.run(stats, i >= 0, i == 0 && f.output_ids_path.empty(), tokenizer);
    if (i < 0) continue;
    ids = run.take_ids();
    const std::string json = stats.to_json();
    print("PyTorchObserver " + json + "\n");
    json_lines += json + "\n";
    if (i + 1 == f.num_iters || interrupted()) print(stats.to_table());
    if (const int signal = interrupted()) throw Interrupted{signal};
  }
  if (!f.output_ids_path.empty()) write_file(f.output_ids_path, to_text(ids));
  if (!f.stats_path.empty()) write_file(f.stats_path, json_lines);
}

}  // namespace

void generate_batch(const Flags& f, const Tokenizer* tokenizer) {
  const ModelInfo info = read_info(ProgramFile(f.model_path));
  const std::vector<Request> requests = read_prompts(f, tokenizer, info);
  needing_memory(f.model_path, [&] {
    const size_t most = std::min(requests.size(), static_cast<size_t>(info.max_sequences));
    llm::Stats stats;
    stats.model_load_start_ms = llm::now_ms();
    ModelOptions options = model_options(f, f.max_sequences.value_or(most));
    if (f.prefix_cache) options.snapshots = snapshots_for(options.max_sequences);
    AsyncEngine engine(f.model_path, f.data_path, {options, requests.size()});
    stats.model_load_end_ms = llm::now_ms();
    const EngineStatus status = engine.status();
    std::fprintf(stderr, "%zu sequences at once, a KV cache of %zu tokens\n", status.max_sequences,
                 status.pages * static_cast<size_t>(info.page_size));
    run_all(engine, f, requests, tokenizer, stats);
  });
}

}  // namespace et_moe

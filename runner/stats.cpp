#include "runner/stats.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <numeric>

#include "backends/json.h"

namespace et_moe::llm {
namespace {

constexpr int64_t kScalingFactorUnitsPerSecond = 1000;

double rate(int64_t tokens, double start_ms, double end_ms) {
  return tokens > 0 && end_ms > start_ms
             ? static_cast<double>(tokens) * kScalingFactorUnitsPerSecond / (end_ms - start_ms)
             : 0.0;
}

double peak_usage_mb(const GpuMemory& gpu) {
  const int64_t free =
      std::min({gpu.free_before_load, gpu.free_after_load, gpu.free_after_generate});
  return static_cast<double>(gpu.total - free) / (1024.0 * 1024.0);
}

}  // namespace

double now_ms() {
  using Milliseconds = std::chrono::duration<double, std::milli>;
  return Milliseconds(std::chrono::steady_clock::now().time_since_epoch()).count();
}

double quantile(std::vector<double> values, double part) {
  std::sort(values.begin(), values.end());
  const double place = part * static_cast<double>(values.size() - 1);
  const auto below = static_cast<size_t>(place);
  const size_t above = std::min(below + 1, values.size() - 1);
  return values[below] + (place - std::floor(place)) * (values[above] - values[below]);
}

int64_t DraftStats::accepted_tokens() const {
  return std::accumulate(accepted.begin(), accepted.end(), int64_t{0});
}

void DraftStats::add(size_t fed, size_t kept) {
  if (fed == 0) return;
  ++steps;
  tokens += static_cast<int64_t>(fed);
  accepted.resize(std::max(accepted.size(), fed));
  for (size_t i = 0; i < kept; ++i) ++accepted[i];
}

void DraftStats::add(const DraftStats& other) {
  steps += other.steps;
  tokens += other.tokens;
  accepted.resize(std::max(accepted.size(), other.accepted.size()));
  for (size_t i = 0; i < other.accepted.size(); ++i) accepted[i] += other.accepted[i];
}

double Stats::prefill_token_per_sec() const {
  return rate(num_prompt_tokens, inference_start_ms, prompt_eval_end_ms);
}

double Stats::decode_token_per_sec() const {
  const int64_t before = batch ? batch->generated_in_prefill : 1;
  return rate(num_generated_tokens - before, prompt_eval_end_ms, inference_end_ms);
}

double Stats::output_token_per_sec() const {
  return rate(num_generated_tokens, inference_start_ms, inference_end_ms);
}

std::string Stats::to_json() const {
  nlohmann::ordered_json json;
  const auto ms = [](double t) { return static_cast<int64_t>(std::llround(t)); };
  json["prefill_token_per_sec"] = prefill_token_per_sec();
  json["decode_token_per_sec"] = decode_token_per_sec();
  json["prompt_tokens"] = num_prompt_tokens;
  json["generated_tokens"] = num_generated_tokens;
  json["model_load_start_ms"] = ms(model_load_start_ms);
  json["model_load_end_ms"] = ms(model_load_end_ms);
  json["inference_start_ms"] = ms(inference_start_ms);
  json["inference_end_ms"] = ms(inference_end_ms);
  json["model_execution_start_ms"] = ms(model_execution_start_ms);
  json["model_execution_end_ms"] = ms(model_execution_end_ms);
  json["prompt_eval_end_ms"] = ms(prompt_eval_end_ms);
  json["first_token_ms"] = ms(first_token_ms);
  json["aggregate_sampling_time_ms"] = ms(aggregate_sampling_time_ms);
  json["aggregate_model_execution_time_ms"] = ms(aggregate_model_execution_time_ms);
  if (drafts) {
    json["draft_steps"] = drafts->steps;
    json["draft_tokens"] = drafts->tokens;
    json["accepted_draft_tokens"] = drafts->accepted_tokens();
    json["accepted_draft_tokens_per_position"] = drafts->accepted;
  }
  if (gpu) {
    json["gpu_total_bytes"] = gpu->total;
    json["gpu_free_before_load_bytes"] = gpu->free_before_load;
    json["gpu_free_after_load_bytes"] = gpu->free_after_load;
    json["gpu_free_after_generate_bytes"] = gpu->free_after_generate;
    json["gpu_peak_usage_mb"] = peak_usage_mb(*gpu);
  }
  if (batch) {
    json["requests"] = batch->first_token_ms.size();
    if (batch->cached_tokens) json["cached_prompt_tokens"] = *batch->cached_tokens;
    json["output_token_per_sec"] = output_token_per_sec();
    for (const auto& [name, times] : {std::pair("time_to_first_token_ms", &batch->first_token_ms),
                                      {"time_between_tokens_ms", &batch->between_tokens_ms}}) {
      for (const auto& [suffix, part] : {std::pair("_median", 0.5), {"_p99", 0.99}}) {
        auto& value = json[std::string(name) + suffix];  // null where there are none
        if (!times->empty()) value = quantile(*times, part);
      }
    }
  }
  json["SCALING_FACTOR_UNITS_PER_SECOND"] = kScalingFactorUnitsPerSecond;
  return to_text(json);
}

std::string Stats::to_table() const {
  std::string table;
  const auto row = [&table](const char* name, const char* format, double value, const char* unit) {
    char text[128];
    char number[48];
    std::snprintf(number, sizeof number, format, value);
    std::snprintf(text, sizeof text, "  %-22s %12s%s%s\n", name, number, *unit ? " " : "", unit);
    table += text;
  };
  const auto quantiles = [&row](const char* name, const std::vector<double>& times,
                                const std::string& what) {
    if (times.empty()) return;
    row(name, "%.1f", quantile(times, 0.5), ("ms, median" + what).c_str());
    row("", "%.1f", quantile(times, 0.99), ("ms, 99th percentile" + what).c_str());
  };
  if (batch) row("Requests", "%.0f", static_cast<double>(batch->first_token_ms.size()), "");
  row("Prompt", "%.0f", static_cast<double>(num_prompt_tokens), "tokens");
  if (batch && batch->cached_tokens) {
    row("From prefix cache", "%.0f", static_cast<double>(*batch->cached_tokens), "tokens");
  }
  row("Generated", "%.0f", static_cast<double>(num_generated_tokens), "tokens");
  row("Model load", "%.1f", model_load_end_ms - model_load_start_ms, "ms");
  if (batch) {
    row("Output", "%.1f", output_token_per_sec(), "tokens/s");
    quantiles("Time to first token", batch->first_token_ms, "");
    quantiles("Time between tokens", batch->between_tokens_ms,
              drafts ? " (tokens of a step share its time)" : "");
  } else {
    row("Prefill", "%.1f", prompt_eval_end_ms - inference_start_ms, "ms");
    row("", "%.1f", prefill_token_per_sec(), "tokens/s");
    row("Time to first token", "%.1f", first_token_ms - inference_start_ms, "ms");
    row("Decode", "%.1f", inference_end_ms - prompt_eval_end_ms, "ms");
    row("", "%.1f", decode_token_per_sec(), "tokens/s");
  }
  if (drafts) {
    row("Drafts", "%.0f", static_cast<double>(drafts->tokens), "tokens");
    row("Accepted", "%.0f", static_cast<double>(drafts->accepted_tokens()), "tokens");
    for (size_t i = 0; i < drafts->accepted.size(); ++i) {
      const double share =
          100 * static_cast<double>(drafts->accepted[i]) / static_cast<double>(drafts->steps);
      row("", "%.1f", share, i == 0 ? "% of first drafts" : i == 1 ? "% of first two" : "% of all");
    }
  }
  row("Total", "%.1f", inference_end_ms - inference_start_ms, "ms");
  if (gpu) row("Peak GPU memory", "%.1f", peak_usage_mb(*gpu), "MiB");
  return table;
}

}  // namespace et_moe::llm

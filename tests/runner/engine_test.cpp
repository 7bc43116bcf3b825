// Tests of stats and seals, which need no program.
#include "runner/engine.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>

#include "backends/json.h"
#include "runner/files.h"
#include "runner/sealed_file.h"
#include "runner/stats.h"

namespace et_moe {
namespace {

std::string temporary_folder() {
  std::string name = ::testing::TempDir() + "et_moe_XXXXXX";
  return mkdtemp(name.data());
}

llm::Stats example() {
  llm::Stats stats;
  stats.model_load_start_ms = 1000;
  stats.model_load_end_ms = 1250;
  stats.inference_start_ms = 2000;
  stats.model_execution_start_ms = 2001;
  stats.prompt_eval_end_ms = stats.first_token_ms = 2100;
  stats.inference_end_ms = stats.model_execution_end_ms = 3100;
  stats.aggregate_model_execution_time_ms = 1090;
  stats.num_prompt_tokens = 50;
  stats.num_generated_tokens = 101;
  return stats;
}

TEST(Stats, RatesCountPrefillAndTheTokensAfterTheFirst) {
  EXPECT_DOUBLE_EQ(example().prefill_token_per_sec(), 500);
  EXPECT_DOUBLE_EQ(example().decode_token_per_sec(), 100);
}

TEST(Stats, OfABatchHaveQuantilesOfWhatEachRequestWaitsFor) {
  llm::Stats stats = example();
  stats.batch.emplace();
  stats.batch->generated_in_prefill = 51;
  for (int i = 100; i >= 0; --i) stats.batch->first_token_ms.push_back(i);
  auto json = parse_json(stats.to_json());
  EXPECT_EQ(json["requests"], 101);
  EXPECT_EQ(json["time_to_first_token_ms_median"], 50.0);
  EXPECT_EQ(json["time_to_first_token_ms_p99"], 99.0);
  EXPECT_TRUE(json["time_between_tokens_ms_p99"].is_null());
  EXPECT_EQ(json["decode_token_per_sec"], 50.0);
  EXPECT_NEAR(json["output_token_per_sec"], 101 / 1.1, 1e-9);
  EXPECT_EQ(stats.to_table().find("between"), std::string::npos);
  stats.batch->between_tokens_ms = {4, 1, 2, 3};
  json = parse_json(stats.to_json());
  EXPECT_EQ(json["time_between_tokens_ms_median"], 2.5);
  EXPECT_NEAR(json["time_between_tokens_ms_p99"], 3.97, 1e-9);
  const std::string shared = "2.5 ms, median (tokens of a step share its time)\n";
  EXPECT_EQ(stats.to_table().find(shared), std::string::npos);
  stats.drafts.emplace();
  EXPECT_NE(stats.to_table().find(shared), std::string::npos);
}

TEST(Stats, RatesOfNothingAreZero) {
  EXPECT_EQ(llm::Stats{}.prefill_token_per_sec(), 0);
  llm::Stats one = example();
  one.num_generated_tokens = 1;
  EXPECT_EQ(one.decode_token_per_sec(), 0);
}

TEST(Stats, JsonHasTheKeysOfExecuTorch) {
  const auto json = parse_json(example().to_json());
  const std::vector<std::string> keys = {"prefill_token_per_sec",
                                         "decode_token_per_sec",
                                         "prompt_tokens",
                                         "generated_tokens",
                                         "model_load_start_ms",
                                         "model_load_end_ms",
                                         "inference_start_ms",
                                         "inference_end_ms",
                                         "model_execution_start_ms",
                                         "model_execution_end_ms",
                                         "prompt_eval_end_ms",
                                         "first_token_ms",
                                         "aggregate_sampling_time_ms",
                                         "aggregate_model_execution_time_ms",
                                         "SCALING_FACTOR_UNITS_PER_SECOND"};
  EXPECT_EQ(json.size(), keys.size());
  for (const auto& key : keys) EXPECT_TRUE(json.contains(key)) << key;
  EXPECT_EQ(json["inference_end_ms"], 3100);
}

TEST(Stats, GpuKeysAppearOnlyWithAGpu) {
  llm::Stats stats = example();
  stats.gpu = llm::GpuMemory{100 << 20, 90 << 20, 40 << 20, 30 << 20};
  const auto json = parse_json(stats.to_json());
  EXPECT_EQ(json.size(), 20u);
  EXPECT_EQ(json["gpu_free_after_load_bytes"], 40 << 20);
  EXPECT_DOUBLE_EQ(json["gpu_peak_usage_mb"], 70);
}

TEST(Stats, DraftsAreCountedByPosition) {
  llm::Stats stats = example();
  stats.drafts.emplace();
  EXPECT_EQ(parse_json(stats.to_json())["draft_tokens"], 0);
  EXPECT_EQ(stats.to_table().find("% of"), std::string::npos);
  stats.drafts->add(0, 0);  // a call without drafts
  stats.drafts->add(2, 2);
  stats.drafts->add(2, 0);
  llm::DraftStats others;
  others.add(3, 1);
  others.add(1, 1);
  stats.drafts->add(others);
  const auto json = parse_json(stats.to_json());
  EXPECT_EQ(json["draft_steps"], 4);
  EXPECT_EQ(json["draft_tokens"], 8);
  EXPECT_EQ(json["accepted_draft_tokens"], 4);
  EXPECT_EQ(json["accepted_draft_tokens_per_position"], std::vector<int>({3, 1, 0}));
  EXPECT_NE(stats.to_table().find("75.0 % of first drafts"), std::string::npos);
}

TEST(Engine, LogProbabilityIsLogSoftmax) {
  const float logits[] = {1000.0f, 999.0f, 998.0f};
  const double sum = 1 + std::exp(-1.0) + std::exp(-2.0);
  EXPECT_NEAR(log_probability(logits, 3, 1), -1 - std::log(sum), 1e-12);
}

TEST(SealedFile, AnyChangeOfACoveredByteIsNoticed) {
  const std::string path = temporary_folder() + "/sealed";
  // "hello" and its XXH3 64-bit hash, as xxhsum -H3 prints it.
  std::string content("hello");
  content += std::string("ETMOESUM\x05\0\0\0\0\0\0\0", 16);
  const uint64_t hash = 0x9555e8555c62dcfdULL;
  content.append(reinterpret_cast<const char*>(&hash), 8);
  write_file(path, content);
  EXPECT_EQ(check_seal(MappedFile(path), path), 5u);
  for (size_t i = 0; i < content.size(); ++i) {
    std::string changed = content;
    changed[i] ^= 4;
    write_file(path, changed);
    EXPECT_THROW(check_seal(MappedFile(path), path), std::runtime_error) << i;
    write_file(path, content.substr(0, i) + (i ? "" : " "));
    EXPECT_THROW(check_seal(MappedFile(path), path), std::runtime_error) << i;
  }
}

}  // namespace
}  // namespace et_moe

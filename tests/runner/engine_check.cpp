// Drives an engine by a script, for tests/runner/test_engine.py and tests/fake_cuda.
//
// Usage: engine_check MODEL.pte MODEL.ptd [--cuda_graph]. Each line that it reads is a JSON object:
//   {"generate": IDS} or {"append": IDS}, perhaps with "max_new_tokens", "temperature", "seed", and
//     "stop_after": N, with which the callback ends the generation at its N-th token;
//   {"score": IDS}, perhaps with "throw_at": N, at which token the callback throws;
// and is answered with one: {"ids": [...], "finish": "stop" | "length" | "callback"},
// {"logprobs": [...]} or {"error": "..."}.

#include <iostream>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "backends/json.h"
#include "runner/engine.h"

namespace {

using Ids = std::vector<int64_t>;
using Json = nlohmann::json;

const char* name_of(et_moe::FinishReason reason) {
  switch (reason) {
    case et_moe::FinishReason::kStop:
      return "stop";
    case et_moe::FinishReason::kLength:
      return "length";
    default:
      return "callback";
  }
}

Json generate(et_moe::Engine& engine, const Json& command) {
  et_moe::GenerationConfig config;
  config.max_new_tokens = command.value("max_new_tokens", config.max_new_tokens);
  config.sampling.temperature = command.value("temperature", 0.0f);
  config.sampling.seed = command.value("seed", int64_t{0});
  size_t left = command.value("stop_after", size_t{0});
  et_moe::llm::Stats stats;
  Ids seen;
  const auto on_token = [&](int64_t id) {
    seen.push_back(id);
    return left != 1 && (left == 0 || --left > 0);
  };
  const bool append = command.contains("append");
  const Ids ids = command.at(append ? "append" : "generate").get<Ids>();
  const auto generation = append ? engine.append(ids, config, stats, on_token)
                                 : engine.generate(ids, config, stats, on_token);
  if (seen != generation.ids) throw std::logic_error("the callback saw other ids");
  if (stats.num_prompt_tokens != static_cast<int64_t>(ids.size()) ||
      stats.num_generated_tokens != static_cast<int64_t>(seen.size())) {
    throw std::logic_error("the stats count other ids");
  }
  return {{"ids", generation.ids}, {"finish", name_of(generation.finish_reason)}};
}

Json score(et_moe::Engine& engine, const Json& command) {
  const Ids ids = command.at("score").get<Ids>();
  const size_t throw_at = command.value("throw_at", size_t{0});
  Json logprobs = Json::array();
  const int64_t size = engine.model().info().vocab_size;
  engine.score(ids, [&](size_t i, const float* logits) {
    if (i == throw_at) throw std::runtime_error("thrown");
    logprobs.push_back(et_moe::log_probability(logits, size, ids[i]));
  });
  return {{"logprobs", logprobs}};
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) {
    std::cerr << "usage: engine_check MODEL.pte MODEL.ptd [--cuda_graph]\n";
    return 1;
  }
  try {
    et_moe::ModelOptions options;
    options.device.cuda_graph = argc > 3 && std::string(argv[3]) == "--cuda_graph";
    et_moe::Engine engine(std::make_shared<et_moe::Model>(argv[1], argv[2], options));
    for (std::string line; std::getline(std::cin, line);) {
      const Json command = et_moe::parse_json(line);
      Json answer;
      try {
        answer = command.contains("score") ? score(engine, command) : generate(engine, command);
      } catch (const std::runtime_error& e) {
        answer = {{"error", e.what()}};
      }
      std::cout << et_moe::to_text(answer) << std::endl;
    }
  } catch (const std::exception& e) {
    std::cerr << "error: " << e.what() << "\n";
    return 1;
  }
  return 0;
}

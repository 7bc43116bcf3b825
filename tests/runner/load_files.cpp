// Loads files with the runner's own classes: test_mutations.py, test_file_fuzz.py and
// tests/fake_cuda/test_delegate_fuzz.py feed it damaged ones.
//
// Usage: load_files MODEL.pte MODEL.ptd, both undamaged. Reads lines "pte PATH", "ptd PATH" or
// "ids PATH" and answers each with one line: "ok" and token ids (of an ids file those it holds,
// otherwise what the program generates), or "error: " and the message.

#include <algorithm>
#include <iostream>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "runner/engine.h"
#include "runner/files.h"

namespace {

std::vector<int64_t> generate(const std::string& pte, const std::string& ptd) {
  et_moe::Engine engine(std::make_shared<et_moe::Model>(pte, ptd));
  et_moe::GenerationConfig config;
  config.max_new_tokens = 3;
  et_moe::llm::Stats stats;
  std::vector<int64_t> prompt{1, 2, 3};
  // A context may be shorter, which is no fault of the program's.
  const auto context = static_cast<size_t>(engine.model().info().max_seq_len);
  prompt.resize(std::min(prompt.size(), context));
  return engine.generate(prompt, config, stats, [](int64_t) { return true; }).ids;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) {
    std::cerr << "usage: load_files MODEL.pte MODEL.ptd\n";
    return 1;
  }
  for (std::string line; std::getline(std::cin, line);) {
    const std::string kind = line.substr(0, 3), path = line.substr(4);
    std::string answer = "ok";
    try {
      const auto ids = kind == "pte"   ? generate(path, argv[2])
                       : kind == "ptd" ? generate(argv[1], path)
                                       : et_moe::read_ids(path);
      for (int64_t id : ids) answer += " " + std::to_string(id);
    } catch (const std::exception& e) {
      answer = std::string("error: ") + e.what();
      std::replace(answer.begin(), answer.end(), '\n', ' ');
    }
    std::cout << answer << std::endl;
  }
  return 0;
}

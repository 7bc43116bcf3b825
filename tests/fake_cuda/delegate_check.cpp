// Drives CUDA programs over the fake driver, in ways that the runner does not: tests/fake_cuda/
// test_delegate.py runs it. It exits with 1 and says why if something is wrong.
//
//   delegate_check sessions MODEL.pte MODEL.ptd GRAPH TOKENS PROMPT...
//     Two sessions on one load of the weights take turns, token by token; each PROMPT is a JSON
//     list of ids, and a JSON list of TOKENS ids is printed for each. GRAPH is 0 or 1.
//   delegate_check ahead MODEL.pte MODEL.ptd GRAPH TOKENS PROMPT
//     Generates twice with a call on its way beyond the last token, which refuses what it is not.
//     The first time another session's call comes first, so that it has no logits, and it gives way
//     to a reset; the second time further tokens follow it. Prints the ids of both.
//   delegate_check faults MODEL.pte MODEL.ptd GRAPH STEP
//     Loads and generates, once for every STEP-th call of CUDA with that call failing; with GRAPH
//     only of those behind loading, which does not know of graphs. Each failure must be an error
//     that names a CUDA error (a failed capture: a message), leave nothing behind, and not keep the
//     same process from doing it all again, which is tried after every fourth of them. Prints a
//     line per failure.

#include <dlfcn.h>

#include <cstdint>
#include <cstring>
#include <iostream>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "backends/json.h"
#include "runner/engine.h"

namespace {

using Ids = std::vector<int64_t>;

template <typename Function>
Function* fake(const char* name) {
  void* function = dlsym(RTLD_DEFAULT, name);
  if (!function) throw std::runtime_error("not over the fake driver: set LD_LIBRARY_PATH to it");
  return reinterpret_cast<Function*>(function);
}

void no_violations() {
  char text[512];
  if (fake<bool(char*, size_t)>("fake_cuda_take_violation")(text, sizeof text)) {
    throw std::runtime_error(std::string("violation: ") + text);
  }
}

constexpr size_t kSequences = 6;  // at once

std::shared_ptr<et_moe::Model> load(char** argv) {
  et_moe::ModelOptions options;
  options.device.cuda_graph = std::string(argv[4]) == "1";
  options.max_sequences = kSequences;
  return std::make_shared<et_moe::Model>(argv[2], argv[3], options);
}

void sessions(int argc, char** argv) {
  const auto model = load(argv);
  const size_t count = std::stoul(argv[5]);
  const size_t most = static_cast<size_t>(model->info().max_prefill_tokens);
  struct Sequence {
    std::unique_ptr<et_moe::Session> session;
    Ids ids;  // the ids to feed next
    Ids generated;
  };
  std::vector<Sequence> sequences;
  for (int i = 6; i < argc; ++i) {
    sequences.push_back({model->new_session(), et_moe::parse_json(argv[i]).get<Ids>(), {}});
  }
  for (bool busy = true; busy;) {
    busy = false;
    for (Sequence& s : sequences) {
      if (s.generated.size() == count) continue;
      const size_t piece = std::min(most, s.ids.size());
      const int64_t token = model->run(*s.session, s.ids.data(), piece, {}).tokens[0];
      s.ids.erase(s.ids.begin(), s.ids.begin() + static_cast<int64_t>(piece));
      if (s.ids.empty()) {
        s.generated.push_back(token);
        s.ids = {token};
      }
      busy = true;
    }
  }
  for (const Sequence& s : sequences) std::cout << et_moe::to_text(s.generated) << "\n";
}

/// Throws std::logic_error unless `body` throws a std::runtime_error with this text.
template <typename Body>
void expect_error(const std::string& text, const Body& body) {
  try {
    body();
  } catch (const std::runtime_error& e) {
    if (std::strstr(e.what(), text.c_str())) return;
    throw std::logic_error("an error without \"" + text + "\": " + e.what());
  }
  throw std::logic_error("no error with \"" + text + "\"");
}

void ahead(char** argv) {
  const auto model = load(argv);
  const auto session = model->new_session();
  const int64_t count = std::stol(argv[5]);
  const Ids prompt = et_moe::parse_json(argv[6]).get<Ids>();
  for (int sequence = 0; sequence < 2; ++sequence) {
    model->reset(*session);
    const auto run = [&](const Ids& ids, const et_moe::Sampling& sampling = {}) {
      et_moe::CallOptions options;
      options.run_ahead = true;
      return model->run(*session, ids.data(), ids.size(), sampling, options).tokens[0];
    };
    Ids generated = {run(prompt)};
    while (static_cast<int64_t>(generated.size()) < count) {
      generated.push_back(run({generated.back()}));
    }
    const int64_t last = generated.back();
    et_moe::Sampling other;
    other.seed = 1;
    const std::vector<std::pair<Ids, et_moe::Sampling>> refused = {
        {{last ^ 1}, {}}, {{last ^ 1, last}, {}}, {prompt, {}}, {{last}, other}};
    for (const auto& [ids, sampling] : refused) {
      expect_error("reset it", [&] { run(ids, sampling); });
    }
    const int64_t before = session->position();
    if (sequence == 0) {
      const auto another = model->new_session();
      model->run(*another, prompt.data(), prompt.size(), {});
      et_moe::CallOptions logits;
      logits.logits = true;
      const et_moe::Step step = model->run(*session, &last, 1, {}, logits);
      if (step.logits) throw std::logic_error("logits of a call that ran ahead and is gone");
      if (session->position() != before + 1) throw std::logic_error("the token was fed twice");
    }
    if (sequence == 1) {
      generated.push_back(run({last, prompt.front()}, other));
      if (session->position() != before + 2) throw std::logic_error("a token was fed twice");
    }
    std::cout << et_moe::to_text(generated) << "\n";
  }
}

/// `loaded`, if given, is set to the number of calls when all is loaded.
Ids generate(char** argv, uint64_t* loaded = nullptr) {
  et_moe::Engine engine(load(argv));
  if (loaded) *loaded = fake<uint64_t()>("fake_cuda_calls")();
  et_moe::GenerationConfig config;
  config.max_new_tokens = 4;  // enough for a first run, a warm-up, a capture and a replay
  et_moe::llm::Stats stats;
  Ids ids;
  const Ids few = {1, 2, 3}, many(18, 5);  // these lengths use the code of two ranges
  for (const Ids& prompt : {few, few, many}) {
    const Ids more = engine.generate(prompt, config, stats, [](int64_t) { return true; }).ids;
    ids.insert(ids.end(), more.begin(), more.end());
  }
  return ids;
}

void nothing_left(const std::string& when) {
  const size_t live = fake<size_t()>("fake_cuda_live")();
  if (live != 0)
    throw std::runtime_error(std::to_string(live) + " things are not released " + when);
}

void faults(char** argv) {
  const auto calls = fake<uint64_t()>("fake_cuda_calls");
  const auto fail = fake<void(const char*, uint64_t, int)>("fake_cuda_fail");
  const uint64_t begin = calls();
  uint64_t loaded = 0;
  const Ids expected = generate(argv, &loaded);
  const uint64_t count = calls() - begin, step = std::stoul(argv[5]);
  const bool with_graphs = std::string(argv[4]) == "1";
  no_violations();
  nothing_left("after a good run");
  if (count < 100) throw std::runtime_error("only " + std::to_string(count) + " calls");
  uint64_t tried = 0;
  for (uint64_t n = with_graphs ? loaded - begin + 1 : 1; n <= count; n += step) {
    const std::string when = "after call " + std::to_string(n) + " failed";
    fail(nullptr, n, 0);
    try {
      if (generate(argv) != expected) throw std::logic_error("other tokens " + when);
      std::cout << n << ": tolerated\n";
    } catch (const std::runtime_error& e) {
      std::cout << n << ": " << e.what() << "\n";
      if (!std::strstr(e.what(), "cudaError") && !std::strstr(e.what(), "CUDA_ERROR_")) {
        throw std::logic_error("no name of a CUDA error " + when + ": " + e.what());
      }
    }
    fail(nullptr, 0, 0);
    nothing_left(when);
    no_violations();
    if (++tried % 4 == 0 && generate(argv) != expected) {
      throw std::logic_error("the next run differs " + when);
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  const std::string command = argc >= 6 ? argv[1] : "";
  try {
    if (command == "sessions") {
      sessions(argc, argv);
    } else if (command == "ahead" && argc == 7) {
      ahead(argv);
    } else if (command == "faults") {
      faults(argv);
    } else {
      throw std::runtime_error("usage: see the top of delegate_check.cpp");
    }
  } catch (const std::exception& e) {
    std::cerr << "delegate_check: " << e.what() << "\n";
    return 1;
  }
  return 0;
}

// Serving while calls of CUDA fail, for async_engine_check over the fake driver.
#pragma once

#include <dlfcn.h>

#include <cstring>
#include <functional>
#include <iostream>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "tests/runner/async_engine_client.h"

namespace et_moe {

template <typename Function>
Function* fake(const char* name) {
  void* function = dlsym(RTLD_DEFAULT, name);
  if (!function) throw std::runtime_error("not over the fake driver: set LD_LIBRARY_PATH to it");
  return reinterpret_cast<Function*>(function);
}

/// Serves three requests at once; gives their tokens, and the errors that are no cancellations.
inline std::pair<std::vector<Ids>, std::vector<std::string>> serve_three(Client& client) {
  std::vector<uint64_t> ids;
  std::vector<Ids> tokens;
  std::vector<std::string> errors;
  for (const Ids& prompt : {Ids{1, 2, 3}, Ids{4}, Ids(20, 5)}) {
    ids.push_back(client.engine().submit(greedy(prompt, 4)));
  }
  for (const uint64_t id : ids) {
    const Event& event = client.wait(id);
    tokens.push_back(event.token_ids);
    if (event.end == RequestEnd::kError) errors.push_back(event.error);
  }
  return {tokens, errors};
}

/// Loads and serves while a call fails; prints what became of it. Returns the engine, unless it
/// could not be loaded or is broken.
inline std::unique_ptr<Client> serve_with_fault(
    const std::function<std::unique_ptr<Client>()>& make, const std::vector<Ids>& expected) {
  std::unique_ptr<Client> client;
  std::string error, outcome = "refused";
  try {
    client = make();
    const auto [tokens, errors] = serve_three(*client);
    expect(!errors.empty() || tokens == expected, "the same tokens after a tolerated failure");
    outcome = errors.empty() ? "tolerated" : "failed";
    error = errors.empty() ? "" : errors[0];
  } catch (const std::runtime_error& e) {
    error = e.what();
  }
  const bool named = std::strstr(error.c_str(), "cudaError") || std::strstr(error.c_str(), "CUDA_");
  expect(error.empty() || named, "the name of a CUDA error: " + error);
  if (client && client->engine().status().broken) {
    outcome = "broken";
    client.reset();
  }
  std::cout << outcome << " " << error << "\n";
  return client;
}

inline void faults(const std::function<std::unique_ptr<Client>()>& make, uint64_t step) {
  const auto calls = fake<uint64_t()>("fake_cuda_calls");
  const auto fail = fake<void(const char*, uint64_t, int)>("fake_cuda_fail");
  const uint64_t begin = calls();
  const auto [expected, none] = serve_three(*make());
  expect(none.empty(), "no error without a fault");
  const uint64_t count = calls() - begin;
  for (uint64_t n = 1; n <= count; n += step) {
    fail(nullptr, n, 0);
    auto client = serve_with_fault(make, expected);
    fail(nullptr, 0, 0);
    if (client) {
      expect(serve_three(*client).first == expected, "the same tokens after the fault");
      client->expect_idle();
    }
    client.reset();
    expect(fake<size_t()>("fake_cuda_live")() == 0, "everything released");
  }
}

}  // namespace et_moe

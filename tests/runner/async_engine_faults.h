// Serving while calls of CUDA fail, for async_engine_check over the fake driver.
#pragma once

#include <dlfcn.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <iostream>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "backends/json.h"
#include "tests/runner/async_engine_client.h"

namespace et_moe {

template <typename Function>
Function* fake(const char* name) {
  void* function = dlsym(RTLD_DEFAULT, name);
  if (!function) throw std::runtime_error("not over the fake driver: set LD_LIBRARY_PATH to it");
  return reinterpret_cast<Function*>(function);
}

/// Serves three requests at once; gives what became of each.
inline std::vector<Event> serve_three(Client& client) {
  std::vector<Request> requests;
  // The last one fills a page, which the prefix cache keeps.
  for (const Ids& prompt : {Ids{1, 2, 3}, Ids{4}, Ids(66, 5)}) {
    requests.push_back(greedy(prompt, 4));
  }
  // Queued together: the first may break the engine, which refuses what comes after.
  std::vector<Event> served;
  for (const uint64_t id : client.engine().submit(std::move(requests))) {
    served.push_back(client.wait(id));
  }
  return served;
}

/// Whether an event is an error that names one of CUDA. Throws if it is another.
inline bool is_fault(const Event& event) {
  if (event.end != RequestEnd::kError) return false;
  const std::string& text = event.error;
  expect(std::strstr(text.c_str(), "cudaError") || std::strstr(text.c_str(), "CUDA_"),
         "the name of a CUDA error: " + text);
  return true;
}

/// Throws unless those that a fault did not hit ended as they do without one, and the others drew
/// the same up to there. Gives the errors.
inline std::vector<std::string> check_served(const std::vector<Event>& served,
                                             const std::vector<Event>& expected) {
  std::vector<std::string> errors;
  for (size_t i = 0; i < served.size(); ++i) {
    const Ids &tokens = served[i].token_ids, &all = expected[i].token_ids;
    if (is_fault(served[i])) {
      errors.push_back(served[i].error);
      expect(tokens.size() <= all.size() && std::equal(tokens.begin(), tokens.end(), all.begin()),
             "the same tokens up to a failure");
    } else {
      expect(served[i].end == RequestEnd::kLength && tokens == all, "the same tokens beside one");
    }
  }
  return errors;
}

/// Throws unless a broken engine says so to those who ask.
inline void expect_refusal(Client& client) {
  const std::string broken = *client.engine().status().broken;
  try {
    client.engine().submit(greedy({1}, 1));
  } catch (const EngineBroken& e) {
    return expect(e.what() == broken, "why it is broken: " + broken);
  }
  throw std::runtime_error("expected a broken engine to refuse");
}

using MakeClient = std::function<std::unique_ptr<Client>()>;

/// Loads and serves while a call fails; prints what became of it. Returns the engine, unless it
/// could not be loaded or is broken. `expected`: if it is known.
inline std::unique_ptr<Client> serve_with_fault(const MakeClient& make,
                                                const std::vector<Event>& expected) {
  std::unique_ptr<Client> client;
  try {
    client = make();
  } catch (const std::runtime_error& e) {
    Event event{};
    event.end = RequestEnd::kError;
    event.error = e.what();
    is_fault(event);
    std::cout << "refused " << e.what() << "\n";
    return nullptr;
  }
  const std::vector<Event> served = serve_three(*client);
  const std::vector<std::string> errors =
      check_served(served, expected.empty() ? served : expected);
  if (client->engine().status().broken) {
    expect_refusal(*client);
    std::cout << "broken " << errors.at(0) << "\n";
    return nullptr;
  }
  std::cout << (errors.empty() ? "tolerated" : "failed " + errors[0]) << "\n";
  return client;
}

/// Fails the calls `first`, from 1, `first` + `step` and so on, one after the other.
inline void faults(const MakeClient& make, uint64_t step, uint64_t first) {
  const auto calls = fake<uint64_t()>("fake_cuda_calls");
  const auto fail = fake<void(const char*, uint64_t, int)>("fake_cuda_fail");
  const uint64_t begin = calls();
  const std::vector<Event> expected = serve_three(*make());
  expect(check_served(expected, expected).empty(), "no error without a fault");
  const uint64_t count = calls() - begin;
  for (uint64_t n = first; n <= count; n += step) {
    fail(nullptr, n, 0);
    auto client = serve_with_fault(make, expected);
    fail(nullptr, 0, 0);
    if (client) {
      expect(check_served(serve_three(*client), expected).empty(), "no error after the fault");
      client->expect_idle();
    }
    client.reset();
    expect(fake<size_t()>("fake_cuda_live")() == 0, "everything released");
  }
}

/// What `survivors` serves: prompts, and how many tokens each of them draws.
inline std::vector<Request> survivors() {
  return {greedy({9}, 2), greedy({5}, 4), greedy({7}, 5), greedy({4}, 5)};
}

/// The requests of `survivors`, one after the other.
inline void alone(Client& client) {
  for (const Request& request : survivors()) {
    std::cout << to_text(client.wait(client.engine().submit(request)).token_ids) << "\n";
  }
}

/// Calls fail while a request waits for its mask and others decode; prints the tokens of all but
/// the one whose prompt fails.
inline void survive(Client& client) {
  const auto fail = fake<void(const char*, uint64_t, int)>("fake_cuda_fail");
  const std::vector<Request> requests = survivors();
  const uint64_t held = client.submit_guided(requests[0].prompt_ids, 2);
  const uint64_t decodes = client.engine().submit(requests[1]);
  client.wait(decodes, 1);
  fail("cudaStreamSynchronize", 1, 0);  // a decode call waits for an event
  expect(is_fault(client.wait(client.engine().submit(greedy({7, 3}, 1)))), "a prompt that fails");
  expect(client.wait(decodes).end == RequestEnd::kLength, "the end of the one beside it");
  std::vector<uint64_t> batch;
  for (size_t i : {2, 3}) batch.push_back(client.engine().submit(requests[i]));
  for (const uint64_t id : batch) client.wait(id, 1);
  fail("cudaEventSynchronize", 1, 0);
  for (const uint64_t id : batch) expect(is_fault(client.wait(id)), "a batch that fails");
  for (size_t i = 1; i <= 2; ++i) {
    client.engine().allow(held, client.all_tokens());
    client.wait(held, i);
  }
  expect(!client.engine().status().broken, "an engine that goes on");
  for (const uint64_t id : {held, decodes, batch[0], batch[1]}) {
    std::cout << to_text(client.wait(id).token_ids) << "\n";
  }
  client.expect_idle();
}

}  // namespace et_moe

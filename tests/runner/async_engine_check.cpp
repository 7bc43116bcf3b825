// Drives an AsyncEngine from several sides and checks what comes of it, for
// tests/runner/test_async_engine.py and tests/fake_cuda. It exits with 1 and says why if something
// is wrong; a request of which nothing is heard for five minutes is wrong.
//
//   async_engine_check MODEL.pte MODEL.ptd GRAPH SEQUENCES[/PAGES] COMMAND
//     GRAPH: 0 or 1, whether with CUDA graphs. SEQUENCES: how many are served at once. PAGES: of
//     the KV cache, if fewer than these take.
//   together N  N random requests of all kinds give the tokens together that each gives alone.
//   random N[/MOST] ROUNDS [PTE PTD]  The same N come at random moments and in any order, and some
//               are cancelled. They give the tokens that each gives alone without a prefix cache,
//               or that the program PTE gives so. MOST: tokens of a prompt and of an answer. Prints
//               an object: cached_tokens, cancelled and preemptions.
//   plain       The same without prefix cache.
//   prefix N [PTE PTD]  N prompts share three quarters of the context, or a page, and differ after,
//               and each is followed by a second turn. They give the tokens that they, or another
//               program, give without a prefix cache, and all but the first are given what they
//               share.
//   grow [PTE PTD]  Two prompts of a page are answered up to the end of the context. Their pages,
//               PAGES, must not be enough for both: the second is put back. They give the tokens
//               that they, or another program, give alone.
//   pieces N    N long prompts give the tokens beside others, where they are fed in shorter pieces,
//               that each gives alone.
//   soak N      N requests of 32 kinds in a row, 64 of them in flight, some cancelled: their tokens
//               are those they give alone, and after the first tenth memory does not grow.
//   cancel      Requests are cancelled before, between and after their tokens while others run.
//   close       The engine is closed while requests wait, run and have just ended.
//   faults STEP FIRST  Over the fake driver: loads and serves three requests, once for every
//               STEP-th call of CUDA, beginning with the FIRST, with that call failing. Each
//               request must end, those that it does not hit as they do without it, and an engine
//               that is not broken serves again. Prints a line each: refused (to load), failed (a
//               request), broken or tolerated, and the error.
//   fault       The same once, with the fault of the environment; a broken engine must refuse.
//   survive     Over the fake driver: a prompt fails, then a batch, while other requests are at
//               several points. Prints the tokens of all but the prompt. alone: those of the same
//               requests, one after the other.

#include <malloc.h>

#include <algorithm>
#include <cstring>
#include <deque>
#include <functional>
#include <iostream>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "tests/runner/async_engine_client.h"
#include "tests/runner/async_engine_faults.h"
#include "tests/runner/async_engine_pages.h"

#ifdef __SANITIZE_ADDRESS__
// The C++ library inside a program's code has a pool of 71 KB for exceptions, which it loses when
// it is unloaded. So nothing is unloaded here, and the leak is not reported.
extern "C" int dlclose(void*) noexcept { return 0; }
#endif

namespace {

using et_moe::Client;
using et_moe::Event;
using et_moe::expect;
using et_moe::faults;
using et_moe::greedy;
using et_moe::Ids;
using et_moe::Request;
using et_moe::RequestEnd;

constexpr int64_t kMost = 80;  // tokens of a random prompt

/// A request of any kind but a guided one. `most`: tokens of its prompt, and of its answer.
Request random_request(std::mt19937& random, const et_moe::ModelInfo& info, int64_t most) {
  const auto below = [&random](int64_t n) { return static_cast<int64_t>(random() % n); };
  Ids prompt(static_cast<size_t>(1 + below(std::min(info.max_seq_len - 8, most))));
  for (int64_t& id : prompt) id = below(info.vocab_size);
  // Some begin alike, with a page and two tokens.
  if (const int64_t alike = info.page_size + 2;
      most >= alike && alike + 8 < info.max_seq_len && below(4) == 0) {
    prompt.insert(prompt.begin(), static_cast<size_t>(alike), 1);
    prompt.resize(std::min(prompt.size(), static_cast<size_t>(info.max_seq_len - 8)));
  }
  Request request = greedy(prompt, 1 + below(std::min({info.max_seq_len / 4, int64_t{30}, most})));
  auto& p = request.params;
  // Some take more pages than they begin with.
  if (most >= info.page_size && below(6) == 0) p.max_tokens = info.max_seq_len;
  p.ignore_eos = below(2) == 0;
  if (below(2))
    p.sampling = {0.5f + static_cast<float>(below(20)) / 10, below(3) * 20, 0.9f, below(99)};
  if (below(4) == 0) p.min_p = 0.05f;
  if (below(4) == 0) p.repetition_penalty = 1.3f;
  if (below(4) == 0) p.frequency_penalty = 0.5f;
  if (below(4) == 0) p.logit_bias = {{below(info.vocab_size), 5.0f}};
  if (below(4) == 0) p.logprobs = below(3);
  if (below(4) == 0) p.prompt_logprobs = below(3);
  return request;
}

bool same(const Event& a, const Event& b) {
  const auto equal = [](const auto& x, const auto& y) {
    return std::equal(x.begin(), x.end(), y.begin(), y.end(), [](const auto& l, const auto& m) {
      return l.logprob == m.logprob && l.top == m.top;
    });
  };
  const bool prompts = a.prompt_logprobs.has_value() == b.prompt_logprobs.has_value() &&
                       (!a.prompt_logprobs || equal(*a.prompt_logprobs, *b.prompt_logprobs));
  return a.token_ids == b.token_ids && a.end == b.end && equal(a.logprobs, b.logprobs) && prompts;
}

bool same_tokens(const Event& a, const Event& b) {
  return a.token_ids == b.token_ids && a.end == b.end;
}

/// Random requests, and what becomes of each alone.
std::pair<std::vector<Request>, std::vector<Event>> serve_alone(Client& client, size_t count,
                                                                std::mt19937& random,
                                                                int64_t most = kMost) {
  std::vector<Request> requests;
  std::vector<Event> alone;
  for (size_t i = 0; i < count; ++i) {
    requests.push_back(random_request(random, client.engine().info(), most));
    alone.push_back(client.wait(client.engine().submit(requests.back())));
    expect(alone.back().end == RequestEnd::kStop || alone.back().end == RequestEnd::kLength,
           "a request that ends well: " + alone.back().error);
  }
  return {requests, alone};
}

void together(Client& client, size_t count) {
  std::mt19937 random(7);
  const auto [requests, alone] = serve_alone(client, count, random);
  const std::vector<uint64_t> ids = client.engine().submit(requests);
  for (size_t i = 0; i < count; ++i) {
    expect(same(client.wait(ids[i]), alone[i]), "request " + std::to_string(i) + " as it is alone");
  }
  client.expect_idle();
}

/// `reference`: what serves them alone; `is_same`: what is compared.
void come_and_go(Client& client, Client& reference, decltype(same)* is_same, size_t count,
                 size_t rounds, int64_t most) {
  std::mt19937 random(11);
  const auto [requests, alone] = serve_alone(reference, count, random, most);
  std::vector<size_t> order(count);
  for (size_t i = 0; i < count; ++i) order[i] = i;
  int64_t cached_tokens = 0, all_cancelled = 0;
  for (size_t round = 0; round < rounds; ++round) {
    std::shuffle(order.begin(), order.end(), random);
    std::vector<uint64_t> ids;
    std::vector<bool> cancelled(count);
    const auto cancel = [&](size_t i) {
      client.engine().cancel(ids[i]);
      cancelled[i] = true;
    };
    for (size_t i = 0; i < count; ++i) {
      ids.push_back(client.engine().submit(requests[order[i]]));
      if (random() % 3 == 0) client.wait(ids[random() % ids.size()], random() % 8);
      if (random() % 8 == 0) cancel(random() % ids.size());
    }
    for (size_t i = 0; i < count; ++i) {
      const Event &found = client.wait(ids[i]), &expected = alone[order[i]];
      const std::string name = "request " + std::to_string(order[i]) + " of round " +
                               std::to_string(round) + " as it is alone";
      cached_tokens += found.cached_tokens;
      if (cancelled[i] && found.end == RequestEnd::kCancelled) {
        ++all_cancelled;
        expect(found.token_ids.size() <= expected.token_ids.size() &&
                   std::equal(found.token_ids.begin(), found.token_ids.end(),
                              expected.token_ids.begin()),
               name + ", up to its end");
      } else {
        expect(is_same(found, expected), name);
      }
    }
    client.expect_idle();
  }
  std::cout << et_moe::to_text({{"cached_tokens", cached_tokens},
                                {"cancelled", all_cancelled},
                                {"preemptions", client.engine().status().preemptions}})
            << "\n";
}

/// Bytes that the allocator has given out.
size_t allocated() { return mallinfo2().uordblks + mallinfo2().hblkhd; }

void soak(Client& client, size_t count) {
  constexpr size_t kInFlight = 64, kGrowth = 64 << 10;
  std::mt19937 random(13);
  const auto [requests, alone] = serve_alone(client, 32, random);
  std::deque<std::pair<uint64_t, size_t>> in_flight;
  const auto end_first = [&, &alone = alone] {
    const auto [id, kind] = in_flight.front();
    in_flight.pop_front();
    const Event& event = client.wait(id);
    expect(event.end == RequestEnd::kCancelled || same(event, alone[kind]), "a request's tokens");
    client.forget(id);
  };
  size_t before = 0;
  for (size_t i = 0; i < count; ++i) {
    const size_t kind = random() % requests.size();
    in_flight.emplace_back(client.engine().submit(requests[kind]), kind);
    if (random() % 16 == 0) client.engine().cancel(in_flight[random() % in_flight.size()].first);
    while (in_flight.size() >= (i % (count / 10) ? kInFlight : 1)) end_first();
    if (i % (count / 10)) continue;
    client.expect_idle();
    std::cout << i << " requests: " << allocated() << " bytes\n";
    if (i == count / 10) before = allocated();
    expect(!before || allocated() < before + kGrowth, "memory that does not grow");
  }
  while (!in_flight.empty()) end_first();
  client.expect_idle();
}

void pieces(Client& client, size_t count) {
  std::mt19937 random(3);
  const et_moe::ModelInfo& info = client.engine().info();
  std::vector<Request> requests{greedy({1}, info.max_seq_len - 1)};  // decodes as long as others do
  for (size_t i = 0; i < count; ++i) {
    Ids prompt(static_cast<size_t>(info.max_seq_len) * (9 - i % 4) / 12);
    for (int64_t& id : prompt) id = static_cast<int64_t>(random()) % info.vocab_size;
    requests.push_back(greedy(prompt, 9));
  }
  std::vector<Ids> alone;
  for (const Request& request : requests) {
    alone.push_back(client.wait(client.engine().submit(request)).token_ids);
  }
  std::vector<uint64_t> ids;
  for (const Request& request : requests) ids.push_back(client.engine().submit(request));
  for (size_t i = 0; i < ids.size(); ++i) {
    expect(client.wait(ids[i]).token_ids == alone[i], "prompt " + std::to_string(i) + " in pieces");
  }
  client.expect_idle();
}

void cancel(Client& client, size_t sequences) {
  const Request other = greedy({3, 1, 2}, 6);
  const Ids expected = client.wait(client.engine().submit(other)).token_ids;
  for (size_t tokens = 0; tokens <= 4; ++tokens) {
    const uint64_t held = client.submit_guided({1, 2, 3, 4}, 4);
    const uint64_t beside = client.engine().submit(other);
    for (size_t i = 1; i <= tokens; ++i) {
      client.engine().allow(held, client.all_tokens());
      client.wait(held, i);
    }
    client.engine().cancel(held);
    const Event& event = client.wait(held);
    expect(event.token_ids.size() == tokens, "no token after a cancellation");
    expect(event.end == (tokens == 4 ? RequestEnd::kLength : RequestEnd::kCancelled), "its end");
    client.engine().cancel(held);
    client.engine().allow(held, client.all_tokens());
    expect(client.wait(beside).token_ids == expected, "the same tokens beside a cancellation");
  }
  // A request is cancelled in the queue, behind as many as are served.
  std::vector<uint64_t> ids;
  for (size_t i = 0; i < sequences; ++i) ids.push_back(client.submit_guided({5}, 2));
  const uint64_t waiting = client.engine().submit(other), last = client.engine().submit(other);
  client.engine().cancel(waiting);
  expect(client.wait(waiting).token_ids.empty(), "nothing of a request that waited");
  for (const uint64_t id : ids) client.engine().cancel(id);
  expect(client.wait(last).token_ids == expected, "the next one's tokens");
  // Requests are cancelled at once, at whatever point they are.
  ids.clear();
  for (int i = 0; i < 200; ++i) {
    ids.push_back(client.engine().submit(other));
    if (i % 3) client.engine().cancel(ids[static_cast<size_t>(i) / 2]);
    if (i % 7 == 0) client.wait(ids.back(), 1);
  }
  for (const uint64_t id : ids) {
    const Event& event = client.wait(id);
    expect(std::equal(event.token_ids.begin(), event.token_ids.end(), expected.begin()),
           "a part of the tokens");
    expect(event.end == RequestEnd::kCancelled || event.token_ids == expected, "all tokens");
  }
  client.expect_idle();
}

void close(Client& client) {
  std::vector<uint64_t> ids;
  for (int i = 0; i < 20; ++i) ids.push_back(client.engine().submit(greedy({1, 2, 3}, 20)));
  ids.push_back(client.submit_guided({1}, 3));
  client.wait(ids[0], 1);
  client.engine().close();
  size_t cancelled = 0;
  for (const uint64_t id : ids) cancelled += client.wait(id).end == RequestEnd::kCancelled;
  expect(cancelled > 0, "requests that the end cuts off");
  client.expect_idle();
  try {
    client.engine().submit(greedy({1}, 1));
  } catch (const et_moe::EngineBroken& e) {
    return expect(std::string(e.what()) == "the engine is closed", "the reason");
  }
  throw std::runtime_error("expected a closed engine to refuse");
}

}  // namespace

int main(int argc, char** argv) {
  try {
    if (argc < 6) throw std::runtime_error("usage: see the top of async_engine_check.cpp");
    const size_t sequences = std::stoul(argv[4]);
    const char* pages = std::strchr(argv[4], '/');
    const auto make_with = [&](size_t snapshots, char** files) {
      et_moe::AsyncEngineOptions options;
      options.model.max_sequences = sequences;
      options.model.snapshots = snapshots;
      options.piece_beside_others = 64;  // which changes no token
      if (pages) options.model.pages = std::stoul(pages + 1);
      options.model.device.cuda_graph = std::string(argv[3]) == "1";
      return std::make_unique<Client>(files[0], files[1], options);
    };
    const auto make = [&] { return make_with(et_moe::snapshots_for(sequences), argv + 1); };
    // What requests are compared with, of the program that the last arguments may name.
    const auto without = [&](int others) {
      return make_with(0, argc > others ? argv + others : argv + 1);
    };
    const std::string command = argv[5];
    const auto most = [&] {
      const char* bound = std::strchr(argv[6], '/');
      return bound ? std::stol(bound + 1) : kMost;
    };
    if (command == "faults") {
      faults(make, std::stoul(argv[6]), std::stoul(argv[7]));
    } else if (command == "fault") {
      et_moe::serve_with_fault(make, {});
    } else if (command == "survive") {
      et_moe::survive(*make());
    } else if (command == "alone") {
      et_moe::alone(*make());
    } else if (command == "together") {
      together(*make(), std::stoul(argv[6]));
    } else if (command == "random") {
      come_and_go(*make(), *without(8), argc > 8 ? same_tokens : same, std::stoul(argv[6]),
                  std::stoul(argv[7]), most());
    } else if (command == "plain") {
      const auto client = without(argc);
      come_and_go(*client, *client, same, std::stoul(argv[6]), std::stoul(argv[7]), most());
    } else if (command == "prefix") {
      et_moe::prefix(*make(), *without(7), std::stoul(argv[6]));
    } else if (command == "grow") {
      et_moe::grow(*make(), *without(6));
    } else if (command == "pieces") {
      pieces(*without(argc), std::stoul(argv[6]));
    } else if (command == "soak") {
      mallopt(M_ARENA_MAX, 1);  // `allocated` counts but one
      soak(*make(), std::stoul(argv[6]));
    } else if (command == "cancel") {
      cancel(*make(), sequences);
    } else if (command == "close") {
      close(*make());
    } else {
      throw std::runtime_error("unknown command " + command);
    }
  } catch (const std::exception& e) {
    std::cerr << "async_engine_check: " << e.what() << "\n";
    return 1;
  }
  return 0;
}

// Requests that share pages of the KV cache, or have too few, for async_engine_check.
#pragma once

#include <algorithm>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "tests/runner/async_engine_client.h"

namespace et_moe {

/// Serves a conversation of two turns; gives all tokens, and the cached ones of both turns.
inline std::pair<Ids, std::vector<int64_t>> converse(Client& client, const Ids& prompt) {
  const int64_t left = client.engine().info().max_seq_len - static_cast<int64_t>(prompt.size());
  const Event first =
      client.wait(client.engine().submit(greedy(prompt, std::min<int64_t>(left / 6, 9))));
  Ids all(prompt);
  all.insert(all.end(), first.token_ids.begin(), first.token_ids.end());
  all.push_back(1);
  const Event second =
      client.wait(client.engine().submit(greedy(all, std::min<int64_t>(left / 6, 5))));
  expect(first.end == RequestEnd::kLength && second.end == RequestEnd::kLength, "two answers");
  all.insert(all.end(), second.token_ids.begin(), second.token_ids.end());
  return {all, {first.cached_tokens, second.cached_tokens}};
}

inline void prefix(Client& client, Client& without, size_t count) {
  std::mt19937 random(5);
  const ModelInfo& info = client.engine().info();
  const auto draw = [&] { return static_cast<int64_t>(random() % info.vocab_size); };
  Ids shared(static_cast<size_t>(std::max(info.max_seq_len * 3 / 4, info.page_size)));
  for (int64_t& id : shared) id = draw();
  const auto length = static_cast<int64_t>(shared.size());
  const int64_t pages = length / info.page_size * info.page_size;
  const int64_t own = std::min<int64_t>((info.max_seq_len - length) / 4, 20);
  for (size_t i = 0; i < count; ++i) {
    Ids prompt(shared);
    for (int64_t more = 0; more < own; ++more) prompt.push_back(draw());
    const auto [tokens, cached] = converse(client, prompt);
    const auto [expected, none] = converse(without, prompt);
    expect(tokens == expected,
           "the tokens of conversation " + std::to_string(i) + " without cache");
    expect(none[0] == 0 && none[1] == 0, "no cached tokens without a cache");
    // The second turn of the first one showed where many go on.
    expect(i == 0 || cached[0] == pages,
           "all shared pages cached, not " + std::to_string(cached[0]));
    expect(i == 0 || cached[1] >= pages, "the second turn's pages cached");
  }
  client.expect_idle();
}

inline void grow(Client& client, Client& reference) {
  const ModelInfo& info = client.engine().info();
  std::vector<Request> requests;
  for (const int64_t id : {3, 4}) {
    requests.push_back(greedy(Ids(static_cast<size_t>(info.page_size), id), info.max_seq_len));
  }
  requests.back().params.sampling = {0.8f, 20, 0.9f, 1};
  std::vector<Ids> alone;
  for (const Request& request : requests) {
    alone.push_back(reference.wait(reference.engine().submit(request)).token_ids);
  }
  const std::vector<uint64_t> ids = client.engine().submit(requests);
  for (size_t i = 0; i < ids.size(); ++i) {
    expect(client.wait(ids[i]).token_ids == alone[i], "the tokens of request " + std::to_string(i));
  }
  expect(client.engine().status().preemptions > 0, "a sequence that is put back");
  client.expect_idle();
}

}  // namespace et_moe

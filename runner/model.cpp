#include "runner/model.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <tuple>
#include <utility>

namespace et_moe {
namespace {

using executorch::aten::ScalarType;

constexpr int64_t kFormatVersion = 4;
const std::string kPrefill = "prefill", kDecode = "decode", kDecodeBatch = "decode_batch",
                  kToken = "token", kLogits = "logits";
/// Tokens for which a call that may be followed by others at once takes pages in advance.
constexpr size_t kTokensAhead = 16;

/// Throws std::runtime_error unless a method returns `token`, int64 [B, 1], and `logits`,
/// float32 [B, vocab_size], for B sequences.
void check_outputs(const std::string& method, const MethodSpec& spec, SizeRange sequences,
                   int64_t vocab_size) {
  const auto expect = [&sequences](const std::string& name, ScalarType dtype, int64_t width) {
    const auto columns = static_cast<int32_t>(width);
    return TensorSpec{name, dtype, {sequences.most, columns}, {sequences.least, columns}};
  };
  for (const TensorSpec& expected :
       {expect(kToken, ScalarType::Long, 1), expect(kLogits, ScalarType::Float, vocab_size)}) {
    const size_t i = find_tensor(spec.outputs, expected.name);
    if (i == spec.outputs.size()) {
      throw std::runtime_error("method " + method + " has no output " + expected.name);
    }
    const TensorSpec& found = spec.outputs[i];
    const size_t rank = expected.shape.size();
    if (!found.accepts(expected.dtype, expected.min_shape.data(), rank) ||
        !found.accepts(expected.dtype, expected.shape.data(), rank)) {
      throw std::runtime_error("method " + method + " returns " + expected.name + " as " +
                               found.describe() + ", expected " + expected.describe() +
                               ": get_vocab_size is " + std::to_string(vocab_size));
    }
  }
}

/// What `body` returns; its exceptions get the name of the file that is at fault.
template <typename Body>
auto in_file(const std::string& path, const Body& body) {
  try {
    return body();
  } catch (const std::exception& e) {
    throw std::runtime_error(path + ": " + e.what());
  }
}

}  // namespace

ModelInfo read_info(const ProgramFile& program) {
  if (const int64_t version = program.count("get_format_version"); version != kFormatVersion) {
    throw std::runtime_error(program.path() + ": format version " + std::to_string(version) +
                             ", this runner reads version " + std::to_string(kFormatVersion) +
                             ": export it again with `et-moe export`");
  }
  ModelInfo info{program.count("get_max_seq_len"),
                 program.count("get_max_prefill_tokens"),
                 program.count("get_max_sequences"),
                 program.count("get_page_size"),
                 program.count("get_max_pages"),
                 program.count("get_vocab_size"),
                 program.count("get_n_layers"),
                 {},
                 {}};
  const std::string eos_ids = program.text("get_eos_ids");
  info.eos_ids = in_file(
      program.path(), [&] { return nlohmann::json::parse(eos_ids).get<std::vector<int64_t>>(); });
  for (const auto& [name, value, least] :
       {std::tuple{"get_max_prefill_tokens", info.max_prefill_tokens, int64_t{2}},
        std::tuple{"get_max_sequences", info.max_sequences, int64_t{1}},
        std::tuple{"get_page_size", info.page_size, int64_t{1}},
        std::tuple{
            "get_max_pages", info.max_pages,
            (info.max_seq_len + info.page_size - 1) / std::max<int64_t>(1, info.page_size)}}) {
    if (value < least) {
      throw std::runtime_error(program.path() + ": " + name + " is " + std::to_string(value) +
                               ", expected at least " + std::to_string(least));
    }
  }
  return info;
}

Model::Model(const std::string& pte_path, const std::string& ptd_path, const ModelOptions& options)
    : program_(pte_path) {
  info_ = read_info(program_);
  inputs_.emplace(static_cast<size_t>(info_.max_sequences),
                  static_cast<size_t>(info_.max_prefill_tokens),
                  static_cast<size_t>(info_.max_pages));
  const std::string backend = program_.text("get_backend"), text = program_.text("get_bindings");
  device_ = in_file(pte_path, [&] {
    info_.backend = nlohmann::json::parse(backend).get<std::string>();
    return make_device(info_.backend, options.device);
  });
  const Bindings bindings = in_file(pte_path, [&] { return Bindings::parse(text); });
  in_file(pte_path, [&] { check_methods(bindings); });
  weights_.emplace(ptd_path, bindings.weights,
                   Fingerprint{pte_path, program_.text("get_fingerprint")});
  device_->load(program_, bindings, *weights_);
  allocate(options, bindings);
}

Model::~Model() = default;

Session::~Session() {
  model_.drop(*this);
  model_.pool_->slots.give(slot_);
}

void Model::check_methods(const Bindings& bindings) const {
  const auto most_tokens = static_cast<int32_t>(info_.max_prefill_tokens);
  const auto most_sequences = static_cast<int32_t>(info_.max_sequences);
  std::vector<std::tuple<std::string, SizeRange, SizeRange>> methods = {
      {kPrefill, {1, 1}, {2, most_tokens}}, {kDecode, {1, 1}, {1, 1}}};
  if (most_sequences > 1) methods.push_back({kDecodeBatch, {2, most_sequences}, {1, 1}});
  for (const auto& [name, sequences, tokens] : methods) {
    const auto method = bindings.methods.find(name);
    if (method == bindings.methods.end()) throw std::runtime_error("has no method " + name);
    inputs_->check(name, method->second, sequences, tokens);
    check_outputs(name, method->second, sequences, info_.vocab_size);
  }
}

size_t Model::choose_pages(const ModelOptions& options, const Bindings& bindings) const {
  const auto least = static_cast<size_t>(info_.max_pages);
  size_t pages = options.pages.value_or(options.max_sequences * least);
  std::string why;
  if (options.memory_fraction && !options.pages) {
    const auto memory = device_->memory();
    if (!memory) throw std::runtime_error("memory_fraction: a CPU program has no GPU memory");
    size_t slots = 0, page = 0;
    for (const StateSpec& state : bindings.state) {
      const bool in_pages = state.pool == Pool::kPages;
      (in_pages ? page : slots) += state.nbytes_each() * (in_pages ? 1 : options.max_sequences);
    }
    const double used = static_cast<double>(memory->total - memory->free_after_load);
    const double rest = *options.memory_fraction * static_cast<double>(memory->total) - used -
                        static_cast<double>(slots);
    if (page > 0) pages = std::min(pages, static_cast<size_t>(std::max(0.0, rest) / page));
    why = " with memory_fraction " + std::to_string(*options.memory_fraction);
  }
  if (pages < least) {
    throw std::runtime_error("the KV cache has " + std::to_string(pages) + " pages" + why +
                             ", expected at least " + std::to_string(least) +
                             " for one sequence of " + std::to_string(info_.max_seq_len) +
                             " tokens");
  }
  return pages;
}

void Model::allocate(const ModelOptions& options, const Bindings& bindings) {
  const size_t pages = choose_pages(options, bindings);
  for (const StateSpec& state : bindings.state) {
    const size_t wanted = state.pool == Pool::kPages ? pages : options.max_sequences;
    if (wanted < static_cast<size_t>(state.min_shape[0]) ||
        wanted > static_cast<size_t>(state.shape[0])) {
      throw std::runtime_error(program_.path() + ": the state " + state.name + " is " +
                               state.describe() + ", " + std::to_string(options.max_sequences) +
                               " sequences with " + std::to_string(pages) + " pages do not fit");
    }
  }
  const PoolSizes sizes{static_cast<int32_t>(pages), static_cast<int32_t>(options.max_sequences)};
  pool_.emplace(sizes);
  try {
    device_->allocate(sizes);
  } catch (const std::runtime_error& e) {
    throw std::runtime_error("there is no memory for the state of " +
                             std::to_string(options.max_sequences) + " sequences with " +
                             std::to_string(pages) + " pages of the KV cache: " + e.what());
  }
}

std::unique_ptr<Session> Model::new_session() {
  if (pool_->slots.size() == 0) {
    throw std::runtime_error("all " + std::to_string(pool_->sizes.slots) + " sequences are in use");
  }
  std::unique_ptr<Session> session(new Session(*this, pool_->slots.take()));
  device_->clear_slot(session->slot_);
  return session;
}

void Model::drop(Session& session) {
  // A call that runs ahead on its state ends before anything that the device is asked from now on.
  std::replace(ahead_.begin(), ahead_.end(), &session, static_cast<Session*>(nullptr));
  for (const int32_t page : session.pages_) pool_->pages.give(page);
  session.pages_.clear();
}

void Model::reset(Session& session) {
  drop(session);
  device_->clear_slot(session.slot_);
  session.position_ = 0;
  session.overtaken_.reset();
  session.failed_ = false;
}

void Model::check_call(const Session& session, const int64_t* tokens, size_t count) const {
  if (session.failed_) {
    throw std::runtime_error("the session's last call failed: reset it before another");
  }
  if (count == 0 || count > static_cast<size_t>(info_.max_prefill_tokens)) {
    throw std::runtime_error("a call takes 1 to " + std::to_string(info_.max_prefill_tokens) +
                             " tokens, got " + std::to_string(count));
  }
  for (size_t i = 0; i < count; ++i) {
    if (tokens[i] < 0 || tokens[i] >= info_.vocab_size) {
      throw std::runtime_error("token id " + std::to_string(tokens[i]) +
                               " is outside the vocabulary of " + std::to_string(info_.vocab_size));
    }
  }
  const int64_t length = session.position_ + static_cast<int64_t>(count);
  if (length > info_.max_seq_len) {
    throw std::runtime_error(std::to_string(length) + " tokens do not fit the context of " +
                             std::to_string(info_.max_seq_len));
  }
}

bool Model::has_page(const Session& session, int64_t position) const {
  return position < static_cast<int64_t>(session.pages_.size()) * info_.page_size;
}

size_t Model::missing_pages(const Session& session, size_t count) const {
  const auto size = static_cast<size_t>(info_.page_size);
  const size_t wanted = (static_cast<size_t>(session.position_) + count + size - 1) / size;
  return wanted - std::min(wanted, session.pages_.size());
}

void Model::take_pages(const std::vector<Feed>& feeds, size_t count, bool run_ahead) {
  size_t missing = 0;
  for (const Feed& feed : feeds) missing += missing_pages(*feed.session, count);
  if (missing > free_pages()) {
    throw OutOfPages("the KV cache has " + std::to_string(free_pages()) + " free pages of " +
                     std::to_string(pages()) + ", " + std::to_string(missing) + " are needed");
  }
  for (const size_t more : {size_t{0}, run_ahead ? kTokensAhead : 0}) {
    for (const Feed& feed : feeds) {
      const auto room = static_cast<size_t>(info_.max_seq_len - feed.session->position_);
      size_t wanted = missing_pages(*feed.session, std::min(count + more, room));
      for (; wanted > 0 && free_pages() > 0; --wanted) {
        feed.session->pages_.push_back(pool_->pages.take());
      }
    }
  }
}

bool Model::is_ahead(const std::vector<Feed>& feeds) const {
  return std::equal(feeds.begin(), feeds.end(), ahead_.begin(), ahead_.end(),
                    [](const Feed& feed, const Session* session) {
                      return feed.session == session && feed.token == session->drawn_ &&
                             feed.sampling == session->sampling_;
                    });
}

void Model::settle() {
  if (ahead_.empty()) return;
  const std::vector<Session*> sessions = std::exchange(ahead_, {});
  const std::vector<int64_t> tokens = device_->settle();
  for (size_t i = 0; i < tokens.size(); ++i) {
    if (sessions[i]) sessions[i]->overtaken_ = tokens[i];
  }
}

void Model::check_overtaken(const Session& session, int64_t token, const Sampling& sampling) const {
  if (!session.overtaken_ || (token == session.drawn_ && sampling == session.sampling_)) return;
  throw std::runtime_error(
      "the session has gone on from the token it drew, as it was asked to: reset it before another "
      "call");
}

std::vector<Step> Model::call(const std::vector<Feed>& feeds, const int64_t* tokens, size_t count,
                              const CallOptions& options) {
  static const std::vector<std::string> token_only{kToken}, with_logits{kToken, kLogits};
  std::vector<TextRow> rows;
  bool run_ahead = options.run_ahead;
  for (size_t i = 0; i < feeds.size(); ++i) {
    Session& session = *feeds[i].session;
    const int64_t next = session.position_ + static_cast<int64_t>(count);
    // The next call would take its pages from this one.
    run_ahead = run_ahead && next < info_.max_seq_len && has_page(session, next);
    rows.push_back(
        {tokens + i * count, session.position_, session.slot_, session.pages_, feeds[i].sampling});
  }
  inputs_->set(rows, count);
  const std::string& method = count > 1 ? kPrefill : feeds.size() > 1 ? kDecodeBatch : kDecode;
  for (const Feed& feed : feeds) feed.session->failed_ = true;
  ahead_.clear();
  const std::vector<const void*> outputs = device_->run(
      {method, inputs_->inputs(), options.logits ? with_logits : token_only, run_ahead});
  std::vector<Step> steps;
  for (size_t i = 0; i < feeds.size(); ++i) {
    const auto row = static_cast<std::ptrdiff_t>(i);
    const float* logits =
        options.logits ? static_cast<const float*>(outputs[1]) + row * info_.vocab_size : nullptr;
    Session& session = *feeds[i].session;
    session.failed_ = false;
    session.position_ += static_cast<int64_t>(count);
    session.drawn_ = static_cast<const int64_t*>(outputs[0])[row];
    session.sampling_ = feeds[i].sampling;
    if (run_ahead) ahead_.push_back(&session);
    steps.push_back({session.drawn_, logits});
  }
  return steps;
}

Step Model::run(Session& session, const int64_t* tokens, size_t count, const Sampling& sampling,
                const CallOptions& options) {
  check_call(session, tokens, count);
  if (count > 1) {
    settle();
    check_overtaken(session, tokens[0], session.sampling_);
    if (session.overtaken_) {
      session.overtaken_.reset();
      ++session.position_;
      ++tokens;
      --count;
    }
  }
  const Feed feed{&session, tokens[0], sampling};
  if (count == 1) return decode({feed}, options).front();
  take_pages({feed}, count, false);
  CallOptions without_next = options;
  without_next.run_ahead = false;  // a next call would be one of another method
  return call({feed}, tokens, count, without_next).front();
}

std::vector<Step> Model::decode(const std::vector<Feed>& feeds, const CallOptions& options) {
  if (feeds.empty() || feeds.size() > static_cast<size_t>(info_.max_sequences)) {
    throw std::runtime_error("a call takes 1 to " + std::to_string(info_.max_sequences) +
                             " sequences, got " + std::to_string(feeds.size()));
  }
  for (const Feed& feed : feeds) check_call(*feed.session, &feed.token, 1);
  if (!is_ahead(feeds)) settle();
  std::vector<Feed> rest;
  for (const Feed& feed : feeds) {
    check_overtaken(*feed.session, feed.token, feed.sampling);
    if (!feed.session->overtaken_) rest.push_back(feed);
  }
  std::vector<Step> made;
  if (!rest.empty()) {
    if (ahead_.empty()) take_pages(rest, 1, options.run_ahead);
    CallOptions now = options;
    now.run_ahead = options.run_ahead && rest.size() == feeds.size();
    std::vector<int64_t> tokens;
    for (const Feed& feed : rest) tokens.push_back(feed.token);
    made = call(rest, tokens.data(), 1, now);
  }
  std::vector<Step> steps;
  auto next = made.begin();
  for (const Feed& feed : feeds) {
    Session& session = *feed.session;
    if (!session.overtaken_) {
      steps.push_back(*next++);
      continue;
    }
    session.drawn_ = *session.overtaken_;
    session.overtaken_.reset();
    ++session.position_;
    steps.push_back({session.drawn_, nullptr});
  }
  return steps;
}

}  // namespace et_moe

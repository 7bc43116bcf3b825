#include "runner/model.h"

#include <nlohmann/json.hpp>
#include <stdexcept>
#include <tuple>
#include <utility>

#include "backends/messages.h"

namespace et_moe {
namespace {

using executorch::aten::ScalarType;

constexpr int64_t kFormatVersion = 3;
const std::string kPrefill = "prefill", kDecode = "decode", kToken = "token", kLogits = "logits";

/// Throws std::runtime_error unless a method returns `token`, int64 [1, 1], and `logits`,
/// float32 [1, vocab_size].
void check_outputs(const std::string& method, const MethodSpec& spec, int64_t vocab_size) {
  const std::vector<int32_t> token{1, 1}, logits{1, static_cast<int32_t>(vocab_size)};
  for (const TensorSpec& expected : {TensorSpec{kToken, ScalarType::Long, token, token},
                                     TensorSpec{kLogits, ScalarType::Float, logits, logits}}) {
    const size_t i = find_tensor(spec.outputs, expected.name);
    if (i == spec.outputs.size()) {
      throw std::runtime_error("method " + method + " has no output " + expected.name);
    }
    const TensorSpec& found = spec.outputs[i];
    if (!expected.accepts(found.dtype, found.shape.data(), found.shape.size())) {
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
    throw std::runtime_error(path + ": " + reason(e));
  }
}

}  // namespace

Model::Model(const std::string& pte_path, const std::string& ptd_path, const DeviceOptions& options)
    : program_(pte_path) {
  read_info();
  const std::string backend = program_.text("get_backend"), text = program_.text("get_bindings");
  info_.backend = in_file(pte_path + ": get_backend",
                          [&] { return nlohmann::json::parse(backend).get<std::string>(); });
  device_ = in_file(pte_path, [&] { return make_device(info_.backend, options); });
  const Bindings bindings =
      in_file(pte_path + ": get_bindings", [&] { return Bindings::parse(text); });
  in_file(pte_path, [&] { check_methods(bindings); });
  weights_.emplace(ptd_path, bindings.weights,
                   Fingerprint{pte_path, program_.text("get_fingerprint")});
  device_->load(program_, bindings, *weights_);
}

Model::~Model() = default;

void Model::read_info() {
  if (const int64_t version = program_.count("get_format_version"); version != kFormatVersion) {
    throw std::runtime_error(program_.path() + ": format version " + std::to_string(version) +
                             ", this runner reads version " + std::to_string(kFormatVersion) +
                             ": export it again with `et-moe export`");
  }
  info_ = {program_.count("get_max_seq_len"),
           program_.count("get_max_prefill_tokens"),
           program_.count("get_vocab_size"),
           program_.count("get_n_layers"),
           {},
           {}};
  const std::string eos_ids = program_.text("get_eos_ids");
  info_.eos_ids = in_file(program_.path() + ": get_eos_ids", [&] {
    return nlohmann::json::parse(eos_ids).get<std::vector<int64_t>>();
  });
  if (info_.max_prefill_tokens < 2) {
    throw std::runtime_error(program_.path() + ": get_max_prefill_tokens is " +
                             std::to_string(info_.max_prefill_tokens) + ", expected at least 2");
  }
  inputs_.emplace(static_cast<size_t>(info_.max_prefill_tokens));
}

void Model::check_methods(const Bindings& bindings) const {
  const auto most = static_cast<int32_t>(info_.max_prefill_tokens);
  const std::tuple<std::string, int32_t, int32_t> methods[] = {{kPrefill, 2, most},
                                                               {kDecode, 1, 1}};
  for (const auto& [name, least, limit] : methods) {
    const auto method = bindings.methods.find(name);
    if (method == bindings.methods.end()) throw std::runtime_error("has no method " + name);
    inputs_->check(name, method->second, least, limit);
    check_outputs(name, method->second, info_.vocab_size);
  }
}

std::unique_ptr<Session> Model::new_session() {
  return std::unique_ptr<Session>(new Session(device_->new_state()));
}

void Model::reset(Session& session) {
  device_->reset(*session.state_);
  session.position_ = 0;
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

size_t Model::settle(Session& session, const int64_t* tokens, size_t count,
                     const Sampling& sampling) {
  if (!session.state_->runs_ahead()) return 0;
  const bool fed = tokens[0] == session.drawn_;
  if (fed && count == 1 && sampling == session.sampling_) return 0;
  if (!fed || count == 1) {
    throw std::runtime_error(
        "the session has gone on from the token it drew, as it was asked to: reset it before "
        "another call");
  }
  device_->settle(*session.state_);
  ++session.position_;
  return 1;
}

Step Model::run(Session& session, const int64_t* tokens, size_t count, const Sampling& sampling,
                const CallOptions& options) {
  static const std::vector<std::string> token_only{kToken}, with_logits{kToken, kLogits};
  check_call(session, tokens, count);
  const size_t fed = settle(session, tokens, count, sampling);
  tokens += fed;
  count -= fed;
  inputs_->set(tokens, count, session.position_, sampling);
  const int64_t next = session.position_ + static_cast<int64_t>(count);
  const Call call{count == 1 ? kDecode : kPrefill, inputs_->inputs(),
                  options.logits ? with_logits : token_only,
                  options.run_ahead && next < info_.max_seq_len};
  session.failed_ = true;
  const std::vector<const void*> outputs = device_->run(*session.state_, call);
  session.failed_ = false;
  session.position_ = next;
  session.drawn_ = *static_cast<const int64_t*>(outputs[0]);
  session.sampling_ = sampling;
  return {session.drawn_, options.logits ? static_cast<const float*>(outputs[1]) : nullptr};
}

}  // namespace et_moe

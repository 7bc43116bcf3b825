#include "runner/text_inputs.h"

#include <algorithm>
#include <stdexcept>

namespace et_moe {
namespace {

using executorch::aten::ScalarType;

constexpr int32_t kNoPage = -1;

}  // namespace

TextInputs::TextInputs(size_t max_sequences, size_t max_tokens, size_t drafts, size_t max_pages)
    : max_sequences_(max_sequences),
      max_tokens_(std::max(max_tokens, max_sequences * (1 + drafts))),
      max_pages_(max_pages),
      inputs_{{"tokens", ScalarType::Long, {1, 1}, nullptr},
              {"positions", ScalarType::Long, {1}, nullptr},
              {"slots", ScalarType::Int, {1}, nullptr},
              {"pages", ScalarType::Int, {1, static_cast<int32_t>(max_pages)}, nullptr},
              {"num_tokens", ScalarType::Long, {1}, nullptr},
              {"temperature", ScalarType::Float, {1}, nullptr},
              {"top_k", ScalarType::Long, {1}, nullptr},
              {"top_p", ScalarType::Float, {1}, nullptr},
              {"seed", ScalarType::Long, {1}, nullptr}} {
  if (drafts > 0) inputs_.push_back({"versions", ScalarType::Long, {1}, nullptr});
}

void TextInputs::allocate() {
  tokens_.resize(max_tokens_);
  pages_.resize(max_sequences_ * max_pages_);
  slots_.resize(max_sequences_);
  for (auto* values : {&positions_, &num_tokens_, &versions_, &top_k_, &seed_}) {
    values->resize(max_sequences_);
  }
  for (auto* values : {&temperature_, &top_p_}) values->resize(max_sequences_);
  const void* const data[] = {tokens_.data(),     positions_.data(),   slots_.data(), pages_.data(),
                              num_tokens_.data(), temperature_.data(), top_k_.data(), top_p_.data(),
                              seed_.data(),       versions_.data()};
  for (size_t i = 0; i < inputs_.size(); ++i) inputs_[i].data = data[i];
}

void TextInputs::check(const std::string& method, const MethodSpec& spec, SizeRange sequences,
                       SizeRange tokens) const {
  const auto fail = [&method](const std::string& what) {
    throw std::runtime_error("method " + method + " " + what);
  };
  for (const TensorSpec& taken : spec.inputs) {
    const auto known = std::find_if(inputs_.begin(), inputs_.end(),
                                    [&taken](const Input& i) { return i.name == taken.name; });
    if (known == inputs_.end()) {
      fail("takes an input " + taken.name + ", which this runner does not know");
    }
    TensorSpec given{known->name, known->dtype, known->shape, known->shape};
    given.min_shape[0] = sequences.least;
    given.shape[0] = sequences.most;
    if (known == inputs_.begin()) {
      given.min_shape[1] = tokens.least;
      given.shape[1] = tokens.most;
    }
    const size_t rank = given.shape.size();
    if (!taken.accepts(given.dtype, given.min_shape.data(), rank) ||
        !taken.accepts(given.dtype, given.shape.data(), rank)) {
      fail("takes the input " + taken.name + " as " + taken.describe() + ", this runner gives " +
           given.describe());
    }
  }
  for (const Input& known : inputs_) {
    const bool optional = known.name == "num_tokens" && sequences.most == 1 && tokens.most == 1;
    if (!optional && find_tensor(spec.inputs, known.name) == spec.inputs.size()) {
      fail("has no input " + known.name);
    }
  }
}

void TextInputs::set(const std::vector<TextRow>& rows, size_t width) {
  for (Input& input : inputs_) input.shape[0] = static_cast<int32_t>(rows.size());
  inputs_.front().shape[1] = static_cast<int32_t>(width);
  for (size_t i = 0; i < rows.size(); ++i) {
    const TextRow& row = rows[i];
    const auto tokens = tokens_.begin() + static_cast<std::ptrdiff_t>(i * width);
    std::fill(std::copy_n(row.tokens, row.count, tokens),
              tokens + static_cast<std::ptrdiff_t>(width), 0);
    positions_[i] = row.position;
    num_tokens_[i] = static_cast<int64_t>(row.count);
    versions_[i] = row.version;
    slots_[i] = row.slot;
    const auto pages = pages_.begin() + static_cast<std::ptrdiff_t>(i * max_pages_);
    const auto behind = std::copy(row.pages.begin(), row.pages.end(), pages);
    std::fill(behind, pages + static_cast<std::ptrdiff_t>(max_pages_), kNoPage);
    temperature_[i] = row.sampling.temperature;
    top_k_[i] = row.sampling.top_k;
    top_p_[i] = row.sampling.top_p;
    seed_[i] = row.sampling.seed;
  }
}

}  // namespace et_moe

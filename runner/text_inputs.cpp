#include "runner/text_inputs.h"

#include <algorithm>
#include <stdexcept>

namespace et_moe {
namespace {

using executorch::aten::ScalarType;

constexpr size_t kTokens = 0;  // index of the only input whose shape varies

}  // namespace

TextInputs::TextInputs(size_t max_tokens)
    : tokens_(max_tokens),
      inputs_{{"tokens", ScalarType::Long, {1, 1}, tokens_.data()},
              {"position", ScalarType::Long, {1}, &position_},
              {"num_tokens", ScalarType::Long, {1}, &num_tokens_},
              {"temperature", ScalarType::Float, {1}, &sampling_.temperature},
              {"top_k", ScalarType::Long, {1}, &sampling_.top_k},
              {"top_p", ScalarType::Float, {1}, &sampling_.top_p},
              {"seed", ScalarType::Long, {1}, &sampling_.seed}} {}

void TextInputs::check(const std::string& method, const MethodSpec& spec, int32_t least,
                       int32_t most) const {
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
    if (known == inputs_.begin() + kTokens) {
      given.min_shape[1] = least;
      given.shape[1] = most;
    }
    const size_t rank = given.shape.size();
    if (!taken.accepts(given.dtype, given.min_shape.data(), rank) ||
        !taken.accepts(given.dtype, given.shape.data(), rank)) {
      fail("takes the input " + taken.name + " as " + taken.describe() + ", this runner gives " +
           given.describe());
    }
  }
  for (const Input& known : inputs_) {
    const bool optional = known.name == "num_tokens" && most == 1;
    if (!optional && find_tensor(spec.inputs, known.name) == spec.inputs.size()) {
      fail("has no input " + known.name);
    }
  }
}

void TextInputs::set(const int64_t* tokens, size_t count, int64_t position,
                     const Sampling& sampling) {
  std::copy_n(tokens, count, tokens_.begin());
  inputs_[kTokens].shape[1] = static_cast<int32_t>(count);
  position_ = position;
  num_tokens_ = static_cast<int64_t>(count);
  sampling_ = sampling;
}

}  // namespace et_moe

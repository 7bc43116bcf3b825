#include "runner/sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <string>

#include "backends/sampling.h"

namespace et_moe {
namespace {

constexpr float kLowest = -std::numeric_limits<float>::infinity();

/// The lowest index of the largest number.
int64_t first_max(const std::vector<float>& values) {
  return std::max_element(values.begin(), values.end()) - values.begin();
}

}  // namespace

Sampler::Sampler(const SamplingParams& params, int64_t vocab_size,
                 const std::vector<int64_t>& prompt_ids)
    : params_(params), values_(static_cast<size_t>(vocab_size)) {
  const Sampling& s = params_.sampling;
  if (s.temperature > 0 && (s.top_k > 0 || s.top_p < 1)) heap_.resize(values_.size());
  if (params_.repetition_penalty == 1) return;
  for (const int64_t id : prompt_ids) counts_.try_emplace(id, 0);
}

void Sampler::change(const TokenMask* mask) {
  if (mask) {
    for (size_t i = 0; i < values_.size(); ++i) {
      if (!((*mask)[i / 8] >> (i % 8) & 1)) values_[i] = kLowest;
    }
  }
  for (const auto& [id, bias] : params_.logit_bias) values_[static_cast<size_t>(id)] += bias;
  for (const auto& [id, count] : counts_) {
    float& value = values_[static_cast<size_t>(id)];
    value = value > 0 ? value / params_.repetition_penalty : value * params_.repetition_penalty;
    value -= params_.frequency_penalty * static_cast<float>(count);
    if (count > 0) value -= params_.presence_penalty;
  }
}

int64_t Sampler::draw_with_noise(int64_t position) {
  const Sampling& s = params_.sampling;
  for (float& value : values_) value /= s.temperature;
  const auto likeliest = static_cast<size_t>(first_max(values_));
  if (params_.min_p > 0) {
    const float bound = values_[likeliest] + std::log(params_.min_p);
    for (float& value : values_) {
      if (value < bound) value = kLowest;
    }
  }
  const auto n = static_cast<int64_t>(values_.size());
  const int64_t top_k = s.top_k < n ? s.top_k : 0;
  float kept = kLowest;
  if (top_k > 0 || s.top_p < 1) {
    heap_ = values_;
    kept = sampling::threshold(heap_.data(), n, top_k, s.top_p);
  }
  // The likeliest token goes first: then few others can be the largest with noise.
  const float most_noise = sampling::to_gumbel(~uint32_t{0});
  const auto noisy = [&](size_t i) {
    return values_[i] + sampling::gumbel(static_cast<uint32_t>(i), static_cast<uint32_t>(position),
                                         static_cast<uint64_t>(s.seed));
  };
  size_t winner = likeliest;
  float best = noisy(winner);
  for (size_t i = 0; i < values_.size(); ++i) {
    const float value = values_[i];
    if (value < kept || value == kLowest || value + most_noise < best) continue;
    const float with_noise = noisy(i);
    if (with_noise > best || (with_noise == best && i < winner)) {
      best = with_noise;
      winner = i;
    }
  }
  return static_cast<int64_t>(winner);
}

int64_t Sampler::draw(const float* logits, int64_t position, const TokenMask* mask) {
  values_.assign(logits, logits + values_.size());
  change(mask);
  const int64_t likeliest = first_max(values_);
  if (mask && values_[static_cast<size_t>(likeliest)] == kLowest) {
    throw std::runtime_error("the mask of a guided request allows no token");
  }
  return params_.sampling.temperature == 0 ? likeliest : draw_with_noise(position);
}

double log_sum_exp(const float* logits, int64_t vocab_size) {
  const double highest = *std::max_element(logits, logits + vocab_size);
  double sum = 0;
  for (int64_t i = 0; i < vocab_size; ++i) sum += std::exp(logits[i] - highest);
  return highest + std::log(sum);
}

TokenLogprob token_logprob(const float* logits, int64_t vocab_size, int64_t token, int64_t top) {
  const double total = log_sum_exp(logits, vocab_size);
  std::vector<int64_t> ids(static_cast<size_t>(top ? vocab_size : 0));
  std::iota(ids.begin(), ids.end(), 0);
  std::partial_sort(ids.begin(), ids.begin() + top, ids.end(), [logits](int64_t a, int64_t b) {
    return logits[a] != logits[b] ? logits[a] > logits[b] : a < b;
  });
  TokenLogprob result{logits[token] - total, {}};
  for (int64_t i = 0; i < top; ++i) {
    const int64_t id = ids[static_cast<size_t>(i)];
    result.top.emplace_back(id, logits[id] - total);
  }
  return result;
}

}  // namespace et_moe

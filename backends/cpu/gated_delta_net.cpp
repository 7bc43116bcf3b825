#include "backends/cpu/delta_rule.h"
#include "backends/cpu/floats.h"
#include "backends/cpu/ops.h"

namespace et_moe::cpu {

namespace {

constexpr int64_t kMaximumTaps = 16;

// A depthwise causal convolution over rows of x, then SiLU.
struct Convolution {
  Floats x;
  int64_t x_stride, tokens, channels, taps;
  Floats weight;            // [channels, taps]
  Floats old_state;         // [taps - 1, channels]
  MutableFloats new_state;  // the same memory

  // The inputs of the channels from `channel` on, `row` rows after the oldest one in the state.
  f32x8 input(int64_t row, int64_t channel, int64_t count) const {
    return row < taps - 1 ? old_state.load(row * channels + channel, count)
                          : x.load((row - (taps - 1)) * x_stride + channel, count);
  }

  // `write(token, channel, value, count)` takes the results. Leaves the last inputs in the state.
  template <class Write>
  void run(Op& op, const Write& write) const {
    const int64_t vectors = (channels + kLanes - 1) / kLanes;
    op.parallel(vectors, kLanes * (taps * 2 + 8) * tokens, [&](int64_t first, int64_t last) {
      for (int64_t channel = first * kLanes; channel < std::min(channels, last * kLanes);
           channel += kLanes) {
        run_channels(channel, std::min<int64_t>(kLanes, channels - channel), write);
      }
    });
  }

  template <class Write>
  void run_channels(int64_t channel, int64_t count, const Write& write) const {
    f32x8 tap[kMaximumTaps] = {};
    for (int64_t i = 0; i < taps; ++i) {
      for (int64_t lane = 0; lane < count; ++lane) {
        tap[i][lane] = weight[(channel + lane) * taps + i];
      }
    }
    for (int64_t t = 0; t < tokens; ++t) {
      f32x8 y = {};
      for (int64_t i = 0; i < taps; ++i) y = fma(tap[i], input(t + i, channel, count), y);
      write(t, channel, silu(y), count);
    }
    for (int64_t i = 0; i < taps - 1; ++i) {
      new_state.store(i * channels + channel, input(tokens + i, channel, count), count);
    }
  }
};

bool check_taps(Op& op, int64_t taps) {
  return (taps >= 1 && taps <= kMaximumTaps) ||
         op.fail("the convolution: expected 1..%lld taps, got %lld", (long long)kMaximumTaps,
                 (long long)taps);
}

// x * rsqrt(sum(x^2) + 1e-6) * scale
void normalize(Floats x, int64_t n, float scale, float* out) {
  const float inverse = 1.0f / std::sqrt(sum_of_squares(x, n) + 1e-6f);
  for_lanes(n, [&](int64_t i, int64_t count) {
    store(out + i, x.load(i, count) * inverse * scale, count);
  });
}

float sigmoid(float x) { return 1.0f / (1.0f + std::exp(-x)); }

float softplus(float x) { return x > 20.0f ? x : std::log1p(std::exp(x)); }

bool check_heads(Op& op, int64_t key_heads, int64_t heads, int64_t key_dim, int64_t value_dim) {
  if (key_heads < 1 || key_dim < 1 || value_dim < 1 || heads < 1 || heads % key_heads != 0) {
    return op.fail(
        "heads: expected value heads as a multiple of key heads, got %lld and %lld of "
        "dimension %lld and %lld",
        (long long)heads, (long long)key_heads, (long long)value_dim, (long long)key_dim);
  }
  return true;
}

// Runs all heads; finish(head) then sees the head's results.
template <class Finish>
void run_heads(Op& op, const DeltaRule& rule, const Finish& finish) {
  const int64_t work = rule.tokens * rule.key_dim * rule.value_dim * 4;
  op.parallel(rule.heads, work, [&](int64_t first, int64_t last) {
    for (int64_t head = first; head < last; ++head) {
      run_head(rule, head);
      finish(head);
    }
  });
}

}  // namespace

void causal_conv1d(Op& op, const Tensor& x, const Tensor& weight, const Tensor& state,
                   const OptionalTensor& num_tokens, Tensor& out) {
  int64_t valid = 0;
  if (!op.check("x", x, kFloats, {kAny, kAny}) ||
      !op.check("weight", weight, kFloats, {x.size(1), kAny}) || !check_taps(op, weight.size(1)) ||
      !op.check("state", state, {x.scalar_type()}, {weight.size(1) - 1, x.size(1)}) ||
      !op.valid_tokens(num_tokens, x.size(0), &valid) ||
      !op.output("out", out, x.scalar_type(), {x.size(0), x.size(1)})) {
    return;
  }
  const int64_t channels = x.size(1);
  const MutableFloats output(out);
  const Convolution convolution{
      Floats(x),      channels,       valid,         channels,
      weight.size(1), Floats(weight), Floats(state), MutableFloats(state)};
  convolution.run(op, [&](int64_t t, int64_t channel, f32x8 y, int64_t count) {
    output.store(t * channels + channel, y, count);
  });
  output.zero(valid * channels, x.numel());
}

void gated_delta_rule(Op& op, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& g,
                      const Tensor& beta, const Tensor& state, const OptionalTensor& num_tokens,
                      Tensor& out) {
  int64_t valid = 0;
  if (!op.check("q", q, kFloats, {kAny, kAny, kAny}) ||
      !op.check("k", k, kFloats, {q.size(0), q.size(1), q.size(2)}) ||
      !op.check("v", v, kFloats, {q.size(0), kAny, kAny})) {
    return;
  }
  const int64_t tokens = q.size(0), key_heads = q.size(1), key_dim = q.size(2);
  const int64_t heads = v.size(1), value_dim = v.size(2);
  if (!check_heads(op, key_heads, heads, key_dim, value_dim) ||
      !op.check("g", g, {ScalarType::Float}, {tokens, heads}) ||
      !op.check("beta", beta, {ScalarType::Float}, {tokens, heads}) ||
      !op.check("state", state, {ScalarType::Float}, {heads, key_dim, value_dim}) ||
      !op.valid_tokens(num_tokens, tokens, &valid) ||
      !op.output("out", out, v.scalar_type(), {tokens, heads, value_dim})) {
    return;
  }
  const int64_t keys = key_heads * key_dim, values = heads * value_dim;
  float* q32 = op.scratch<float>(valid * keys);
  float* k32 = op.scratch<float>(valid * keys);
  float* v32 = op.scratch<float>(valid * values);
  float* decay = op.scratch<float>(valid * heads);
  float* result = op.scratch<float>(valid * values);
  if (!q32 || !k32 || !v32 || !decay || !result) return;
  const float scale = 1.0f / std::sqrt(static_cast<float>(key_dim));
  const Floats q_data(q), k_data(k), v_data(v), g_data(g);
  op.parallel(valid, 8 * (keys + values), [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) {
      for (int64_t i = t * keys; i < (t + 1) * keys; i += key_dim) {
        normalize(q_data + i, key_dim, scale, q32 + i);
        normalize(k_data + i, key_dim, 1.0f, k32 + i);
      }
      for_lanes(values, [&](int64_t i, int64_t count) {
        store(v32 + t * values + i, v_data.load(t * values + i, count), count);
      });
      for (int64_t i = t * heads; i < (t + 1) * heads; ++i) decay[i] = std::exp(g_data[i]);
    }
  });
  const MutableFloats output(out);
  const DeltaRule rule{valid,
                       key_heads,
                       heads,
                       key_dim,
                       value_dim,
                       q32,
                       k32,
                       keys,
                       v32,
                       values,
                       decay,
                       beta.const_data_ptr<float>(),
                       state.mutable_data_ptr<float>(),
                       result};
  run_heads(op, rule, [&](int64_t head) {
    for (int64_t t = 0; t < valid; ++t) {
      const int64_t at = (t * heads + head) * value_dim;
      for_lanes(value_dim, [&](int64_t i, int64_t count) {
        output.store(at + i, load(result + at + i, count), count);
      });
    }
  });
  output.zero(valid * values, tokens * values);
}

namespace {

// A gated delta net layer's sizes; `projected` has columns [q | k | v | z | b | a].
struct Layer {
  int64_t channels, heads, key_heads, key_dim, value_dim, values, columns;
};

bool read_layer(Op& op, const Tensor& conv_weight, const Tensor& recurrent_state, Layer* layer) {
  if (!op.check("conv_weight", conv_weight, kFloats, {kAny, kAny}) ||
      !check_taps(op, conv_weight.size(1)) ||
      !op.check("recurrent_state", recurrent_state, {ScalarType::Float}, {kAny, kAny, kAny})) {
    return false;
  }
  layer->channels = conv_weight.size(0);
  layer->heads = recurrent_state.size(0);
  layer->key_dim = recurrent_state.size(1);
  layer->value_dim = recurrent_state.size(2);
  layer->values = layer->heads * layer->value_dim;
  const int64_t keys = layer->channels - layer->values;
  if (keys <= 0 || layer->key_dim < 1 || keys % (2 * layer->key_dim) != 0) {
    return op.fail("conv_weight: %lld channels less %lld of v are not q and k heads of %lld",
                   (long long)layer->channels, (long long)layer->values, (long long)layer->key_dim);
  }
  layer->key_heads = keys / (2 * layer->key_dim);
  layer->columns = layer->channels + layer->values + 2 * layer->heads;
  return check_heads(op, layer->key_heads, layer->heads, layer->key_dim, layer->value_dim);
}

// The gates of one token, and its q and k normalised in place; qkv is the convolution's result.
void prepare_token(const Layer& layer, Floats b_and_a, Floats a_log, Floats dt_bias, float* qkv,
                   float* decay, float* beta) {
  for (int64_t head = 0; head < layer.heads; ++head) {
    beta[head] = sigmoid(b_and_a[head]);
    const float dt = softplus(b_and_a[layer.heads + head] + dt_bias[head]);
    decay[head] = std::exp(-std::exp(a_log[head]) * dt);
  }
  const float scale = 1.0f / std::sqrt(static_cast<float>(layer.key_dim));
  for (int64_t head = 0; head < layer.key_heads; ++head) {
    float* q = qkv + head * layer.key_dim;
    float* k = q + layer.key_heads * layer.key_dim;
    normalize(Floats(q), layer.key_dim, scale, q);
    normalize(Floats(k), layer.key_dim, 1.0f, k);
  }
}

// out = rms(o) * weight * silu(z) of one head.
void gate_head(const float* o, Floats weight, Floats z, int64_t n, double eps, MutableFloats out,
               int64_t at) {
  const float mean = sum_of_squares(Floats(o), n) / n;
  const float inverse = 1.0f / std::sqrt(mean + static_cast<float>(eps));
  for_lanes(n, [&](int64_t i, int64_t count) {
    const f32x8 normed = load(o + i, count) * inverse * weight.load(i, count);
    out.store(at + i, normed * silu(z.load(i, count)), count);
  });
}

}  // namespace

void gated_delta_net(Op& op, const Tensor& projected, const Tensor& conv_weight,
                     const Tensor& a_log, const Tensor& dt_bias, const Tensor& norm_weight,
                     const Tensor& conv_state, const Tensor& recurrent_state, double eps,
                     const OptionalTensor& num_tokens, Tensor& out) {
  Layer layer;
  int64_t valid = 0;
  if (!read_layer(op, conv_weight, recurrent_state, &layer) ||
      !op.check("projected", projected, kFloats, {kAny, layer.columns}) ||
      !op.check("a_log", a_log, kFloats, {layer.heads}) ||
      !op.check("dt_bias", dt_bias, kFloats, {layer.heads}) ||
      !op.check("norm_weight", norm_weight, kFloats, {layer.value_dim}) ||
      !op.check("conv_state", conv_state, {projected.scalar_type()},
                {conv_weight.size(1) - 1, layer.channels}) ||
      !op.valid_tokens(num_tokens, projected.size(0), &valid) ||
      !op.output("out", out, projected.scalar_type(), {projected.size(0), layer.values})) {
    return;
  }
  const int64_t channels = layer.channels, heads = layer.heads, values = layer.values;
  float* qkv = op.scratch<float>(valid * channels);
  float* decay = op.scratch<float>(valid * heads);
  float* beta = op.scratch<float>(valid * heads);
  float* result = op.scratch<float>(valid * values);
  if (!qkv || !decay || !beta || !result) return;
  const Floats input(projected);
  const Convolution convolution{input,
                                layer.columns,
                                valid,
                                channels,
                                conv_weight.size(1),
                                Floats(conv_weight),
                                Floats(conv_state),
                                MutableFloats(conv_state)};
  convolution.run(op, [&](int64_t t, int64_t channel, f32x8 y, int64_t count) {
    store(qkv + t * channels + channel, input.is_bf16() ? round_to_bf16(y) : y, count);
  });
  const Floats a_log_data(a_log), dt_bias_data(dt_bias), norm(norm_weight);
  op.parallel(valid, channels * 4 + heads * 128, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) {
      prepare_token(layer, input + (t * layer.columns + channels + values), a_log_data,
                    dt_bias_data, qkv + t * channels, decay + t * heads, beta + t * heads);
    }
  });
  const int64_t keys = layer.key_heads * layer.key_dim;
  const DeltaRule rule{valid,
                       layer.key_heads,
                       heads,
                       layer.key_dim,
                       layer.value_dim,
                       qkv,
                       qkv + keys,
                       channels,
                       qkv + 2 * keys,
                       channels,
                       decay,
                       beta,
                       recurrent_state.mutable_data_ptr<float>(),
                       result};
  const MutableFloats output(out);
  run_heads(op, rule, [&](int64_t head) {
    for (int64_t t = 0; t < valid; ++t) {
      const int64_t at = t * values + head * layer.value_dim;
      const Floats z = input + (t * layer.columns + channels + head * layer.value_dim);
      gate_head(result + at, norm, z, layer.value_dim, eps, output, at);
    }
  });
  output.zero(valid * values, projected.size(0) * values);
}

}  // namespace et_moe::cpu

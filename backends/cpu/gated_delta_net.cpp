#include "backends/cpu/delta_rule.h"
#include "backends/cpu/floats.h"
#include "backends/cpu/ops.h"
#include "backends/cpu/sequences.h"

namespace et_moe::cpu {

namespace {

constexpr int64_t kMaximumTaps = 16;

// A depthwise causal convolution over the rows of each sequence, then SiLU.
struct Convolution {
  const Sequences& sequences;
  const int32_t* slots;  // of all sequences
  const Versions& versions;
  Floats x;
  int64_t x_stride, channels, taps;
  Floats weight;            // [channels, taps]
  Floats old_state;         // [slots, taps - 2 + versions, channels]
  MutableFloats new_state;  // the same memory

  // `write(i, channel, value, count)` takes the results of valid row i. Leaves the last inputs of
  // each version in the state.
  template <class Write>
  void run(Op& op, const Write& write) const {
    const int64_t vectors = (channels + kLanes - 1) / kLanes;
    const int64_t work = kLanes * (taps * 2 + 8) * sequences.valid;
    op.parallel(vectors, work, [&](int64_t first, int64_t last) {
      for (int64_t channel = first * kLanes; channel < std::min(channels, last * kLanes);
           channel += kLanes) {
        const int64_t count = std::min<int64_t>(kLanes, channels - channel);
        f32x8 tap[kMaximumTaps] = {};
        for (int64_t i = 0; i < taps; ++i) {
          for (int64_t lane = 0; lane < count; ++lane) {
            tap[i][lane] = weight[(channel + lane) * taps + i];
          }
        }
        for (int64_t i = 0; i < sequences.count; ++i) {
          run_channels(sequences[i], tap, channel, count, write);
        }
      }
    });
  }

  template <class Write>
  void run_channels(const Sequence& sequence, const f32x8* tap, int64_t channel, int64_t count,
                    const Write& write) const {
    const int64_t kept = taps - 2 + versions.count;
    const int64_t state = slots[sequence.index] * kept * channels + channel;
    const int64_t start = state + versions.start(sequence) * channels;
    const Floats own = x + (sequence.row * x_stride + channel);
    // The inputs `row` rows after the oldest one that the first row needs.
    const auto input = [&](int64_t row) {
      return row < taps - 1 ? old_state.load(start + row * channels, count)
                            : own.load((row - (taps - 1)) * x_stride, count);
    };
    for (int64_t t = 0; t < sequence.valid; ++t) {
      f32x8 y = {};
      for (int64_t i = 0; i < taps; ++i) y = fma(tap[i], input(t + i), y);
      write(sequence.first + t, channel, silu(y), count);
    }
    // What is read lies behind what is written.
    const int64_t left = versions.each_row ? taps - 2 + sequence.valid : taps - 1;
    const int64_t first = versions.each_row ? 1 : sequence.valid;
    for (int64_t i = 0; i < left; ++i) {
      new_state.store(state + i * channels, input(first + i), count);
    }
  }
};

bool check_taps(Op& op, int64_t taps) {
  return (taps >= 1 && taps <= kMaximumTaps) ||
         op.fail("the convolution: expected 1..%lld taps, got %lld", (long long)kMaximumTaps,
                 (long long)taps);
}

bool check_versions(Op& op, int64_t versions) {
  return versions >= 1 || op.fail("state: expected rows of at least one version, got %lld too few",
                                  (long long)(1 - versions));
}

// Fails unless the state is `[slots, heads, key_dim, value_dim]` or, if there are versions,
// `[slots, versions, heads, key_dim, value_dim]`.
bool check_state(Op& op, const char* name, const Tensor& state, bool versions, int64_t heads,
                 int64_t key_dim, int64_t value_dim) {
  return versions ? op.check(name, state, kFloats, {kAny, kAny, heads, key_dim, value_dim})
                  : op.check(name, state, kFloats, {kAny, heads, key_dim, value_dim});
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

// Runs all heads of all sequences; finish(i, head) then sees the head's result of valid row i. The
// rule's pointers are to the first valid row; `pool` is the first slot.
template <class T, class Finish>
void run_heads(Op& op, const DeltaRule& rule, T* pool, const Sequences& sequences,
               const Tensor& slots, const Versions& versions, const Finish& finish) {
  if (sequences.count == 0) return;
  const int64_t matrix = rule.key_dim * rule.value_dim;
  const int64_t work = sequences.valid * matrix * 4 / sequences.count;
  const int32_t* slot = slots.const_data_ptr<int32_t>();
  const int64_t state = rule.heads * matrix, stride = versions.each_row ? state : 0;
  float* exact = nullptr;
  const bool several = sequences.valid > sequences.count;  // rows of some sequence
  if (several && needs_exact<T>(sequences.valid, stride)) {
    exact = op.scratch<float>(sequences.count * state);
    if (!exact) return;
  }
  op.parallel(rule.heads * sequences.count, work, [&](int64_t first, int64_t last) {
    for (int64_t item = first; item < last; ++item) {
      const int64_t head = item / sequences.count;
      const Sequence& sequence = sequences[item % sequences.count];
      T* after = pool + slot[sequence.index] * versions.count * state;
      const T* before = after + versions.start(sequence) * state;
      run_head(part(rule, sequence.first, sequence.valid), DeltaState<T>{before, after, stride},
               head, exact ? exact + item * matrix : nullptr);
      for (int64_t t = 0; t < sequence.valid; ++t) finish(sequence.first + t, head);
    }
  });
}

template <class Finish>
void run_heads(Op& op, const DeltaRule& rule, const Tensor& state, const Sequences& sequences,
               const Tensor& slots, const Versions& versions, const Finish& finish) {
  if (state.scalar_type() == ScalarType::BFloat16) {
    run_heads(op, rule, state.mutable_data_ptr<bf16>(), sequences, slots, versions, finish);
  } else {
    run_heads(op, rule, state.mutable_data_ptr<float>(), sequences, slots, versions, finish);
  }
}

}  // namespace

void causal_conv1d(Op& op, const Tensor& x, const Tensor& weight, const Tensor& state,
                   const Tensor& slots, const OptionalTensor& num_tokens,
                   const OptionalTensor& versions, bool each_row, Tensor& out) {
  Sequences sequences;
  Versions own;
  if (!op.check("x", x, kFloats, {kAny, kAny}) ||
      !op.check("weight", weight, kFloats, {x.size(1), kAny}) || !check_taps(op, weight.size(1)) ||
      !op.check("state", state, {x.scalar_type()},
                {kAny, versions.has_value() ? kAny : weight.size(1) - 1, x.size(1)}) ||
      !check_versions(op, state.size(1) - (weight.size(1) - 2)) ||
      !op.check("slots", slots, {ScalarType::Int}, {kAny}) ||
      !read_sequences(op, "x", x.size(0), slots.size(0), num_tokens, &sequences) ||
      !check_slots(op, slots, state.size(0), sequences) ||
      !read_versions(op, versions, each_row, state.size(1) - (weight.size(1) - 2), slots, sequences,
                     &own) ||
      !op.output("out", out, x.scalar_type(), {x.size(0), x.size(1)})) {
    return;
  }
  const int64_t channels = x.size(1);
  const MutableFloats output(out);
  if (sequences.padding > 0) output.zero(0, x.numel());
  const Convolution convolution{sequences,
                                slots.const_data_ptr<int32_t>(),
                                own,
                                Floats(x),
                                channels,
                                channels,
                                weight.size(1),
                                Floats(weight),
                                Floats(state),
                                MutableFloats(state)};
  convolution.run(op, [&](int64_t i, int64_t channel, f32x8 y, int64_t count) {
    output.store(sequences.row(i) * channels + channel, y, count);
  });
}

void gated_delta_rule(Op& op, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& g,
                      const Tensor& beta, const Tensor& state, const Tensor& slots,
                      const OptionalTensor& num_tokens, const OptionalTensor& versions,
                      bool each_row, Tensor& out) {
  Sequences sequences;
  Versions own;
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
      !check_state(op, "state", state, versions.has_value(), heads, key_dim, value_dim) ||
      !op.check("slots", slots, {ScalarType::Int}, {kAny}) ||
      !read_sequences(op, "q", tokens, slots.size(0), num_tokens, &sequences) ||
      !check_slots(op, slots, state.size(0), sequences) ||
      !read_versions(op, versions, each_row, state.size(1), slots, sequences, &own) ||
      !op.output("out", out, v.scalar_type(), {tokens, heads, value_dim})) {
    return;
  }
  const int64_t keys = key_heads * key_dim, values = heads * value_dim, valid = sequences.valid;
  float* q32 = op.scratch<float>(valid * keys);
  float* k32 = op.scratch<float>(valid * keys);
  float* v32 = op.scratch<float>(valid * values);
  float* decay = op.scratch<float>(valid * heads);
  float* rate = op.scratch<float>(valid * heads);
  float* result = op.scratch<float>(valid * values);
  if (!q32 || !k32 || !v32 || !decay || !rate || !result) return;
  const float scale = 1.0f / std::sqrt(static_cast<float>(key_dim));
  const Floats q_data(q), k_data(k), v_data(v), g_data(g), beta_data(beta);
  op.parallel(valid, 8 * (keys + values), [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) {
      const int64_t row = sequences.row(t);
      for (int64_t i = 0; i < keys; i += key_dim) {
        normalize(q_data + (row * keys + i), key_dim, scale, q32 + t * keys + i);
        normalize(k_data + (row * keys + i), key_dim, 1.0f, k32 + t * keys + i);
      }
      for_lanes(values, [&](int64_t i, int64_t count) {
        store(v32 + t * values + i, v_data.load(row * values + i, count), count);
      });
      for (int64_t i = 0; i < heads; ++i) {
        decay[t * heads + i] = std::exp(g_data[row * heads + i]);
        rate[t * heads + i] = beta_data[row * heads + i];
      }
    }
  });
  const MutableFloats output(out);
  if (sequences.padding > 0) output.zero(0, tokens * values);
  const DeltaRule rule{0,    key_heads, heads,  key_dim, value_dim, q32,   k32,
                       keys, v32,       values, decay,   rate,      result};
  run_heads(op, rule, state, sequences, slots, own, [&](int64_t t, int64_t head) {
    const float* own = result + (t * heads + head) * value_dim;
    const int64_t at = (sequences.row(t) * heads + head) * value_dim;
    for_lanes(value_dim,
              [&](int64_t i, int64_t count) { output.store(at + i, load(own + i, count), count); });
  });
}

namespace {

// A gated delta net layer's sizes; `projected` has columns [q | k | v | z | b | a].
struct Layer {
  int64_t versions, channels, heads, key_heads, key_dim, value_dim, values, columns;
};

bool read_layer(Op& op, const Tensor& conv_weight, const Tensor& recurrent_state, bool versions,
                Layer* layer) {
  if (!op.check("conv_weight", conv_weight, kFloats, {kAny, kAny}) ||
      !check_taps(op, conv_weight.size(1)) ||
      !check_state(op, "recurrent_state", recurrent_state, versions, kAny, kAny, kAny)) {
    return false;
  }
  const ssize_t last = recurrent_state.dim() - 1;
  layer->versions = versions ? recurrent_state.size(1) : 1;
  layer->channels = conv_weight.size(0);
  layer->heads = recurrent_state.size(last - 2);
  layer->key_dim = recurrent_state.size(last - 1);
  layer->value_dim = recurrent_state.size(last);
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
                     const Tensor& conv_state, const Tensor& recurrent_state, const Tensor& slots,
                     double eps, const OptionalTensor& num_tokens, const OptionalTensor& versions,
                     bool each_row, Tensor& out) {
  Layer layer;
  Sequences sequences;
  Versions own;
  if (!read_layer(op, conv_weight, recurrent_state, versions.has_value(), &layer) ||
      !op.check("projected", projected, kFloats, {kAny, layer.columns}) ||
      !op.check("a_log", a_log, kFloats, {layer.heads}) ||
      !op.check("dt_bias", dt_bias, kFloats, {layer.heads}) ||
      !op.check("norm_weight", norm_weight, kFloats, {layer.value_dim}) ||
      !op.check(
          "conv_state", conv_state, {projected.scalar_type()},
          {recurrent_state.size(0), conv_weight.size(1) - 2 + layer.versions, layer.channels}) ||
      !op.check("slots", slots, {ScalarType::Int}, {kAny}) ||
      !read_sequences(op, "projected", projected.size(0), slots.size(0), num_tokens, &sequences) ||
      !check_slots(op, slots, conv_state.size(0), sequences) ||
      !read_versions(op, versions, each_row, layer.versions, slots, sequences, &own) ||
      !op.output("out", out, projected.scalar_type(), {projected.size(0), layer.values})) {
    return;
  }
  const int64_t channels = layer.channels, heads = layer.heads, values = layer.values;
  const int64_t valid = sequences.valid, keys = layer.key_heads * layer.key_dim;
  float* qkv = op.scratch<float>(valid * channels);
  float* decay = op.scratch<float>(valid * heads);
  float* beta = op.scratch<float>(valid * heads);
  float* result = op.scratch<float>(valid * values);
  if (!qkv || !decay || !beta || !result) return;
  const Floats input(projected);
  const Convolution convolution{sequences,
                                slots.const_data_ptr<int32_t>(),
                                own,
                                input,
                                layer.columns,
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
      prepare_token(layer, input + (sequences.row(t) * layer.columns + channels + values),
                    a_log_data, dt_bias_data, qkv + t * channels, decay + t * heads,
                    beta + t * heads);
    }
  });
  const MutableFloats output(out);
  if (sequences.padding > 0) output.zero(0, projected.size(0) * values);
  const DeltaRule rule{
      0,          layer.key_heads, heads,          layer.key_dim, layer.value_dim, qkv,
      qkv + keys, channels,        qkv + 2 * keys, channels,      decay,           beta,
      result};
  run_heads(op, rule, recurrent_state, sequences, slots, own, [&](int64_t t, int64_t head) {
    const int64_t row = sequences.row(t), column = head * layer.value_dim;
    gate_head(result + t * values + column, norm, input + (row * layer.columns + channels + column),
              layer.value_dim, eps, output, row * values + column);
  });
}

}  // namespace et_moe::cpu

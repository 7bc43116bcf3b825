#include "backends/cpu/gemm.h"
#include "backends/cpu/ops.h"

namespace et_moe::cpu {

namespace {

// How many queries of one head share a pass over its cache, and how many keys one step of that pass
// takes.
constexpr int64_t kQueries = 6;
constexpr int64_t kKeys = 128;

struct Layer {
  int64_t tokens, start;  // valid tokens and the first one's position
  int64_t heads, kv_heads, dim, capacity, columns;
  int64_t row() const { return padded_columns(dim); }
};

// Rotates columns i and half + i by the token's angle i.
void rotate(float* row, const float* cosine, const float* sine, int64_t half) {
  for_lanes(half, [&](int64_t i, int64_t count) {
    const f32x8 c = load(cosine + i, count), s = load(sine + i, count);
    const f32x8 first = load(row + i, count), second = load(row + half + i, count);
    store(row + i, first * c - second * s, count);
    store(row + half + i, second * c + first * s, count);
  });
}

// sums[t] = sums[t] * factor[t] + weights[t] . values for kTokens rows of n columns, where
// weights[t] and sums[t] lie kKeys and `stride` apart and values is [keys, n].
template <int kTokens, class T>
void add_values(const T* values, int64_t keys, int64_t n, const float* weights, const float* factor,
                float* sums, int64_t stride) {
  const auto run = [&](auto vectors, int64_t column, int64_t count) {
    constexpr int kVectors = decltype(vectors)::value;
    const auto read = [&](auto* p, int i) {
      return kVectors > 1 ? load(p + i * kLanes) : load(p, count);
    };
    f32x8 total[kTokens][kVectors];
    for (int t = 0; t < kTokens; ++t) {
      for (int i = 0; i < kVectors; ++i) {
        total[t][i] = read(sums + t * stride + column, i) * factor[t];
      }
    }
    for (int64_t s = 0; s < keys; ++s) {
      for (int i = 0; i < kVectors; ++i) {
        const f32x8 v = read(values + s * n + column, i);
        for (int t = 0; t < kTokens; ++t) {
          total[t][i] = fma(splat(weights[t * kKeys + s]), v, total[t][i]);
        }
      }
    }
    for (int t = 0; t < kTokens; ++t) {
      float* sum = sums + t * stride + column;
      if (kVectors == 1) {
        store(sum, total[t][0], count);
      } else {
        for (int i = 0; i < kVectors; ++i) store(sum + i * kLanes, total[t][i]);
      }
    }
  };
  constexpr int kWide = kTokens == 1 ? 8 : 4;
  int64_t column = 0;
  for (; column + kWide * kLanes <= n; column += kWide * kLanes) {
    run(std::integral_constant<int, kWide>(), column, kLanes);
  }
  for (; column < n; column += kLanes) {
    run(std::integral_constant<int, 1>(), column, std::min<int64_t>(kLanes, n - column));
  }
}

// An online softmax: over keys that come block by block.
struct RunningSoftmax {
  float largest = -INFINITY, total = 0.0f;

  // Turns `count` scores into weights relative to the largest so far; the rest up to kKeys become
  // 0. Returns what to multiply earlier sums with.
  float add(float* scores, int64_t count, float scale) {
    f32x8 block = splat(-INFINITY);
    for (int64_t i = 0; i < kKeys; i += kLanes) {
      f32x8 v = load(scores + i) * scale;
      for (int64_t lane = std::max<int64_t>(0, count - i); lane < kLanes; ++lane) {
        v[lane] = -INFINITY;
      }
      store(scores + i, v);
      block = max(block, v);
    }
    const float previous = largest;
    largest = std::max(largest, max(block));
    f32x8 sums = {};
    for (int64_t i = 0; i < kKeys; i += kLanes) {
      const f32x8 weight = exp(load(scores + i) - largest);
      store(scores + i, weight);
      sums += weight;
    }
    const float factor = std::exp(previous - largest);
    total = total * factor + sum(sums);
    return factor;
  }
};

template <class T>
class Attention {
 public:
  Attention(Op& op, const Layer& layer, const Tensor& k_cache, const Tensor& v_cache)
      : op_(op),
        layer_(layer),
        k_cache_(k_cache.mutable_data_ptr<T>()),
        v_cache_(v_cache.mutable_data_ptr<T>()) {}

  void run(Floats qkv, Floats q_norm, Floats k_norm, Floats inv_freq, int64_t half, double eps,
           MutableFloats out) {
    const int64_t all_heads = layer_.heads + layer_.kv_heads;
    float* rows = op_.scratch<float>(layer_.tokens * all_heads * layer_.row());
    float* angles = op_.scratch<float>(layer_.tokens * 2 * half);
    float* sums = op_.scratch<float>(layer_.tokens * layer_.heads * layer_.dim);
    if (rows == nullptr || angles == nullptr || sums == nullptr) return;
    op_.parallel(layer_.tokens, layer_.columns * 8 + half * 32, [&](int64_t first, int64_t last) {
      for (int64_t t = first; t < last; ++t) {
        float* cosine = angles + t * 2 * half;
        for (int64_t i = 0; i < half; ++i) {
          const float angle = static_cast<float>(layer_.start + t) * inv_freq[i];
          cosine[i] = std::cos(angle);
          cosine[half + i] = std::sin(angle);
        }
        prepare(qkv + t * layer_.columns, q_norm, k_norm, eps, cosine, half, t,
                rows + t * all_heads * layer_.row());
      }
    });
    const int64_t tiles = (layer_.tokens + kQueries - 1) / kQueries;
    const int64_t queries = std::min(kQueries, layer_.tokens);
    const int64_t work = queries * (layer_.start + layer_.tokens) * layer_.dim * 2;
    op_.parallel(layer_.heads * tiles, work, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        attend(i / tiles, i % tiles * kQueries, rows, qkv, sums, out);
      }
    });
  }

 private:
  // Normalizes and rotates a token's q and k heads, and writes k and v to the cache.
  void prepare(Floats qkv, Floats q_norm, Floats k_norm, double eps, const float* angles,
               int64_t half, int64_t token, float* rows) const {
    const int64_t dim = layer_.dim, queries = layer_.heads * 2 * dim;
    for (int64_t head = 0; head < layer_.heads + layer_.kv_heads; ++head) {
      const bool is_q = head < layer_.heads;
      const int64_t kv_head = head - layer_.heads;
      const Floats source = qkv + (is_q ? head * 2 * dim : queries + kv_head * dim);
      float* row = rows + head * layer_.row();
      pack_floats<false>(source, dim, row);
      pack_floats<false>(NormedRow(Floats(row), is_q ? q_norm : k_norm, dim, eps), dim, row);
      rotate(row, angles, angles + half, half);
      if (is_q) continue;
      const int64_t at = (kv_head * layer_.capacity + layer_.start + token) * dim;
      const Floats value = qkv + (queries + (layer_.kv_heads + kv_head) * dim);
      for_lanes(dim, [&](int64_t i, int64_t count) {
        store(k_cache_ + at + i, load(row + i, count), count);
        store(v_cache_ + at + i, value.load(i, count), count);
      });
    }
  }

  // Attention of at most kQueries tokens, from `token` on, of one head.
  void attend(int64_t head, int64_t token, const float* rows, Floats qkv, float* sums,
              MutableFloats out) const {
    const int64_t dim = layer_.dim, count = std::min(kQueries, layer_.tokens - token);
    const int64_t stride = layer_.heads * dim, all_heads = layer_.heads + layer_.kv_heads;
    const int64_t cache = head / (layer_.heads / layer_.kv_heads) * layer_.capacity * dim;
    const float* q[kQueries];
    for (int64_t i = 0; i < count; ++i) {
      q[i] = rows + ((token + i) * all_heads + head) * layer_.row();
    }
    float* sum = sums + token * stride + head * dim;
    for (int64_t i = 0; i < count; ++i) std::fill(sum + i * stride, sum + i * stride + dim, 0.0f);
    RunningSoftmax softmax[kQueries];
    const int64_t end = layer_.start + token + count;
    const float scale = 1.0f / std::sqrt(static_cast<float>(dim));
    for (int64_t key = 0; key < end; key += kKeys) {
      const int64_t keys = std::min(kKeys, end - key);
      float weights[kQueries * kKeys] = {}, factor[kQueries];
      const T* k = k_cache_ + cache + key * dim;
      const auto row_at = [&](int64_t r) { return DenseRow<T>{k + r * dim}; };
      float_multiply(row_at, keys, q, count, dim, weights, kKeys);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t visible = std::clamp<int64_t>(layer_.start + token + i + 1 - key, 0, keys);
        factor[i] = softmax[i].add(weights + i * kKeys, visible, scale);
      }
      const T* v = v_cache_ + cache + key * dim;
      int64_t i = 0;
      for (; i + 3 <= count; i += 3) {
        add_values<3>(v, keys, dim, weights + i * kKeys, factor + i, sum + i * stride, stride);
      }
      for (; i < count; ++i) {
        add_values<1>(v, keys, dim, weights + i * kKeys, factor + i, sum + i * stride, stride);
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      const Floats gate = qkv + ((token + i) * layer_.columns + (head * 2 + 1) * dim);
      const int64_t at = (token + i) * stride + head * dim;
      for_lanes(dim, [&](int64_t d, int64_t lanes) {
        const f32x8 y = load(sums + at + d, lanes) / softmax[i].total;
        out.store(at + d, y * sigmoid(gate.load(d, lanes)), lanes);
      });
    }
  }

  Op& op_;
  const Layer& layer_;
  T* k_cache_;
  T* v_cache_;
};

bool read_layer(Op& op, const Tensor& qkv, const Tensor& k_cache, const Tensor& v_cache,
                Layer* layer) {
  if (!op.check("qkv", qkv, kFloats, {kAny, kAny}) ||
      !op.check("k_cache", k_cache, {qkv.scalar_type()}, {kAny, kAny, kAny}) ||
      !op.check("v_cache", v_cache, {qkv.scalar_type()},
                {k_cache.size(0), k_cache.size(1), k_cache.size(2)})) {
    return false;
  }
  layer->kv_heads = k_cache.size(0);
  layer->capacity = k_cache.size(1);
  layer->dim = k_cache.size(2);
  layer->columns = qkv.size(1);
  const int64_t queries = layer->columns - 2 * layer->kv_heads * layer->dim;
  layer->heads = layer->dim > 0 ? queries / (2 * layer->dim) : 0;
  if (layer->kv_heads < 1 || layer->heads < 1 || queries != layer->heads * 2 * layer->dim ||
      layer->heads % layer->kv_heads != 0) {
    return op.fail(
        "qkv: %lld columns are not q and gate of a multiple of %lld heads, and k and v "
        "of %lld heads, of dimension %lld",
        (long long)layer->columns, (long long)layer->kv_heads, (long long)layer->kv_heads,
        (long long)layer->dim);
  }
  return true;
}

}  // namespace

void attention(Op& op, const Tensor& qkv, const Tensor& q_norm, const Tensor& k_norm,
               const Tensor& inv_freq, const Tensor& k_cache, const Tensor& v_cache,
               const Tensor& position, double eps, const OptionalTensor& num_tokens, Tensor& out) {
  Layer layer;
  if (!read_layer(op, qkv, k_cache, v_cache, &layer) ||
      !op.check("q_norm", q_norm, kFloats, {layer.dim}) ||
      !op.check("k_norm", k_norm, kFloats, {layer.dim}) ||
      !op.check("inv_freq", inv_freq, {ScalarType::Float}, {kAny}) ||
      !op.scalar("position", position, &layer.start) ||
      !op.valid_tokens(num_tokens, qkv.size(0), &layer.tokens)) {
    return;
  }
  const int64_t half = inv_freq.size(0), width = layer.heads * layer.dim;
  if (2 * half > layer.dim) {
    return void(op.fail("inv_freq: expected at most %lld frequencies for heads of %lld, got %lld",
                        (long long)layer.dim / 2, (long long)layer.dim, (long long)half));
  }
  if (layer.start < 0 || layer.start > layer.capacity - layer.tokens) {
    return void(op.fail("position: %lld tokens from %lld on do not fit a cache of %lld",
                        (long long)layer.tokens, (long long)layer.start,
                        (long long)layer.capacity));
  }
  if (!op.output("out", out, qkv.scalar_type(), {qkv.size(0), width})) return;
  const MutableFloats output(out);
  const auto run = [&](auto kernel) {
    kernel.run(Floats(qkv), Floats(q_norm), Floats(k_norm), Floats(inv_freq), half, eps, output);
  };
  if (qkv.scalar_type() == ScalarType::BFloat16) {
    run(Attention<bf16>(op, layer, k_cache, v_cache));
  } else {
    run(Attention<float>(op, layer, k_cache, v_cache));
  }
  output.zero(layer.tokens * width, qkv.size(0) * width);
}

}  // namespace et_moe::cpu

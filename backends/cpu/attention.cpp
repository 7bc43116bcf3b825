#include "backends/cpu/gemm.h"
#include "backends/cpu/ops.h"
#include "backends/cpu/sequences.h"

namespace et_moe::cpu {

namespace {

// How many queries of one head of a sequence share a pass over its cache. A step of that pass takes
// the keys of a page.
constexpr int64_t kQueries = 6;

struct Layer {
  int64_t heads, kv_heads, dim, columns, half;
  int64_t first_token;  // nothing before it is attended to
  double eps;
  int64_t row() const { return padded_columns(dim); }
};

struct Weights {
  Floats q_norm, k_norm, inv_freq;
};

// Where the sequences' tokens lie.
struct Places {
  const Sequences& sequences;
  const int64_t* positions;  // of each sequence's first row
  const int32_t* pages;      // [all sequences, entries]
  int64_t entries;

  int64_t start(const Sequence& sequence) const { return positions[sequence.index]; }
  int64_t page(const Sequence& sequence, int64_t token) const {
    return pages[sequence.index * entries + token / kPageSize];
  }
};

// At most kQueries valid rows of a sequence, from its valid row `token` on.
struct Tile {
  const Sequence* sequence;
  int64_t token, count;
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
// weights[t] and sums[t] lie kPageSize and `stride` apart and values is [keys, n].
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
          total[t][i] = fma(splat(weights[t * kPageSize + s]), v, total[t][i]);
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

  // Turns `count` scores into weights relative to the largest so far; the rest up to kPageSize
  // become 0. Returns what to multiply earlier sums with.
  float add(float* scores, int64_t count, float scale) {
    f32x8 block = splat(-INFINITY);
    for (int64_t i = 0; i < kPageSize; i += kLanes) {
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
    for (int64_t i = 0; i < kPageSize; i += kLanes) {
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
  Attention(Op& op, const Layer& layer, const Places& places, const Tensor& k_cache,
            const Tensor& v_cache)
      : op_(op),
        layer_(layer),
        places_(places),
        k_cache_(k_cache.mutable_data_ptr<T>()),
        v_cache_(v_cache.mutable_data_ptr<T>()) {}

  void run(Floats qkv, const Weights& weights, MutableFloats out) {
    const int64_t valid = places_.sequences.valid, half = layer_.half;
    const int64_t all_heads = layer_.heads + layer_.kv_heads;
    float* rows = op_.scratch<float>(valid * all_heads * layer_.row());
    float* angles = op_.scratch<float>(valid * 2 * half);
    float* sums = op_.scratch<float>(valid * layer_.heads * layer_.dim);
    Tile* tiles = op_.scratch<Tile>(valid);
    if (!rows || !angles || !sums || !tiles) return;
    op_.parallel(valid, layer_.columns * 8 + half * 32, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const Sequence& sequence = *places_.sequences.owner[i];
        const int64_t token = places_.start(sequence) + i - sequence.first;
        float* cosine = angles + i * 2 * half;
        for (int64_t j = 0; j < half; ++j) {
          const float angle = static_cast<float>(token) * weights.inv_freq[j];
          cosine[j] = std::cos(angle);
          cosine[half + j] = std::sin(angle);
        }
        prepare(qkv + places_.sequences.row(i) * layer_.columns, weights, cosine,
                places_.page(sequence, token), token % kPageSize,
                rows + i * all_heads * layer_.row());
      }
    });
    int64_t count = 0, keys = 0;
    for (int64_t i = 0; i < places_.sequences.count; ++i) {
      const Sequence& sequence = places_.sequences[i];
      for (int64_t token = 0; token < sequence.valid; token += kQueries) {
        const Tile tile{&sequence, token, std::min(kQueries, sequence.valid - token)};
        keys += tile.count * (places_.start(sequence) + token + tile.count);
        tiles[count++] = tile;
      }
    }
    if (count == 0) return;
    // Heads come first, so that a thread's share holds long and short sequences.
    op_.parallel(layer_.heads * count, keys / count * layer_.dim * 2,
                 [&](int64_t first, int64_t last) {
                   for (int64_t i = first; i < last; ++i) {
                     attend(i / count, tiles[i % count], rows, qkv, sums, out);
                   }
                 });
  }

 private:
  // Where the tokens of one key-value head lie in a page of a cache.
  T* in_page(T* cache, int64_t page, int64_t kv_head) const {
    return cache + (page * layer_.kv_heads + kv_head) * kPageSize * layer_.dim;
  }

  // Normalizes and rotates a token's q and k heads, and writes k and v to their place in a page.
  void prepare(Floats qkv, const Weights& weights, const float* angles, int64_t page, int64_t place,
               float* rows) const {
    const int64_t dim = layer_.dim, half = layer_.half, queries = layer_.heads * 2 * dim;
    for (int64_t head = 0; head < layer_.heads + layer_.kv_heads; ++head) {
      const bool is_q = head < layer_.heads;
      const int64_t kv_head = head - layer_.heads;
      const Floats source = qkv + (is_q ? head * 2 * dim : queries + kv_head * dim);
      const Floats norm = is_q ? weights.q_norm : weights.k_norm;
      float* row = rows + head * layer_.row();
      pack_floats<false>(source, dim, row);
      pack_floats<false>(NormedRow(Floats(row), norm, dim, layer_.eps), dim, row);
      rotate(row, angles, angles + half, half);
      if (is_q) continue;
      const Floats value = qkv + (queries + (layer_.kv_heads + kv_head) * dim);
      T* k = in_page(k_cache_, page, kv_head) + place * dim;
      T* v = in_page(v_cache_, page, kv_head) + place * dim;
      for_lanes(dim, [&](int64_t i, int64_t count) {
        store(k + i, load(row + i, count), count);
        store(v + i, value.load(i, count), count);
      });
    }
  }

  // Attention of a tile's rows, for one head.
  void attend(int64_t head, const Tile& tile, const float* rows, Floats qkv, float* sums,
              MutableFloats out) const {
    const Sequence& sequence = *tile.sequence;
    const int64_t dim = layer_.dim, count = tile.count, first = sequence.first + tile.token;
    const int64_t stride = layer_.heads * dim, all_heads = layer_.heads + layer_.kv_heads;
    const int64_t kv_head = head / (layer_.heads / layer_.kv_heads);
    const int64_t start = places_.start(sequence) + tile.token, end = start + count;
    const float* q[kQueries];
    for (int64_t i = 0; i < count; ++i) {
      q[i] = rows + ((first + i) * all_heads + head) * layer_.row();
    }
    float* sum = sums + first * stride + head * dim;
    for (int64_t i = 0; i < count; ++i) std::fill_n(sum + i * stride, dim, 0.0f);
    RunningSoftmax softmax[kQueries];
    const float scale = 1.0f / std::sqrt(static_cast<float>(dim));
    for (int64_t key = layer_.first_token, past = 0; key < end; key = past) {
      past = (key / kPageSize + 1) * kPageSize;
      const int64_t keys = std::min(past, end) - key, page = places_.page(sequence, key);
      const T* k = in_page(k_cache_, page, kv_head) + key % kPageSize * dim;
      const T* v = in_page(v_cache_, page, kv_head) + key % kPageSize * dim;
      float weights[kQueries * kPageSize] = {}, factor[kQueries];
      const auto row_at = [&](int64_t r) { return DenseRow<T>{k + r * dim}; };
      float_multiply(row_at, keys, q, count, dim, weights, kPageSize);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t visible = std::clamp<int64_t>(start + i + 1 - key, 0, keys);
        factor[i] = softmax[i].add(weights + i * kPageSize, visible, scale);
      }
      int64_t i = 0;
      for (; i + 3 <= count; i += 3) {
        add_values<3>(v, keys, dim, weights + i * kPageSize, factor + i, sum + i * stride, stride);
      }
      for (; i < count; ++i) {
        add_values<1>(v, keys, dim, weights + i * kPageSize, factor + i, sum + i * stride, stride);
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      const int64_t row = places_.sequences.row(first + i);
      const Floats gate = qkv + (row * layer_.columns + (head * 2 + 1) * dim);
      for_lanes(dim, [&](int64_t d, int64_t lanes) {
        f32x8 y = {};
        if (start + i >= layer_.first_token) {
          y = load(sum + i * stride + d, lanes) / softmax[i].total;
        }
        out.store(row * stride + head * dim + d, y * sigmoid(gate.load(d, lanes)), lanes);
      });
    }
  }

  Op& op_;
  const Layer& layer_;
  const Places& places_;
  T* k_cache_;
  T* v_cache_;
};

bool read_layer(Op& op, const Tensor& qkv, const Tensor& k_cache, const Tensor& v_cache,
                Layer* layer) {
  if (!op.check("qkv", qkv, kFloats, {kAny, kAny}) ||
      !op.check("k_cache", k_cache, {qkv.scalar_type()}, {kAny, kAny, kPageSize, kAny}) ||
      !op.check("v_cache", v_cache, {qkv.scalar_type()},
                {k_cache.size(0), k_cache.size(1), kPageSize, k_cache.size(3)})) {
    return false;
  }
  layer->kv_heads = k_cache.size(1);
  layer->dim = k_cache.size(3);
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

// Fails unless every valid row has a place in the cache, which has `cached` pages.
bool check_places(Op& op, const Places& places, int64_t cached) {
  for (int64_t i = 0; i < places.sequences.count; ++i) {
    const Sequence& sequence = places.sequences[i];
    const int64_t start = places.start(sequence), valid = sequence.valid;
    if (start < 0 || start > places.entries * kPageSize - valid) {
      return op.fail(
          "positions: %lld tokens from %lld on of sequence %lld do not fit %lld pages of %lld",
          (long long)valid, (long long)start, (long long)sequence.index, (long long)places.entries,
          (long long)kPageSize);
    }
    for (int64_t token = 0; token < start + valid; token += kPageSize) {
      const int64_t page = places.page(sequence, token);
      if (page < 0 || page >= cached) {
        return op.fail("pages: entry %lld of sequence %lld is %lld, the cache has %lld pages",
                       (long long)(token / kPageSize), (long long)sequence.index, (long long)page,
                       (long long)cached);
      }
    }
  }
  return true;
}

}  // namespace

void attention(Op& op, const Tensor& qkv, const Tensor& q_norm, const Tensor& k_norm,
               const Tensor& inv_freq, const Tensor& k_cache, const Tensor& v_cache,
               const Tensor& pages, const Tensor& positions, double eps,
               const OptionalTensor& num_tokens, int64_t first_token, bool, Tensor& out) {
  Layer layer;
  Sequences sequences;
  if (!read_layer(op, qkv, k_cache, v_cache, &layer) ||
      !op.check("q_norm", q_norm, kFloats, {layer.dim}) ||
      !op.check("k_norm", k_norm, kFloats, {layer.dim}) ||
      !op.check("inv_freq", inv_freq, {ScalarType::Float}, {kAny}) ||
      !op.check("pages", pages, {ScalarType::Int}, {kAny, kAny}) ||
      !op.check("positions", positions, {ScalarType::Long}, {pages.size(0)}) ||
      !read_sequences(op, "qkv", qkv.size(0), positions.size(0), num_tokens, &sequences)) {
    return;
  }
  layer.half = inv_freq.size(0);
  layer.eps = eps;
  layer.first_token = first_token;
  if (first_token < 0 || first_token > pages.size(1) * kPageSize) {
    return void(op.fail("first_token: expected a token of %lld pages or their end, got %lld",
                        (long long)pages.size(1), (long long)first_token));
  }
  if (2 * layer.half > layer.dim) {
    return void(op.fail("inv_freq: expected at most %lld frequencies for heads of %lld, got %lld",
                        (long long)layer.dim / 2, (long long)layer.dim, (long long)layer.half));
  }
  const Places places{sequences, positions.const_data_ptr<int64_t>(),
                      pages.const_data_ptr<int32_t>(), pages.size(1)};
  const int64_t width = layer.heads * layer.dim;
  if (!check_places(op, places, k_cache.size(0)) ||
      !op.output("out", out, qkv.scalar_type(), {qkv.size(0), width})) {
    return;
  }
  const MutableFloats output(out);
  if (sequences.padding > 0) output.zero(0, qkv.size(0) * width);
  const Weights weights{Floats(q_norm), Floats(k_norm), Floats(inv_freq)};
  if (qkv.scalar_type() == ScalarType::BFloat16) {
    Attention<bf16>(op, layer, places, k_cache, v_cache).run(Floats(qkv), weights, output);
  } else {
    Attention<float>(op, layer, places, k_cache, v_cache).run(Floats(qkv), weights, output);
  }
}

}  // namespace et_moe::cpu

#include "backends/cpu/sequences.h"

#include <algorithm>

namespace et_moe::cpu {

bool read_sequences(Op& op, const char* argument, int64_t rows, int64_t count,
                    const OptionalTensor& num_tokens, Sequences* sequences) {
  if (count < 1 || rows % count != 0) {
    return op.fail("%s: %lld rows cannot be shared equally by %lld sequences", argument,
                   (long long)rows, (long long)count);
  }
  if (!op.check("num_tokens", num_tokens, {ScalarType::Long}, {count})) return false;
  const int64_t* given = num_tokens.has_value() ? num_tokens->const_data_ptr<int64_t>() : nullptr;
  auto* each = op.scratch<Sequence>(count);
  auto* owner = op.scratch<const Sequence*>(rows);
  if (each == nullptr || owner == nullptr) return false;
  const int64_t own = rows / count;
  for (int64_t b = 0; b < count; ++b) {
    const int64_t valid = given == nullptr ? own : std::min(own, given[b]);
    if (valid < 0) {
      return op.fail("num_tokens: expected at least 0, got %lld of sequence %lld", (long long)valid,
                     (long long)b);
    }
    if (valid == 0) continue;
    Sequence* sequence = each + sequences->count++;
    *sequence = {b, b * own, valid, sequences->valid};
    std::fill_n(owner + sequences->valid, valid, sequence);
    sequences->valid += valid;
  }
  sequences->padding = rows - sequences->valid;
  sequences->each = each;
  sequences->owner = owner;
  return true;
}

bool read_versions(Op& op, const OptionalTensor& versions, bool each_row, int64_t count,
                   const Tensor& slots, const Sequences& sequences, Versions* result) {
  const int64_t all = slots.size(0), rows = (sequences.valid + sequences.padding) / all;
  if (!versions.has_value()) return !each_row || op.fail("versions: each_row expected them");
  if (!op.check("versions", versions, {ScalarType::Long}, {all})) return false;
  if (each_row && rows > count) {
    return op.fail("versions: %lld rows of a sequence leave as many, there are %lld",
                   (long long)rows, (long long)count);
  }
  *result = {versions->const_data_ptr<int64_t>(), count, each_row};
  for (int64_t i = 0; i < sequences.count; ++i) {
    const int64_t start = result->start(sequences[i]);
    if (start < 0 || start >= count) {
      return op.fail("versions: that of sequence %lld is %lld, there are %lld",
                     (long long)sequences[i].index, (long long)start, (long long)count);
    }
  }
  return true;
}

bool check_slots(Op& op, const Tensor& slots, int64_t pool, const Sequences& sequences) {
  const int32_t* slot = slots.const_data_ptr<int32_t>();
  for (int64_t i = 0; i < sequences.count; ++i) {
    const int64_t b = sequences[i].index;
    if (slot[b] < 0 || slot[b] >= pool) {
      return op.fail("slots: that of sequence %lld is %d, there are %lld", (long long)b, slot[b],
                     (long long)pool);
    }
  }
  return true;
}

}  // namespace et_moe::cpu

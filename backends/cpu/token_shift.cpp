// The row before each row of a sequence; see backends/ops/token_shift.py.
#include <cstring>

#include "backends/cpu/floats.h"
#include "backends/cpu/ops.h"
#include "backends/cpu/sequences.h"

namespace et_moe::cpu {

void token_shift(Op& op, const Tensor& x, const Tensor& state, const Tensor& slots,
                 const Tensor& versions, const OptionalTensor& num_tokens, bool each_row,
                 Tensor& out) {
  Sequences sequences;
  Versions own;
  if (!op.check("x", x, kFloats, {kAny, kAny}) ||
      !op.check("state", state, {x.scalar_type()}, {kAny, kAny, x.size(1)}) ||
      !op.check("slots", slots, {ScalarType::Int}, {kAny}) ||
      !read_sequences(op, "x", x.size(0), slots.size(0), num_tokens, &sequences) ||
      !check_slots(op, slots, state.size(0), sequences) ||
      !read_versions(op, versions, each_row, state.size(1), slots, sequences, &own) ||
      !op.output("out", out, x.scalar_type(), {x.size(0), x.size(1)})) {
    return;
  }
  const size_t row = static_cast<size_t>(x.size(1)) * x.element_size();
  const auto* from = static_cast<const char*>(x.const_data_ptr());
  auto* to = static_cast<char*>(out.mutable_data_ptr());
  auto* left = static_cast<char*>(state.mutable_data_ptr());
  const int32_t* slot = slots.const_data_ptr<int32_t>();
  if (sequences.padding > 0) std::memset(to, 0, out.nbytes());
  for (int64_t i = 0; i < sequences.count; ++i) {
    const Sequence& sequence = sequences[i];
    const size_t rows = static_cast<size_t>(sequence.valid);
    const char* given = from + static_cast<size_t>(sequence.row) * row;
    char* shifted = to + static_cast<size_t>(sequence.row) * row;
    char* kept = left + static_cast<size_t>(slot[sequence.index] * own.count) * row;
    std::memcpy(shifted, kept + static_cast<size_t>(own.start(sequence)) * row, row);
    std::memcpy(shifted + row, given, (rows - 1) * row);
    const size_t leaves = each_row ? rows : 1;
    std::memcpy(kept, given + (rows - leaves) * row, leaves * row);
  }
}

}  // namespace et_moe::cpu

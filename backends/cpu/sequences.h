// Which rows of a call belong to which sequence, and which of them are valid. Rows, pages and slots
// are described in `backends/ops/sequences.py`.
#pragma once

#include "backends/cpu/op.h"

namespace et_moe::cpu {

// Tokens of a page of the KV cache (PAGE_SIZE of the op contracts).
inline constexpr int64_t kPageSize = 64;

// A sequence that has valid rows.
struct Sequence {
  int64_t index;  // among all sequences
  int64_t row;    // its first row among all rows
  int64_t valid;  // how many of its rows, from the first on, are valid
  int64_t first;  // its first row among the valid rows of all sequences
};

// The sequences that have valid rows. Kernels number the valid rows of all of them one after the
// other, so that threads share out nothing but work, and scratch memory holds no padding.
struct Sequences {
  int64_t count = 0;
  int64_t valid = 0;    // valid rows of all
  int64_t padding = 0;  // the other rows
  const Sequence* each = nullptr;
  const Sequence* const* owner = nullptr;  // of each valid row

  const Sequence& operator[](int64_t i) const { return each[i]; }

  // The row, among all, that is number i of the valid ones.
  int64_t row(int64_t i) const { return owner[i]->row + (i - owner[i]->first); }
};

// Shares `rows`, those of `argument`, out to `count` sequences. Fails unless they can be shared
// equally, and unless num_tokens is None or an `int64 [count]` of numbers that are at least 0;
// numbers above a sequence's rows stand for all of them.
bool read_sequences(Op& op, const char* argument, int64_t rows, int64_t count,
                    const OptionalTensor& num_tokens, Sequences* sequences);

// From which version of its state a sequence goes on, and which ones a call leaves.
struct Versions {
  const int64_t* given = nullptr;  // of all sequences; null if states have no versions
  int64_t count = 1;
  bool each_row = false;  // whether each row leaves its own, else the last row version 0

  int64_t start(const Sequence& sequence) const {
    return given == nullptr ? 0 : given[sequence.index];
  }
};

// Reads `versions`, an `int64 [B]` or None, of states with `count` versions, for sequences that
// `slots` has been checked for. Fails unless there are those that valid sequences start from, and,
// if every row shall leave one, as many as a sequence has rows.
bool read_versions(Op& op, const OptionalTensor& versions, bool each_row, int64_t count,
                   const Tensor& slots, const Sequences& sequences, Versions* result);

// Fails unless slots, an `int32 [B]`, names one of `pool` slots for every sequence with valid rows.
bool check_slots(Op& op, const Tensor& slots, int64_t pool, const Sequences& sequences);

}  // namespace et_moe::cpu

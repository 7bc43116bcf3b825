// Every registered kernel, called as the runtime calls it, with one argument at a time spoilt: it
// must refuse, name the op and the argument, and touch nothing.
#include <executorch/extension/memory_allocator/malloc_memory_allocator.h>
#include <executorch/extension/tensor/tensor.h>
#include <executorch/runtime/core/evalue.h>
#include <executorch/runtime/kernel/kernel_runtime_context.h>
#include <executorch/runtime/kernel/operator_registry.h>
#include <executorch/runtime/platform/runtime.h>
#include <gtest/gtest.h>

#include <optional>
#include <string>
#include <vector>

namespace et_moe::cpu {
namespace {

using executorch::aten::ScalarType;
using executorch::runtime::Error;
using executorch::runtime::EValue;
using executorch::runtime::KernelRuntimeContext;

constexpr auto kF32 = ScalarType::Float;
constexpr auto kBf16 = ScalarType::BFloat16;
constexpr auto kI64 = ScalarType::Long;
constexpr auto kByte = ScalarType::Byte;
constexpr auto kChar = ScalarType::Char;
constexpr auto kInt = ScalarType::Int;

// A tensor argument. `free` marks the sizes that may have any value: changing only such a size does
// not make this argument wrong.
struct TensorArgument {
  const char* name;
  ScalarType type;
  std::vector<int> sizes;
  std::vector<bool> free = {};
  bool is_output = false;
};

struct Argument {
  std::optional<TensorArgument> tensor;
  EValue value;  // used if the argument is not a tensor

  Argument(TensorArgument tensor) : tensor(std::move(tensor)) {}
  Argument(int64_t value) : value(value) {}
  Argument(double value) : value(value) {}
  Argument(bool value) : value(value) {}
};

TensorArgument output(const char* name, ScalarType type, std::vector<int> sizes) {
  return {name, type, std::move(sizes), {}, true};
}

struct OpCase {
  const char* name;
  std::vector<Argument> arguments;
};

// Valid calls: 3 rows, of 3 sequences where an op knows of them, hidden size 64, group size 32.
std::vector<OpCase> cases() {
  return {
      {"quantize_int8",
       {TensorArgument{"x", kF32, {3, 64}, {true, true}}, int64_t{32},
        output("out0", kChar, {3, 64}), output("out1", kF32, {3, 2})}},
      {"silu_quantize_int8",
       {TensorArgument{"x", kF32, {3, 128}, {true, true}}, int64_t{32},
        output("out0", kChar, {3, 64}), output("out1", kF32, {3, 2})}},
      {"rms_norm",
       {TensorArgument{"x", kF32, {3, 64}, {true, true}}, TensorArgument{"weight", kF32, {64}},
        1e-6, output("out", kF32, {3, 64})}},
      {"linear",
       {TensorArgument{"x", kF32, {3, 64}, {true, true}},
        TensorArgument{"weight", kF32, {8, 64}, {true, false}},
        TensorArgument{"norm_weight", kF32, {64}}, 1e-6, TensorArgument{"residual", kF32, {3, 8}},
        output("out", kF32, {3, 8})}},
      {"linear_w4a8",
       {TensorArgument{"x", kF32, {3, 64}, {true, true}},
        TensorArgument{"weight", kByte, {8, 32}, {true, false}},
        TensorArgument{"scale", kBf16, {8, 2}}, int64_t{32},
        TensorArgument{"norm_weight", kF32, {64}}, 1e-6, TensorArgument{"residual", kF32, {3, 8}},
        output("out", kF32, {3, 8})}},
      {"linear_w4a16",
       {TensorArgument{"x", kF32, {3, 64}, {true, true}},
        TensorArgument{"weight", kByte, {8, 32}, {true, false}},
        TensorArgument{"scale", kBf16, {8, 2}}, int64_t{32},
        TensorArgument{"norm_weight", kF32, {64}}, 1e-6, TensorArgument{"residual", kF32, {3, 8}},
        output("out", kF32, {3, 8})}},
      {"linear_w8a8",
       {TensorArgument{"x", kF32, {3, 64}, {true, true}},
        TensorArgument{"weight", kChar, {8, 64}, {true, false}},
        TensorArgument{"scale", kBf16, {8, 1}}, TensorArgument{"norm_weight", kF32, {64}}, 1e-6,
        TensorArgument{"residual", kF32, {3, 8}}, output("out", kF32, {3, 8})}},
      {"linear_w8a16",
       {TensorArgument{"x", kF32, {3, 64}, {true, true}},
        TensorArgument{"weight", kChar, {8, 64}, {true, false}},
        TensorArgument{"scale", kBf16, {8, 1}}, TensorArgument{"norm_weight", kF32, {64}}, 1e-6,
        TensorArgument{"residual", kF32, {3, 8}}, output("out", kF32, {3, 8})}},
      {"embedding_w8",
       {TensorArgument{"ids", kI64, {3}, {true}},
        TensorArgument{"weight", kChar, {9, 64}, {true, true}},
        TensorArgument{"scale", kBf16, {9, 1}}, int64_t{6}, output("out", kF32, {3, 64})}},
      {"embedding_w4",
       {TensorArgument{"ids", kI64, {3}, {true}},
        TensorArgument{"weight", kByte, {9, 32}, {true, true}},
        TensorArgument{"scale", kBf16, {9, 2}}, int64_t{32}, int64_t{6},
        output("out", kF32, {3, 64})}},
      {"moe_router",
       {TensorArgument{"x", kF32, {3, 64}, {true, true}}, TensorArgument{"norm_weight", kF32, {64}},
        TensorArgument{"weight", kF32, {5, 64}, {true, false}}, int64_t{2}, int64_t{1}, 1e-6,
        TensorArgument{"num_tokens", kI64, {3}, {true}}, true, output("out0", kF32, {3, 64}),
        output("out1", kF32, {3, 3}), output("out2", kInt, {3, 3})}},
      {"moe",
       {TensorArgument{"x", kF32, {3, 64}, {true, true}},
        TensorArgument{"w13", kF32, {4, 64, 64}, {true, true, false}},
        TensorArgument{"w2", kF32, {4, 64, 32}},
        TensorArgument{"topk_weights", kF32, {3, 2}, {false, true}},
        TensorArgument{"topk_ids", kInt, {3, 2}}, TensorArgument{"residual", kF32, {3, 64}},
        output("out", kF32, {3, 64})}},
      {"moe_w4a8",
       {TensorArgument{"x", kF32, {3, 64}, {true, true}},
        TensorArgument{"w13", kByte, {4, 64, 32}, {true, true, false}},
        TensorArgument{"w13_scale", kBf16, {4, 64, 2}}, TensorArgument{"w2", kByte, {4, 64, 16}},
        TensorArgument{"w2_scale", kBf16, {4, 64, 1}},
        TensorArgument{"topk_weights", kF32, {3, 2}, {false, true}},
        TensorArgument{"topk_ids", kInt, {3, 2}}, int64_t{32},
        TensorArgument{"residual", kF32, {3, 64}}, output("out", kF32, {3, 64})}},
      {"moe_w4a16",
       {TensorArgument{"x", kF32, {3, 64}, {true, true}},
        TensorArgument{"w13", kByte, {4, 64, 32}, {true, true, false}},
        TensorArgument{"w13_scale", kBf16, {4, 64, 2}}, TensorArgument{"w2", kByte, {4, 64, 16}},
        TensorArgument{"w2_scale", kBf16, {4, 64, 1}},
        TensorArgument{"topk_weights", kF32, {3, 2}, {false, true}},
        TensorArgument{"topk_ids", kInt, {3, 2}}, int64_t{32},
        TensorArgument{"residual", kF32, {3, 64}}, output("out", kF32, {3, 64})}},
      {"moe_w8a8",
       {TensorArgument{"x", kF32, {3, 64}, {true, true}},
        TensorArgument{"w13", kChar, {4, 64, 64}, {true, true, false}},
        TensorArgument{"w13_scale", kBf16, {4, 64, 1}}, TensorArgument{"w2", kChar, {4, 64, 32}},
        TensorArgument{"w2_scale", kBf16, {4, 64, 1}},
        TensorArgument{"topk_weights", kF32, {3, 2}, {false, true}},
        TensorArgument{"topk_ids", kInt, {3, 2}}, TensorArgument{"residual", kF32, {3, 64}},
        output("out", kF32, {3, 64})}},
      {"moe_w8a16",
       {TensorArgument{"x", kF32, {3, 64}, {true, true}},
        TensorArgument{"w13", kChar, {4, 64, 64}, {true, true, false}},
        TensorArgument{"w13_scale", kBf16, {4, 64, 1}}, TensorArgument{"w2", kChar, {4, 64, 32}},
        TensorArgument{"w2_scale", kBf16, {4, 64, 1}},
        TensorArgument{"topk_weights", kF32, {3, 2}, {false, true}},
        TensorArgument{"topk_ids", kInt, {3, 2}}, TensorArgument{"residual", kF32, {3, 64}},
        output("out", kF32, {3, 64})}},
      {"causal_conv1d",
       {TensorArgument{"x", kF32, {3, 24}, {true, true}},
        TensorArgument{"weight", kF32, {24, 4}, {false, true}},
        TensorArgument{"state", kF32, {2, 4, 24}, {true, true}},
        TensorArgument{"slots", kInt, {3}, {true}}, TensorArgument{"num_tokens", kI64, {3}},
        TensorArgument{"versions", kI64, {3}}, true, output("out", kF32, {3, 24})}},
      {"gated_delta_rule",
       {TensorArgument{"q", kF32, {3, 2, 16}, {true, true, true}},
        TensorArgument{"k", kF32, {3, 2, 16}},
        TensorArgument{"v", kF32, {3, 4, 8}, {false, true, true}},
        TensorArgument{"g", kF32, {3, 4}}, TensorArgument{"beta", kF32, {3, 4}},
        TensorArgument{"state", kF32, {2, 2, 4, 16, 8}, {true, true}},
        TensorArgument{"slots", kInt, {3}, {true}}, TensorArgument{"num_tokens", kI64, {3}},
        TensorArgument{"versions", kI64, {3}}, true, output("out", kF32, {3, 4, 8})}},
      {"gated_delta_net",
       {TensorArgument{"projected", kF32, {3, 136}, {true, false}},
        TensorArgument{"conv_weight", kF32, {96, 4}, {true, true}},
        TensorArgument{"a_log", kF32, {4}}, TensorArgument{"dt_bias", kF32, {4}},
        TensorArgument{"norm_weight", kF32, {8}}, TensorArgument{"conv_state", kF32, {2, 4, 96}},
        TensorArgument{"recurrent_state", kF32, {2, 2, 4, 16, 8}, {true, true, true, true, true}},
        TensorArgument{"slots", kInt, {3}, {true}}, 1e-6, TensorArgument{"num_tokens", kI64, {3}},
        TensorArgument{"versions", kI64, {3}}, true, output("out", kF32, {3, 32})}},
      {"attention",
       {TensorArgument{"qkv", kF32, {3, 96}, {true, true}}, TensorArgument{"q_norm", kF32, {8}},
        TensorArgument{"k_norm", kF32, {8}}, TensorArgument{"inv_freq", kF32, {2}, {true}},
        TensorArgument{"k_cache", kF32, {2, 2, 64, 8}, {true, true, false, true}},
        TensorArgument{"v_cache", kF32, {2, 2, 64, 8}},
        TensorArgument{"pages", kInt, {3, 2}, {true, true}}, TensorArgument{"positions", kI64, {3}},
        1e-6, TensorArgument{"num_tokens", kI64, {3}}, int64_t{1}, true,
        output("out", kF32, {3, 32})}},
      {"token_shift",
       {TensorArgument{"x", kF32, {3, 24}, {true, true}},
        TensorArgument{"state", kF32, {2, 2, 24}, {true, true}},
        TensorArgument{"slots", kInt, {3}, {true}}, TensorArgument{"versions", kI64, {3}},
        TensorArgument{"num_tokens", kI64, {3}}, true, output("out", kF32, {3, 24})}},
      {"sample",
       {TensorArgument{"logits", kF32, {3, 50}, {true, true}},
        TensorArgument{"temperature", kF32, {3}}, TensorArgument{"top_k", kI64, {3}},
        TensorArgument{"top_p", kF32, {3}}, TensorArgument{"seed", kI64, {3}},
        TensorArgument{"positions", kI64, {3}, {true}}, output("out", kI64, {3, 1})}},
  };
}

// A call of a kernel together with the memory of its arguments. The memory is filled with ones,
// which are valid data for every argument.
class Call {
 public:
  explicit Call(const OpCase& op) : name_(std::string("et_moe::") + op.name) {
    for (const Argument& argument : op.arguments) {
      values_.push_back(argument.tensor ? make(*argument.tensor) : argument.value);
    }
  }

  EValue make(const TensorArgument& argument) {
    std::vector<executorch::aten::SizesType> sizes(argument.sizes.begin(), argument.sizes.end());
    tensors_.push_back(executorch::extension::full(sizes, 1, argument.type));
    return EValue(*tensors_.back());
  }

  EValue& operator[](size_t i) { return values_[i]; }
  void drop_last() { values_.pop_back(); }

  Error run() {
    const auto kernel =
        executorch::runtime::get_op_function_from_registry((name_ + ".out").c_str());
    EXPECT_TRUE(kernel.ok()) << name_ << " is not registered";
    if (!kernel.ok()) return kernel.error();
    executorch::extension::MallocMemoryAllocator memory;
    KernelRuntimeContext context(nullptr, &memory);
    std::vector<EValue*> stack;
    for (EValue& value : values_) stack.push_back(&value);
    testing::internal::CaptureStderr();
    (*kernel)(context, {stack.data(), stack.size()});
    log_ = testing::internal::GetCapturedStderr();
    return context.failure_state();
  }

  // Fails unless the kernel refuses and says why in words that include the op and `culprit`.
  void expect_refusal(const std::string& culprit, const std::string& how) {
    EXPECT_EQ(run(), Error::InvalidArgument) << name_ << " " << culprit << ": " << how;
    EXPECT_NE(log_.find(name_ + ": "), std::string::npos) << how << ": " << log_;
    EXPECT_NE(log_.find(culprit), std::string::npos) << how << ": " << log_;
  }

 private:
  std::string name_;
  std::vector<executorch::extension::TensorPtr> tensors_;
  std::vector<EValue> values_;
  std::string log_;
};

class Arguments : public testing::TestWithParam<OpCase> {
 protected:
  static void SetUpTestSuite() { executorch::runtime::runtime_init(); }

  // Calls the op with one tensor argument replaced.
  void expect_refusal(size_t i, const TensorArgument& spoilt, const std::string& how) {
    Call call(GetParam());
    call[i] = call.make(spoilt);
    call.expect_refusal(spoilt.name, how);
  }
};

TEST_P(Arguments, ValidOnesAreTaken) { EXPECT_EQ(Call(GetParam()).run(), Error::Ok); }

TEST_P(Arguments, DtypesAreChecked) {
  for (size_t i = 0; i < GetParam().arguments.size(); ++i) {
    const auto& argument = GetParam().arguments[i].tensor;
    if (!argument) continue;
    TensorArgument spoilt = *argument;
    spoilt.type = ScalarType::Double;
    expect_refusal(i, spoilt, "another dtype");
  }
}

TEST_P(Arguments, RanksAreChecked) {
  for (size_t i = 0; i < GetParam().arguments.size(); ++i) {
    const auto& argument = GetParam().arguments[i].tensor;
    if (!argument) continue;
    TensorArgument spoilt = *argument;
    spoilt.sizes.insert(spoilt.sizes.begin(), 1);
    expect_refusal(i, spoilt, "a leading dimension too many");
    spoilt.sizes = {};
    expect_refusal(i, spoilt, "a scalar");
  }
}

TEST_P(Arguments, SizesAreChecked) {
  for (size_t i = 0; i < GetParam().arguments.size(); ++i) {
    const auto& argument = GetParam().arguments[i].tensor;
    if (!argument || argument->is_output) continue;
    for (size_t d = 0; d < argument->sizes.size(); ++d) {
      for (int size : {argument->sizes[d] + 1, argument->sizes[d] - 1, 0}) {
        TensorArgument spoilt = *argument;
        spoilt.sizes[d] = size;
        if (d >= argument->free.size() || !argument->free[d]) {
          expect_refusal(i, spoilt, "size " + std::to_string(size));
        } else {
          // Another argument may no longer fit, or all may still fit. Either way the kernel must
          // not read or write beyond any of them.
          Call call(GetParam());
          call[i] = call.make(spoilt);
          call.run();
        }
      }
    }
  }
}

TEST_P(Arguments, OutputsThatAreTooSmallAreRefused) {
  for (size_t i = 0; i < GetParam().arguments.size(); ++i) {
    const auto& argument = GetParam().arguments[i].tensor;
    if (!argument || !argument->is_output) continue;
    for (size_t d = 0; d < argument->sizes.size(); ++d) {
      TensorArgument spoilt = *argument;
      --spoilt.sizes[d];
      expect_refusal(i, spoilt, "a smaller result");
    }
  }
}

TEST_P(Arguments, KindsAreChecked) {
  for (size_t i = 0; i < GetParam().arguments.size(); ++i) {
    Call call(GetParam());
    call[i] = call[i].isBool() ? EValue(1.0) : EValue(true);
    call.expect_refusal("argument " + std::to_string(i) + " is not", "another kind of value");
  }
}

TEST_P(Arguments, ShortStacksAreRefused) {
  Call call(GetParam());
  call.drop_last();
  call.expect_refusal("expected", "too few arguments");
}

TEST_P(Arguments, IntegersAreChecked) {
  for (size_t i = 0; i < GetParam().arguments.size(); ++i) {
    if (!GetParam().arguments[i].value.isInt()) continue;
    for (int64_t bad : {int64_t{-1}, int64_t{INT64_MIN}, int64_t{INT64_MAX}}) {
      const bool is_tile = std::string(GetParam().name).find("quantize") != std::string::npos;
      // Any tile longer than a row is valid: the row is then one tile.
      if (is_tile && bad > 0) continue;
      Call call(GetParam());
      call[i] = EValue(bad);
      call.expect_refusal("expected", "integer " + std::to_string(bad));
    }
  }
}

INSTANTIATE_TEST_SUITE_P(All, Arguments, testing::ValuesIn(cases()),
                         [](const auto& info) { return std::string(info.param.name); });

}  // namespace
}  // namespace et_moe::cpu

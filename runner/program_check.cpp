#include "runner/program_check.h"

#include <executorch/runtime/core/exec_aten/util/scalar_type_util.h>

#include <algorithm>
#include <cstring>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include "runner/flatbuffer.h"
#include "runner/kernel_signatures.h"
#include "runner/program_schema.h"

namespace et_moe {
namespace {

using executorch::aten::ScalarType;
using flatbuffer::Buffer;
using flatbuffer::Table;
using flatbuffer::Tables;
using flatbuffer::Vector;
using namespace schema;

const std::string kView = "executorch_prim::et_view.default";  // its result gets its input's memory
constexpr size_t kMostDimensions = 16;                         // what ExecuTorch takes
constexpr size_t kBufferSlack = 1 << 12;  // bytes of planned memory behind its last tensor
const std::set<ScalarType> kDtypes = {ScalarType::Byte,    ScalarType::Char,   ScalarType::Short,
                                      ScalarType::Int,     ScalarType::Long,   ScalarType::Half,
                                      ScalarType::Float,   ScalarType::Double, ScalarType::Bool,
                                      ScalarType::BFloat16};

[[noreturn]] void fail(const std::string& what) { throw std::runtime_error(what); }

void require(bool holds, const char* what) {
  if (!holds) fail(what);
}

/// Bytes of the file.
struct Extent {
  uint64_t begin, size;
};

/// What all methods of a program share.
struct Data {
  std::vector<Extent> segments;
  std::vector<Extent> constants;  // to the end of their segment
};

class MethodCheck {
 public:
  MethodCheck(const Table& method, const Data& data)
      : method_(method), data_(data), values_(method.tables(plan::kValues)) {}

  void run() {
    method_.text(plan::kName);
    if (const auto container = method_.find_table(plan::kContainer)) {
      for (int slot : {kFirst, kSecond}) container->text(slot);
    }
    check_values();
    check_memory();
    const Tables delegates = method_.tables(plan::kDelegates);
    for (size_t i = 0; i < delegates.size(); ++i) check_delegate(delegates[i]);
    const Tables chains = method_.tables(plan::kChains);
    require(chains.size() == 1, "expected one chain");
    const Tables instructions = chains[0].tables(2);
    for (size_t i = 0; i < instructions.size(); ++i) check_instruction(instructions[i]);
    const auto outputs = method_.scalars<int32_t>(plan::kOutputs);
    for (size_t i = 0; i < outputs.size(); ++i) require_memory(outputs[i]);
  }

 private:
  uint8_t kind(int32_t value) const {
    require(value >= 0 && static_cast<size_t>(value) < kinds_.size(), "an index of no value");
    return kinds_[static_cast<size_t>(value)];
  }

  void check_values() {
    for (size_t i = 0; i < values_.size(); ++i)
      kinds_.push_back(values_[i].scalar<uint8_t>(kFirst));
    has_memory_.resize(kinds_.size());
    is_planned_.resize(kinds_.size());
    bytes_.resize(kinds_.size());
    dtypes_.resize(kinds_.size());
    for (int slot : {plan::kInputs, plan::kOutputs}) {
      const auto list = method_.scalars<int32_t>(slot);
      for (size_t i = 0; i < list.size(); ++i) {
        kind(list[i]);
        if (slot == plan::kInputs) has_memory_[static_cast<size_t>(list[i])] = true;
      }
    }
    for (size_t i = 0; i < kinds_.size(); ++i) check_value(i, values_[i].table(kSecond));
  }

  void check_value(size_t i, const Table& value) {
    switch (kinds_[i]) {
      case kNone:
      case kInt:
      case kBool:
      case kDouble:
        return;
      case kTensor:
        return check_tensor(i, value);
      case kString:
        value.text(kFirst);
        return;
      case kInts:
        return check_list(value.scalars<int64_t>(kFirst), [](uint8_t k) { return k == kInt; });
      case kTensors:
        return check_list(value.scalars<int32_t>(kFirst), [](uint8_t k) { return k == kTensor; });
      case kOptionalTensors:
        return check_list(value.scalars<int32_t>(kFirst),
                          [](uint8_t k) { return k == kTensor || k == kNone; });
      default:
        fail("a value of an unknown kind");
    }
  }

  /// Lists have indices of values.
  template <typename T, typename Accepts>
  void check_list(const Vector<T>& items, const Accepts& accepts) const {
    for (size_t i = 0; i < items.size(); ++i) {
      require(items[i] >= 0 && items[i] <= INT32_MAX, "an index of no value");
      require(accepts(kind(static_cast<int32_t>(items[i]))), "a list of values of another kind");
    }
  }

  void check_tensor(size_t i, const Table& t) {
    const auto sizes = t.scalars<int32_t>(tensor::kSizes);
    const auto order = t.scalars<uint8_t>(tensor::kDimOrder);
    const auto dtype = static_cast<ScalarType>(t.scalar<int8_t>(tensor::kDtype));
    require(kDtypes.count(dtype) == 1, "a tensor of an unknown dtype");
    require(sizes.size() <= kMostDimensions && order.size() == sizes.size(),
            "a tensor of an impossible rank");
    size_t bytes = executorch::runtime::elementSize(dtype);
    for (size_t d = 0; d < sizes.size(); ++d) {
      require(order[d] == d, "a tensor that is not contiguous");
      require(sizes[d] >= 0 &&
                  !__builtin_mul_overflow(bytes, static_cast<size_t>(sizes[d]), &bytes) &&
                  bytes <= INT64_MAX,
              "a tensor of an impossible shape");
    }
    require(t.scalar<int32_t>(tensor::kStorageOffset) == 0, "a tensor with a storage offset");
    require(!t.has(tensor::kExtra), "a tensor outside of the program");
    const auto dynamism = t.scalar<int8_t>(tensor::kDynamism);
    require(dynamism == 0 || dynamism == 1, "a tensor without a largest shape");
    bytes_[i] = bytes;
    dtypes_[i] = dtype;
    place_tensor(i, t);
  }

  /// A tensor is an input, or has planned memory, or is a constant, or a view of another one.
  void place_tensor(size_t i, const Table& t) {
    const size_t bytes = bytes_[i];
    const auto is_aligned = [width = executorch::runtime::elementSize(dtypes_[i])](uint64_t at) {
      return at % width == 0;
    };
    const auto constant = t.scalar<uint32_t>(tensor::kConstant);
    if (const auto place = t.find_table(tensor::kAllocation)) {
      require(constant == 0, "a tensor that has memory and is a constant");
      const auto memory = place->scalar<uint32_t>(allocation::kMemory);
      const uint64_t begin = place->scalar<uint32_t>(allocation::kLow) |
                             uint64_t{place->scalar<uint32_t>(allocation::kHigh)} << 32;
      uint64_t end = 0;
      require(!__builtin_add_overflow(begin, bytes, &end), "a tensor outside of its memory");
      require(memory >= 1, "a tensor in no memory");
      require(is_aligned(begin), "a tensor that is not aligned");
      if (ends_.size() <= memory) {
        require(memory < method_.scalars<int64_t>(plan::kBufferSizes).size(),
                "a tensor in no memory");
        ends_.resize(memory + 1);
      }
      ends_[memory] = std::max(ends_[memory], end);
      is_planned_[i] = true;
    } else if (constant != 0) {
      require(constant < data_.constants.size() && bytes <= data_.constants[constant].size,
              "a constant outside of the program");
      require(is_aligned(data_.constants[constant].begin), "a constant that is not aligned");
    } else {
      return;
    }
    has_memory_[i] = true;
  }

  /// Planned memory holds its tensors, and hardly more.
  void check_memory() {
    const auto sizes = method_.scalars<int64_t>(plan::kBufferSizes);
    require(sizes.size() >= 1, "no memory");
    require(!method_.has(plan::kBufferDevices), "memory on another device");
    ends_.resize(sizes.size());
    for (size_t i = 0; i < sizes.size(); ++i) {
      require(sizes[i] >= 0 && static_cast<uint64_t>(sizes[i]) >= ends_[i],
              "a tensor outside of its memory");
      require(static_cast<uint64_t>(sizes[i]) - ends_[i] <= kBufferSlack,
              "memory that no tensor needs");
    }
  }

  void check_delegate(const Table& d) const {
    d.text(delegate::kId);
    const Table place = d.table(delegate::kProcessed);
    require(place.scalar<int8_t>(kFirst) == 1, "a delegate's data in an unknown place");
    require(place.scalar<uint32_t>(kSecond) < data_.segments.size(), "a delegate without data");
    const Tables specs = d.tables(delegate::kCompileSpecs);
    for (size_t i = 0; i < specs.size(); ++i) {
      specs[i].text(kFirst);
      specs[i].scalars<uint8_t>(kSecond);
    }
  }

  /// A tensor, or the tensors of a list, must have memory by now.
  void require_memory(int32_t value) const {
    const auto i = static_cast<size_t>(value);
    if (kind(value) == kTensor) require(has_memory_[i], "a tensor without memory");
    if (kind(value) != kTensors && kind(value) != kOptionalTensors) return;
    const auto items = values_[i].table(kSecond).scalars<int32_t>(kFirst);
    for (size_t k = 0; k < items.size(); ++k) {
      if (kind(items[k]) == kTensor) require_memory(items[k]);
    }
  }

  void check_instruction(const Table& instruction) {
    const auto type = instruction.scalar<uint8_t>(kFirst);
    require(type == kKernelCall || type == kDelegateCall, "an instruction that is no call");
    const Table call = instruction.table(kSecond);
    const auto index = static_cast<uint32_t>(call.scalar<int32_t>(kFirst));
    const auto arguments = call.scalars<int32_t>(kSecond);
    std::string name;
    if (type == kKernelCall) {
      const Table op = method_.tables(plan::kOperators)[index];
      name = std::string(op.text(kFirst)) + "." + std::string(op.text(kSecond));
      check_arguments(name, arguments);
    } else {
      require(index < method_.tables(plan::kDelegates).size(), "a call of no delegate");
    }
    if (name == kView) {
      check_view(static_cast<size_t>(arguments[0]), arguments[2]);
    } else if (type == kKernelCall) {
      check_results(arguments);
    }
    for (size_t i = 0; i < arguments.size(); ++i) require_memory(arguments[i]);
  }

  void check_view(size_t from, int32_t to) {
    const auto i = static_cast<size_t>(to);
    require(has_memory_[from] && bytes_[from] == bytes_[i] && dtypes_[from] == dtypes_[i],
            "a view of another tensor's size");
    has_memory_[i] = true;
  }

  /// The tensor that is a value, or those of a list.
  std::vector<int32_t> tensors_of(int32_t value) const {
    if (kind(value) != kTensors) return {value};
    const auto items = values_[static_cast<size_t>(value)].table(kSecond).scalars<int32_t>(kFirst);
    std::vector<int32_t> tensors;
    for (size_t i = 0; i < items.size(); ++i) tensors.push_back(items[i]);
    return tensors;
  }

  /// A kernel returns what it was given to write to, one by one or as a list: planned memory, since
  /// constants and weights cannot be written to.
  void check_results(const Vector<int32_t>& arguments) const {
    require(arguments.size() >= 2, "a kernel without results");
    const size_t last = arguments.size() - 1;
    const std::vector<int32_t> results = tensors_of(arguments[last]);
    std::vector<int32_t> given = tensors_of(arguments[last - 1]);
    if (kind(arguments[last - 1]) != kTensors && results.size() <= last) {
      given.clear();
      for (size_t i = last - results.size(); i < last; ++i) given.push_back(arguments[i]);
    }
    require(given == results, "a kernel that returns what it is not given");
    for (const int32_t value : results) {
      require(kind(value) == kTensor && is_planned_[static_cast<size_t>(value)],
              "a result that is not in planned memory");
    }
  }

  void check_arguments(const std::string& name, const Vector<int32_t>& arguments) const {
    const std::string_view signature = kernel_signature(name);
    if (signature == "*") return;
    bool fits = arguments.size() == signature.size();
    for (size_t i = 0; fits && i < signature.size(); ++i) {
      fits = accepts(signature[i], kind(arguments[i]));
    }
    if (!fits) fail("it gives the kernel " + name + " other arguments than it takes");
  }

  static bool accepts(char taken, uint8_t given) {
    switch (taken) {
      case 't':
        return given == kTensor;
      case 'o':
        return given == kTensor || given == kNone;
      case 'i':
        return given == kInt;
      case 'n':
        return given == kInt || given == kDouble || given == kBool;
      case 'b':
        return given == kBool;
      case 'm':
        return given == kInt || given == kNone;
      case 'l':
        return given == kInts;
      case 'L':
        return given == kInts || given == kNone;
      default:
        return given == kTensors;
    }
  }

  const Table& method_;
  const Data& data_;
  Tables values_;
  // By value; the last three of tensors.
  std::vector<uint8_t> kinds_;
  std::vector<bool> has_memory_, is_planned_;
  std::vector<size_t> bytes_;  // of the largest shape
  std::vector<ScalarType> dtypes_;
  std::vector<uint64_t> ends_;  // of the tensors in each planned memory
};

/// The segments, all of which must lie behind the program and end in the file.
void check_segments(const Table& root, size_t size, const Header& header, Data& data) {
  const Tables segments = root.tables(program::kSegments);
  const bool behind = header.segment_base >= header.program_size && header.segment_base <= size;
  const uint64_t room = size - std::min<uint64_t>(header.segment_base, size);
  for (size_t i = 0; i < segments.size(); ++i) {
    const auto begin = segments[i].scalar<uint64_t>(segment::kOffset);
    const auto length = segments[i].scalar<uint64_t>(segment::kSize);
    require(behind || length == 0, "its data begins outside of it");
    require(begin <= room && length <= room - begin, "data that ends behind its end");
    data.segments.push_back({header.segment_base + begin, length});
  }
  const Tables named = root.tables(program::kNamedData);
  std::set<std::string_view> names;
  for (size_t i = 0; i < named.size(); ++i) {
    require(named[i].scalar<uint32_t>(named_data::kSegment) < data.segments.size() &&
                names.insert(named[i].text(named_data::kKey)).second,
            "a name of no data, or of two");
  }
}

void check_constants(const Table& root, Data& data) {
  require(root.tables(program::kInlineConstants).size() == 0 &&
              root.tables(program::kMutableData).size() == 0,
          "tensors with content where `et-moe export` leaves none");
  const auto constants = root.find_table(program::kConstants);
  if (!constants) return;
  const auto offsets = constants->scalars<uint64_t>(subsegments::kOffsets);
  if (offsets.size() == 0) return;
  const auto index = constants->scalar<uint32_t>(subsegments::kSegment);
  require(index < data.segments.size(), "constants in no segment");
  for (size_t i = 0; i < offsets.size(); ++i) {
    const Extent& segment = data.segments[index];
    require(offsets[i] <= segment.size, "a constant outside of the program");
    data.constants.push_back({segment.begin + offsets[i], segment.size - offsets[i]});
  }
}

}  // namespace

void check_program(const uint8_t* data, size_t size) {
  const Buffer file(data, size);
  if (std::memcmp(file.bytes(4, 4), "ET12", 4) != 0) fail("another identifier");
  auto header = file.read<Header>(8);
  if (std::memcmp(header.magic, "eh00", 4) != 0) {
    header.program_size = size;  // without a header there is no data but the tables
    header.segment_base = 0;
  }
  require(header.program_size <= size, "truncated: its program ends behind its end");
  const Buffer buffer(data, header.program_size);
  const Table root = Table::root(buffer);
  Data shared;
  check_segments(root, size, header, shared);
  check_constants(root, shared);
  const Tables methods = root.tables(program::kPlans);
  for (size_t i = 0; i < methods.size(); ++i) {
    const Table method = methods[i];
    try {
      MethodCheck(method, shared).run();
    } catch (const std::exception& e) {
      std::string name = std::to_string(i);
      try {
        name = method.text(plan::kName).substr(0, 100);
      } catch (const std::exception&) {
        // Its name is what is wrong.
      }
      throw std::runtime_error("method " + name + ": " + e.what());
    }
  }
}

}  // namespace et_moe

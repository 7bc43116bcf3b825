// Where the fields of a program's tables are: ExecuTorch's schema/program.fbs.
#pragma once

#include <cstdint>

namespace et_moe::schema {

// Slots of the tables of program.fbs, by table.
namespace program {
constexpr int kPlans = 1, kInlineConstants = 2, kSegments = 4, kConstants = 5, kMutableData = 6,
              kNamedData = 7;
}
namespace segment {
constexpr int kOffset = 0, kSize = 1;
}
namespace subsegments {
constexpr int kSegment = 0, kOffsets = 1;
}
namespace named_data {
constexpr int kKey = 0, kSegment = 1;
}
namespace plan {
constexpr int kName = 0, kContainer = 1, kValues = 2, kInputs = 3, kOutputs = 4, kChains = 5,
              kOperators = 6, kDelegates = 7, kBufferSizes = 8, kBufferDevices = 9;
}
namespace tensor {
constexpr int kDtype = 0, kStorageOffset = 1, kSizes = 2, kDimOrder = 3, kConstant = 5,
              kAllocation = 6, kDynamism = 8, kExtra = 9;
}
namespace allocation {
constexpr int kMemory = 0, kLow = 1, kHigh = 2;
}
namespace delegate {
constexpr int kId = 0, kProcessed = 1, kCompileSpecs = 2;
}
// Tables with one or two fields.
constexpr int kFirst = 0, kSecond = 1;

/// Types of values, and of instructions, in the order of the unions.
enum Kind : uint8_t {
  kNone = 1,
  kInt,
  kBool,
  kDouble,
  kTensor,
  kString,
  kInts,
  kDoubles,
  kBools,
  kTensors,
  kOptionalTensors
};
constexpr uint8_t kKernelCall = 1, kDelegateCall = 2;

/// The extended header: ExecuTorch's schema/extended_header.h.
struct Header {
  char magic[4];
  uint32_t length;
  uint64_t program_size, segment_base;
};
static_assert(sizeof(Header) == 24);

}  // namespace et_moe::schema

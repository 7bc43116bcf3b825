#include "runner/log.h"

#include <executorch/runtime/platform/platform.h>

#include <cstdio>
#include <mutex>

namespace et_moe {
namespace {

std::mutex mutex;  // kernels log from the thread pool
std::string first_error;

void emit(et_timestamp_t, et_pal_log_level_t level, const char*, const char*, size_t,
          const char* message, size_t length) {
  if (level == kFatal) std::fprintf(stderr, "%.*s\n", static_cast<int>(length), message);
  if (level != kError) return;
  const std::lock_guard<std::mutex> lock(mutex);
  if (first_error.empty()) first_error.assign(message, length);
}

}  // namespace

void capture_log() {
  static const bool registered =
      executorch::runtime::register_pal(executorch::runtime::PalImpl::create(emit, __FILE__));
  static_cast<void>(registered);
}

std::string take_log() {
  const std::lock_guard<std::mutex> lock(mutex);
  const std::string text = first_error.empty() ? "" : " (" + first_error + ")";
  first_error.clear();
  return text;
}

}  // namespace et_moe

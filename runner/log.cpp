#include "runner/log.h"

#include <executorch/runtime/platform/platform.h>

#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <stdexcept>

namespace et_moe {
namespace {

std::mutex mutex;  // kernels log from the thread pool
std::string first_error, fatal;

thread_local bool aborts_throw = false;

void emit(et_timestamp_t, et_pal_log_level_t level, const char*, const char*, size_t,
          const char* message, size_t length) {
  if (level != kError && level != kFatal) return;
  const std::lock_guard<std::mutex> lock(mutex);
  if (level == kFatal) fatal.assign(message, length);
  if (level == kError && first_error.empty()) first_error.assign(message, length);
}

/// What ExecuTorch calls where one of its checks (ET_CHECK) fails.
void end() {
  const std::lock_guard<std::mutex> lock(mutex);
  if (aborts_throw) throw std::runtime_error(fatal);
  std::fprintf(stderr, "%s\n", fatal.c_str());
  std::abort();
}

}  // namespace

AbortsThrow::AbortsThrow() { aborts_throw = true; }
AbortsThrow::~AbortsThrow() { aborts_throw = false; }

void capture_log() {
  using executorch::runtime::PalImpl;
  static const bool registered = [] {
    PalImpl platform = PalImpl::create(emit, __FILE__);
    platform.abort = end;
    return executorch::runtime::register_pal(platform);
  }();
  static_cast<void>(registered);
}

std::string take_log() {
  const std::lock_guard<std::mutex> lock(mutex);
  const std::string text = first_error.empty() ? "" : " (" + first_error + ")";
  first_error.clear();
  return text;
}

}  // namespace et_moe

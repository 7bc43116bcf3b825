// Writes every kernel that a process runs to the file that ET_MOE_KERNEL_TRACE names: start and end
// in nanoseconds, name, separated by tabs. The CUDA driver loads this library into a process that
// runs with CUDA_INJECTION64_PATH=<this library>, and calls InitializeInjection. Kernels of a CUDA
// graph are listed one by one. profile.py builds and uses it.

#include <cupti.h>

#include <cstdio>
#include <cstdlib>

namespace {

constexpr size_t kBufferBytes = 8 << 20;
constexpr size_t kAlignment = 8;

std::FILE* trace = nullptr;
size_t dropped = 0;

bool succeeded(CUptiResult result, const char* what) {
  if (result == CUPTI_SUCCESS) return true;
  const char* message = nullptr;
  cuptiGetResultString(result, &message);
  std::fprintf(stderr, "kernel trace: %s: %s\n", what, message ? message : "unknown error");
  return false;
}

void CUPTIAPI buffer_requested(uint8_t** buffer, size_t* size, size_t* max_records) {
  *buffer = static_cast<uint8_t*>(std::aligned_alloc(kAlignment, kBufferBytes));
  *size = *buffer ? kBufferBytes : 0;
  *max_records = 0;  // as many as fit
}

void CUPTIAPI buffer_completed(CUcontext context, uint32_t stream, uint8_t* buffer, size_t,
                               size_t valid) {
  CUpti_Activity* record = nullptr;
  while (cuptiActivityGetNextRecord(buffer, valid, &record) == CUPTI_SUCCESS) {
    if (record->kind != CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL) continue;
    // Later versions of the record begin with the fields of this one.
    const auto* kernel = reinterpret_cast<const CUpti_ActivityKernel9*>(record);
    std::fprintf(trace, "%llu\t%llu\t%s\n", static_cast<unsigned long long>(kernel->start),
                 static_cast<unsigned long long>(kernel->end), kernel->name);
  }
  size_t count = 0;
  if (cuptiActivityGetNumDroppedRecords(context, stream, &count) == CUPTI_SUCCESS) dropped += count;
  std::free(buffer);
}

void finish() {
  const bool flushed = succeeded(cuptiActivityFlushAll(1), "flush");
  // The last line tells a whole trace from one that was cut off.
  if (flushed) std::fprintf(trace, "end\t%zu\tdropped\n", dropped);
  std::fclose(trace);
}

}  // namespace

/// Called by the CUDA driver; 1 means success.
extern "C" __attribute__((visibility("default"))) int InitializeInjection() {
  const char* path = std::getenv("ET_MOE_KERNEL_TRACE");
  trace = path ? std::fopen(path, "w") : nullptr;
  if (!trace) {
    std::fprintf(stderr, "kernel trace: ET_MOE_KERNEL_TRACE names no file that can be written\n");
    return 0;
  }
  const bool started =
      succeeded(cuptiActivityRegisterCallbacks(buffer_requested, buffer_completed), "callbacks") &&
      succeeded(cuptiActivityEnable(CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL), "kernels");
  if (started) std::atexit(finish);
  return started ? 1 : 0;
}

// Everything the fake knows: its device, what is live, how often it was called, what was wrong.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "tests/fake_cuda/cubin.h"
#include "tests/fake_cuda/errors.h"
#include "tests/fake_cuda/handles.h"
#include "tests/fake_cuda/interpreter.h"
#include "tests/fake_cuda/memory.h"
#include "tests/fake_cuda/stream.h"

namespace et_moe::fake_cuda {

/// See fake_cuda.h for the environment.
struct Config {
  int major = 9, minor = 0;
  size_t memory = size_t{4} << 30;
  int driver_version = 13000;
  int devices = 1;
  std::string sidecar, report;  // paths, which are empty if there is no such file
  uint64_t first_draw = 0;      // the hand-over from which on `draw` is drawn, 0 for none
  int64_t draw = 0;

  static Config from_environment();
  /// What new memory is filled with: NaN and -1 if launches are executed, else zeros, which are
  /// tokens that a program can go on with.
  uint8_t filling() const { return sidecar.empty() ? 0 : 0xff; }
  /// The most bytes of shared memory that a block can ask for on this device.
  uint32_t shared_memory_limit() const;
};

/// The call that is to fail.
struct Fault {
  std::string function;             // empty means any function
  uint64_t countdown = 0;           // 1 means the next call, 0 none
  cudaError_t error = cudaSuccess;  // cudaSuccess means the function's default

  static Fault from_environment();
};

struct Function {
  std::shared_ptr<const Cubin> module;
  const Kernel* kernel;
  uint32_t dynamic_shared_memory = 48 << 10;  // the most bytes that a launch may ask for
  bool loaded = true;
};

struct State {
  Config config = Config::from_environment();
  std::mutex mutex;
  Memory memory{config.filling()};
  std::shared_ptr<Stream> default_stream = std::make_shared<Stream>();
  Handles<Stream> streams;
  Handles<Event> events;
  Handles<Graph> graphs, executables;
  Handles<const Cubin> modules;
  std::map<const void*, std::shared_ptr<Function>> functions;  // by handle; gone with their module
  std::optional<Interpreter> interpreter;

  uint64_t calls = 0;
  std::map<std::string, uint64_t> calls_by_name, launches;
  uint64_t launched = 0;
  Fault fault = Fault::from_environment();
  std::string failed;  // name of the call that was made to fail
  std::vector<std::string> violations;
  cudaError_t context_error = cudaSuccess;  // unless cudaSuccess, all calls return it
  bool failing = false;                     // the call at hand is made to fail

  /// Counts a call; returns the error that it is made to fail with.
  cudaError_t count(const char* function);
  /// Notes what a program did wrong; returns `error`.
  cudaError_t violation(cudaError_t error, const std::string& text);
  /// The stream of a handle; null, noted as a violation, for one that is not live.
  std::shared_ptr<Stream> stream(const char* function, cudaStream_t handle);
  /// A capture that forbids this thread to allocate and to wait, or null.
  Capture* forbidding_capture() const;
  /// Runs what is pending on all streams.
  cudaError_t run_all();
  /// Describes what is not released.
  std::vector<std::string> leaks() const;
};

/// The state of this process. It is never destroyed, as programs make calls while they end.
State& state();

enum Trait : unsigned {
  kPlain = 0,
  kReleases = 1,         // the call does its work even if it is made to fail
  kUnsafeInCapture = 2,  // the call allocates or waits
};

/// Handles a call of `function`: counts it and then makes it fail, refuses it, or lets `body` do
/// it, which takes the state and returns an error.
template <typename Body>
cudaError_t call(const char* function, unsigned traits, const Body& body) {
  State& s = state();
  const std::lock_guard<std::mutex> lock(s.mutex);
  const cudaError_t injected = s.count(function);
  if (traits & kUnsafeInCapture) {
    if (Capture* capture = s.forbidding_capture()) {
      capture->valid = false;
      return s.violation(cudaErrorStreamCaptureUnsupported,
                         std::string(function) + ": called during a capture");
    }
  }
  s.failing = injected != cudaSuccess || s.context_error != cudaSuccess;
  cudaError_t result = cudaSuccess;
  if (!s.failing || (traits & kReleases)) result = body(s);
  if (injected != cudaSuccess) result = injected;
  if (ends_context(result) && s.context_error == cudaSuccess) s.context_error = result;
  return s.context_error != cudaSuccess ? s.context_error : result;
}

}  // namespace et_moe::fake_cuda

#include "tests/fake_cuda/state.h"

#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <stdexcept>

#include "backends/json.h"
#include "tests/fake_cuda/fake_cuda.h"

namespace et_moe::fake_cuda {
namespace {

constexpr int kBadStatus = 86;

std::string variable(const char* name) {
  const char* value = std::getenv(name);
  return value ? value : "";
}

uint64_t number(const char* name, const std::string& text, uint64_t otherwise) {
  if (text.empty()) return otherwise;
  char* end = nullptr;
  const uint64_t value = std::strtoull(text.c_str(), &end, 10);
  if (*end != 0) throw std::runtime_error(std::string(name) + ": not a number: " + text);
  return value;
}

uint64_t number(const char* name, uint64_t otherwise) {
  return number(name, variable(name), otherwise);
}

void write_report(const State& s, const std::vector<std::string>& leaks) {
  const nlohmann::json report = {
      {"calls", s.calls},
      {"calls_by_name", s.calls_by_name},
      {"launches", s.launches},
      {"failed", s.failed.empty() ? nlohmann::json() : nlohmann::json(s.failed)},
      {"violations", s.violations},
      {"leaks", leaks}};
  std::ofstream(s.config.report) << to_text(report) << "\n";
}

State* instance = nullptr;

/// Runs after the destructors of the program and of the libraries that use this one.
__attribute__((destructor)) void at_exit() {
  if (!instance) return;
  State& s = *instance;
  const std::lock_guard<std::mutex> lock(s.mutex);
  s.interpreter.reset();
  const std::vector<std::string> leaks = s.leaks();
  if (!s.config.report.empty()) write_report(s, leaks);
  for (const auto& text : s.violations) std::fprintf(stderr, "fake CUDA: %s\n", text.c_str());
  for (const auto& text : leaks)
    std::fprintf(stderr, "fake CUDA: not released: %s\n", text.c_str());
  if (s.violations.empty() && leaks.empty()) return;
  std::fflush(nullptr);
  _exit(kBadStatus);
}

}  // namespace

Config Config::from_environment() {
  Config config;
  const std::string arch = variable("ET_MOE_FAKE_CUDA_ARCH");
  if (!arch.empty()) {
    const int number = arch.compare(0, 3, "sm_") == 0 ? std::atoi(arch.c_str() + 3) : 0;
    if (number < 10) throw std::runtime_error("ET_MOE_FAKE_CUDA_ARCH: expected such as sm_90");
    config.major = number / 10;
    config.minor = number % 10;
  }
  config.memory = number("ET_MOE_FAKE_CUDA_MEMORY", config.memory);
  config.driver_version = static_cast<int>(number("ET_MOE_FAKE_CUDA_DRIVER", 13000));
  config.devices = static_cast<int>(number("ET_MOE_FAKE_CUDA_DEVICES", 1));
  config.sidecar = variable("ET_MOE_FAKE_CUDA_EXECUTE");
  config.report = variable("ET_MOE_FAKE_CUDA_REPORT");
  const std::string draw = variable("ET_MOE_FAKE_CUDA_DRAW");
  if (const size_t colon = draw.find(':'); colon != std::string::npos) {
    config.first_draw = number("ET_MOE_FAKE_CUDA_DRAW", draw.substr(0, colon), 0);
    config.draw = std::atoll(draw.c_str() + colon + 1);
  }
  return config;
}

uint32_t Config::shared_memory_limit() const {
  const int architecture = 10 * major + minor;
  if (architecture == 80) return 163 << 10;
  return major == 9 || major == 10 ? 227 << 10 : 99 << 10;
}

Fault Fault::from_environment() {
  constexpr char kName[] = "ET_MOE_FAKE_CUDA_FAIL";
  Fault fault;
  const std::string text = variable(kName);
  const size_t colon = text.find(':');
  if (colon != std::string::npos) fault.function = text.substr(0, colon);
  fault.countdown = number(kName, colon == std::string::npos ? text : text.substr(colon + 1), 0);
  const std::string error = variable("ET_MOE_FAKE_CUDA_ERROR");
  if (!error.empty()) fault.error = error_of(error);
  return fault;
}

cudaError_t State::count(const char* function) {
  ++calls;
  ++calls_by_name[function];
  if (fault.countdown == 0 || (!fault.function.empty() && fault.function != function)) {
    return cudaSuccess;
  }
  if (--fault.countdown > 0) return cudaSuccess;
  failed = function;
  return fault.error == cudaSuccess ? default_error(function) : fault.error;
}

cudaError_t State::violation(cudaError_t error, const std::string& text) {
  violations.push_back(text);
  return error;
}

std::shared_ptr<Stream> State::stream(const char* function, cudaStream_t handle) {
  if (!handle) return default_stream;
  auto found = streams.find(handle);
  if (!found) violation(cudaSuccess, std::string(function) + ": not a live stream");
  return found;
}

Capture* State::forbidding_capture() const {
  for (const auto& [handle, stream] : streams.all()) {
    Capture* capture = stream->capture.get();
    if (!capture || capture->mode == cudaStreamCaptureModeRelaxed) continue;
    if (capture->mode == cudaStreamCaptureModeGlobal ||
        capture->thread == std::this_thread::get_id()) {
      return capture;
    }
  }
  return nullptr;
}

cudaError_t State::run_all() {
  cudaError_t result = default_stream->run();
  for (const auto& [handle, stream] : streams.all()) {
    const cudaError_t error = stream->run();
    if (result == cudaSuccess) result = error;
  }
  return result;
}

std::vector<std::string> State::leaks() const {
  std::vector<std::string> found;
  for (const auto& [address, size] : memory.allocations()) {
    found.push_back(std::to_string(size) + " bytes of device memory");
  }
  for (const auto& [address, size] : memory.pinned()) {
    found.push_back(std::to_string(size) + " bytes of page-locked memory");
  }
  found.insert(found.end(), streams.all().size(), "a stream");
  found.insert(found.end(), events.all().size(), "an event");
  found.insert(found.end(), graphs.all().size(), "a graph");
  found.insert(found.end(), executables.all().size(), "an instantiated graph");
  found.insert(found.end(), modules.all().size(), "a module");
  return found;
}

State& state() {
  static State* s = instance = new State;
  return *s;
}

}  // namespace et_moe::fake_cuda

using et_moe::fake_cuda::State;
using et_moe::fake_cuda::state;

uint64_t fake_cuda_calls() {
  State& s = state();
  const std::lock_guard<std::mutex> lock(s.mutex);
  return s.calls;
}

void fake_cuda_fail(const char* function, uint64_t n, int error) {
  State& s = state();
  const std::lock_guard<std::mutex> lock(s.mutex);
  s.fault = {function ? function : "", n, static_cast<cudaError_t>(error)};
}

bool fake_cuda_take_violation(char* text, size_t size) {
  State& s = state();
  const std::lock_guard<std::mutex> lock(s.mutex);
  if (s.violations.empty()) return false;
  std::snprintf(text, size, "%s", s.violations.front().c_str());
  s.violations.erase(s.violations.begin());
  return true;
}

size_t fake_cuda_live() {
  State& s = state();
  const std::lock_guard<std::mutex> lock(s.mutex);
  return s.leaks().size();
}

uint64_t fake_cuda_launches() {
  State& s = state();
  const std::lock_guard<std::mutex> lock(s.mutex);
  return s.launched;
}

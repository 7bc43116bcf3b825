// Code of a method that gives its inputs back as its outputs, as far as there are any. With three
// inputs it fails, after that; four it does not take.

#include <cstddef>
#include <cstdint>
#include <stdexcept>

extern "C" {

int32_t AOTInductorModelContainerCreateWithDevice(void** handle, size_t, const char*, const char*) {
  *handle = handle;
  return 0;
}

int32_t AOTInductorModelContainerDelete(void*) { return 0; }

int32_t AOTInductorModelContainerRunSingleThreaded(void*, void** inputs, size_t input_count,
                                                   void** outputs, size_t output_count, void*,
                                                   void*) {
  if (input_count == 4) throw std::runtime_error("expected 3 inputs");
  for (size_t i = 0; i < input_count && i < output_count; ++i) {
    outputs[i] = inputs[i];
    inputs[i] = nullptr;
  }
  return input_count == 3;
}

int32_t AOTInductorGetLastError(const char** text) {
  *text = "out of luck";
  return 0;
}
}

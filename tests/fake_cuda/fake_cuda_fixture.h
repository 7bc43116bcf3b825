// What the tests of the fake CUDA share: violations as text, and a device buffer with a stream.
#pragma once

#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <functional>
#include <string>
#include <vector>

#include "tests/fake_cuda/fake_cuda.h"

/// The oldest violation, or nothing.
inline std::string violation() {
  char text[300] = "";
  return fake_cuda_take_violation(text, sizeof text) ? text : "";
}

#define EXPECT_VIOLATION(text) EXPECT_THAT_CONTAINS(violation(), text)
inline void EXPECT_THAT_CONTAINS(const std::string& found, const std::string& expected) {
  EXPECT_NE(found.find(expected), std::string::npos) << "found: " << found;
}

/// A device buffer and a stream. After each test nothing may be live, and no violation left unseen.
class FakeCuda : public testing::Test {
 protected:
  void SetUp() override {
    ASSERT_EQ(fake_cuda_live(), 0u);
    ASSERT_EQ(cudaMalloc(reinterpret_cast<void**>(&device_), kSize), cudaSuccess);
    ASSERT_EQ(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), cudaSuccess);
  }
  void TearDown() override {
    fake_cuda_fail(nullptr, 0, 0);
    EXPECT_EQ(cudaStreamDestroy(stream_), cudaSuccess);
    EXPECT_EQ(cudaFree(device_), cudaSuccess);
    EXPECT_EQ(fake_cuda_live(), 0u);
    EXPECT_EQ(violation(), "");
    cudaGetLastError();
  }
  /// What the device buffer holds.
  std::vector<unsigned char> content(size_t size = kSize) {
    std::vector<unsigned char> bytes(size);
    EXPECT_EQ(cudaMemcpy(bytes.data(), device_, size, cudaMemcpyDeviceToHost), cudaSuccess);
    return bytes;
  }
  /// Captures the work that `body` puts on the stream.
  cudaError_t capture(const std::function<void()>& body, cudaGraph_t* graph) {
    EXPECT_EQ(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal), cudaSuccess);
    body();
    return cudaStreamEndCapture(stream_, graph);
  }

  static constexpr size_t kSize = 1000;
  unsigned char* device_ = nullptr;
  cudaStream_t stream_ = nullptr;
};

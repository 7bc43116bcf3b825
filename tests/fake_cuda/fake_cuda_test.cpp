// Checks of the fake CUDA on memory, streams, events and graphs, each made to fire.

#include <cstring>
#include <thread>

#include "tests/fake_cuda/fake_cuda_fixture.h"

namespace {

TEST_F(FakeCuda, DeviceMemoryIsOutOfReachAndFilled) {
  EXPECT_EQ(content(), std::vector<unsigned char>(kSize, 0));
  EXPECT_DEATH(device_[0] = 1, "");
}

TEST_F(FakeCuda, CopiesStayInBounds) {
  std::vector<char> host(2 * kSize);
  const auto copy = [&](void* to, size_t size) {
    return cudaMemcpy(to, host.data(), size, cudaMemcpyHostToDevice);
  };
  EXPECT_EQ(copy(device_ + 1, kSize - 1), cudaSuccess);
  EXPECT_EQ(copy(device_ + 1, kSize), cudaErrorInvalidValue);
  EXPECT_VIOLATION("cudaMemcpy: the target: 1000 bytes, 999 are left of 1000 bytes");
  EXPECT_EQ(cudaGetLastError(), cudaErrorInvalidValue);
  EXPECT_EQ(copy(device_ + kSize, 1), cudaErrorInvalidValue);
  EXPECT_VIOLATION("not a live address of device memory");
  EXPECT_EQ(cudaMemsetAsync(device_, 0, kSize + 1, stream_), cudaErrorInvalidValue);
  EXPECT_VIOLATION("cudaMemsetAsync: 1001 bytes");
}

TEST_F(FakeCuda, CopiesTakeTheKindOfMemoryTheySay) {
  char host[8] = {};
  EXPECT_EQ(cudaMemcpy(host, device_, 8, cudaMemcpyHostToDevice), cudaErrorInvalidValue);
  EXPECT_VIOLATION("the target: not a live address of device memory");
  EXPECT_EQ(cudaMemcpyAsync(device_, device_, 8, cudaMemcpyDeviceToHost, stream_),
            cudaErrorInvalidValue);
  EXPECT_VIOLATION("the target: device memory, expected host memory");
  EXPECT_EQ(cudaMemcpy(device_, nullptr, 8, cudaMemcpyHostToDevice), cudaErrorInvalidValue);
  EXPECT_VIOLATION("the source: a null pointer");
  EXPECT_EQ(cudaMemcpy(host, device_, 8, cudaMemcpyDefault), cudaSuccess);
}

TEST_F(FakeCuda, PageLockedMemoryHasBounds) {
  void* pinned = nullptr;
  ASSERT_EQ(cudaHostAlloc(&pinned, 16, cudaHostAllocDefault), cudaSuccess);
  EXPECT_EQ(cudaMemcpyAsync(device_, pinned, 17, cudaMemcpyHostToDevice, stream_),
            cudaErrorInvalidValue);
  EXPECT_VIOLATION("17 bytes, 16 are left of 16 bytes of page-locked memory");
  EXPECT_EQ(cudaFreeHost(pinned), cudaSuccess);
  EXPECT_EQ(cudaFreeHost(pinned), cudaErrorInvalidValue);
  EXPECT_VIOLATION("cudaFreeHost: not the start of live memory");
}

TEST_F(FakeCuda, FreedMemoryIsDead) {
  void* other = nullptr;
  ASSERT_EQ(cudaMalloc(&other, 64), cudaSuccess);
  EXPECT_EQ(cudaFree(static_cast<char*>(other) + 8), cudaErrorInvalidValue);
  EXPECT_VIOLATION("cudaFree: not the start of live memory");
  EXPECT_EQ(cudaFree(other), cudaSuccess);
  EXPECT_EQ(cudaFree(other), cudaErrorInvalidValue);
  EXPECT_VIOLATION("cudaFree");
  EXPECT_EQ(cudaMemset(other, 0, 1), cudaErrorInvalidValue);
  EXPECT_VIOLATION("not a live address");
  EXPECT_EQ(cudaFree(nullptr), cudaSuccess);
}

TEST_F(FakeCuda, MemoryIsLimited) {
  size_t free = 0, total = 0;
  ASSERT_EQ(cudaMemGetInfo(&free, &total), cudaSuccess);
  EXPECT_EQ(total - free, kSize);
  void* other = nullptr;
  EXPECT_EQ(cudaMalloc(&other, free + 1), cudaErrorMemoryAllocation);
  EXPECT_STREQ(cudaGetErrorName(cudaErrorMemoryAllocation), "cudaErrorMemoryAllocation");
}

TEST_F(FakeCuda, WorkIsPutOffUntilSomethingWaits) {
  void* pinned = nullptr;
  ASSERT_EQ(cudaHostAlloc(&pinned, kSize, cudaHostAllocDefault), cudaSuccess);
  std::memset(pinned, 1, kSize);
  ASSERT_EQ(cudaMemcpyAsync(device_, pinned, kSize, cudaMemcpyHostToDevice, stream_), cudaSuccess);
  EXPECT_EQ(content()[0], 0);  // the default stream does not wait for others
  std::memset(pinned, 2, kSize);
  EXPECT_EQ(cudaStreamSynchronize(stream_), cudaSuccess);
  // The memory was changed before it was copied, and this shows the mistake.
  EXPECT_EQ(content()[0], 2);
  char pageable[kSize];
  std::memset(pageable, 3, kSize);
  ASSERT_EQ(cudaMemcpyAsync(device_, pageable, kSize, cudaMemcpyHostToDevice, stream_),
            cudaSuccess);
  std::memset(pageable, 4, kSize);
  EXPECT_EQ(cudaStreamSynchronize(stream_), cudaSuccess);
  EXPECT_EQ(content()[0], 3);
  EXPECT_EQ(cudaFreeHost(pinned), cudaSuccess);
}

TEST_F(FakeCuda, RowsAreSetAndNothingBetween) {
  ASSERT_EQ(cudaMemsetAsync(device_, 1, kSize, stream_), cudaSuccess);
  ASSERT_EQ(cudaMemset2DAsync(device_, 100, 7, 3, 2, stream_), cudaSuccess);
  ASSERT_EQ(cudaStreamSynchronize(stream_), cudaSuccess);
  for (const auto& [at, value] : {std::pair{0, 7}, {2, 7}, {3, 1}, {99, 1}, {102, 7}, {103, 1}}) {
    EXPECT_EQ(content()[static_cast<size_t>(at)], value);
  }
  EXPECT_EQ(cudaMemset2DAsync(device_, 2, 7, 3, 2, stream_), cudaErrorInvalidValue);
  EXPECT_VIOLATION("cudaMemset2DAsync: not a pitch of such rows");
}

TEST_F(FakeCuda, EventsWaitForTheirPositionOnly) {
  cudaEvent_t event = nullptr;
  ASSERT_EQ(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), cudaSuccess);
  EXPECT_EQ(cudaEventSynchronize(event), cudaSuccess);  // the event was never recorded
  ASSERT_EQ(cudaMemsetAsync(device_, 1, kSize, stream_), cudaSuccess);
  ASSERT_EQ(cudaEventRecord(event, stream_), cudaSuccess);
  ASSERT_EQ(cudaMemsetAsync(device_, 2, kSize, stream_), cudaSuccess);
  EXPECT_EQ(cudaEventQuery(event), cudaErrorNotReady);
  EXPECT_EQ(content()[0], 1);
  EXPECT_EQ(cudaEventQuery(event), cudaSuccess);
  cudaStream_t other = nullptr;
  ASSERT_EQ(cudaStreamCreateWithFlags(&other, cudaStreamNonBlocking), cudaSuccess);
  ASSERT_EQ(cudaEventRecord(event, stream_), cudaSuccess);
  ASSERT_EQ(cudaStreamWaitEvent(other, event, 0), cudaSuccess);
  ASSERT_EQ(cudaEventDestroy(event), cudaSuccess);
  EXPECT_EQ(cudaStreamSynchronize(other), cudaSuccess);
  EXPECT_EQ(content()[0], 2);
  EXPECT_EQ(cudaStreamDestroy(other), cudaSuccess);
  EXPECT_EQ(cudaEventRecord(event, stream_), cudaErrorInvalidResourceHandle);
  EXPECT_VIOLATION("cudaEventRecord: not a live event");
  EXPECT_EQ(cudaStreamSynchronize(other), cudaErrorInvalidResourceHandle);
  EXPECT_VIOLATION("cudaStreamSynchronize: not a live stream");
}

TEST_F(FakeCuda, GraphsAreRecordedAndReplayed) {
  cudaGraph_t graph = nullptr;
  const auto fill = [&] { cudaMemsetAsync(device_, 5, kSize, stream_); };
  ASSERT_EQ(capture(fill, &graph), cudaSuccess);
  EXPECT_EQ(content()[0], 0);  // the work was recorded, not run
  cudaGraphExec_t executable = nullptr;
  ASSERT_EQ(cudaGraphInstantiate(&executable, graph, 0), cudaSuccess);
  ASSERT_EQ(cudaGraphDestroy(graph), cudaSuccess);
  for (int i = 0; i < 2; ++i) {
    ASSERT_EQ(cudaMemset(device_, 0, kSize), cudaSuccess);
    ASSERT_EQ(content()[0], 0);
    EXPECT_EQ(cudaGraphLaunch(executable, stream_), cudaSuccess);
    EXPECT_EQ(cudaStreamSynchronize(stream_), cudaSuccess);
    EXPECT_EQ(content()[0], 5);
  }
  EXPECT_EQ(cudaGraphExecDestroy(executable), cudaSuccess);
  EXPECT_EQ(cudaGraphLaunch(executable, stream_), cudaErrorInvalidValue);
  EXPECT_VIOLATION("cudaGraphLaunch: not a live graph");
}

TEST_F(FakeCuda, CapturesForbidAllocationsAndWaits) {
  void* p = nullptr;
  char c = 0;
  const std::vector<std::function<void()>> calls = {
      [&] { cudaMalloc(&p, 1); }, [&] { cudaHostAlloc(&p, 1, 0); },
      [&] { cudaStreamSynchronize(stream_); }, [] { cudaDeviceSynchronize(); },
      [&] { cudaMemcpy(&c, device_, 1, cudaMemcpyDeviceToHost); }};
  for (const auto& forbidden : calls) {
    cudaGraph_t graph = nullptr;
    EXPECT_EQ(capture(forbidden, &graph), cudaErrorStreamCaptureInvalidated);
    EXPECT_EQ(graph, nullptr);
    EXPECT_VIOLATION("called during a capture");
    EXPECT_EQ(cudaGetLastError(), cudaErrorStreamCaptureInvalidated);
  }
  cudaGraph_t graph = nullptr;  // another thread may allocate during a capture
  const auto elsewhere = [&p] {
    EXPECT_EQ(cudaMalloc(&p, 1), cudaSuccess);
    EXPECT_EQ(cudaFree(p), cudaSuccess);
  };
  EXPECT_EQ(capture([&] { std::thread(elsewhere).join(); }, &graph), cudaSuccess);
  EXPECT_EQ(cudaGraphDestroy(graph), cudaSuccess);
  EXPECT_EQ(cudaStreamEndCapture(stream_, &graph), cudaErrorIllegalState);
  EXPECT_VIOLATION("no capture is on");
}

TEST_F(FakeCuda, ReplaysSeeWhatWasFreed) {
  void* other = nullptr;
  ASSERT_EQ(cudaMalloc(&other, 8), cudaSuccess);
  cudaGraph_t graph = nullptr;
  ASSERT_EQ(capture([&] { cudaMemsetAsync(other, 0, 8, stream_); }, &graph), cudaSuccess);
  cudaGraphExec_t executable = nullptr;
  ASSERT_EQ(cudaGraphInstantiate(&executable, graph, 0), cudaSuccess);
  ASSERT_EQ(cudaFree(other), cudaSuccess);
  EXPECT_EQ(cudaGraphLaunch(executable, stream_), cudaSuccess);
  EXPECT_EQ(cudaStreamSynchronize(stream_), cudaErrorInvalidValue);
  EXPECT_VIOLATION("not a live address of device memory");
  EXPECT_EQ(cudaGraphExecDestroy(executable), cudaSuccess);
  EXPECT_EQ(cudaGraphDestroy(graph), cudaSuccess);
}

TEST_F(FakeCuda, AnyCallCanBeMadeToFail) {
  fake_cuda_fail(nullptr, 2, 0);
  void *first = nullptr, *second = nullptr;
  EXPECT_EQ(cudaMalloc(&first, 8), cudaSuccess);
  EXPECT_EQ(cudaMalloc(&second, 8), cudaErrorMemoryAllocation);
  EXPECT_EQ(second, nullptr);
  EXPECT_EQ(cudaGetLastError(), cudaErrorMemoryAllocation);
  fake_cuda_fail("cudaFree", 1, cudaErrorUnknown);
  EXPECT_EQ(cudaMemset(first, 0, 8), cudaSuccess);
  // The memory is released nevertheless, which TearDown checks.
  EXPECT_EQ(cudaFree(first), cudaErrorUnknown);
  fake_cuda_fail("cudaStreamEndCapture", 1, 0);
  cudaGraph_t graph = nullptr;
  EXPECT_EQ(capture([] {}, &graph), cudaErrorUnknown);
  EXPECT_EQ(graph, nullptr);
}

TEST_F(FakeCuda, CallsAreCounted) {
  const uint64_t before = fake_cuda_calls();
  int device = 0;
  cudaGetDevice(&device);
  cudaGetErrorString(cudaGetLastError());
  EXPECT_EQ(fake_cuda_calls(), before + 1);
}

}  // namespace

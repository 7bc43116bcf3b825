// Each check of the fake CUDA, made to fire.

#include "tests/fake_cuda/fake_cuda.h"

#include <cuda.h>
#include <cuda_runtime_api.h>
#include <elf.h>
#include <gtest/gtest.h>

#include <cstring>
#include <functional>
#include <string>
#include <thread>
#include <vector>

namespace {

/// The oldest violation, or nothing.
std::string violation() {
  char text[300] = "";
  return fake_cuda_take_violation(text, sizeof text) ? text : "";
}

#define EXPECT_VIOLATION(text) EXPECT_THAT_CONTAINS(violation(), text)
void EXPECT_THAT_CONTAINS(const std::string& found, const std::string& expected) {
  EXPECT_NE(found.find(expected), std::string::npos) << "found: " << found;
}

template <typename T>
void append(std::string& to, T value) {
  to.append(reinterpret_cast<const char*>(&value), sizeof value);
}

/// A cubin for sm_90 with the kernel `k` of three parameters (pointer, int32, pointer) and blocks
/// of 128 threads.
std::string cubin(uint8_t architecture = 90, uint32_t parameter_bytes = 24) {
  std::string info;
  const auto attribute = [&info](uint8_t format, uint8_t name, uint16_t value) {
    append(info, format);
    append(info, name);
    append(info, value);
  };
  for (uint16_t i : {2, 1, 0}) {  // as the assembler does, last first
    attribute(4, 0x17, 12);
    append(info, uint32_t{0});
    append(info, i);
    append(info, static_cast<uint16_t>(8 * i));
    append(info, uint32_t{i == 1 ? 4u : 8u} << 18 | 0x1f000);
  }
  attribute(3, 0x1b, 0xff);  // one that is of no interest
  attribute(3, 0x19, static_cast<uint16_t>(parameter_bytes));
  attribute(4, 0x10, 12);
  for (uint32_t threads : {128, 1, 1}) append(info, threads);
  const std::string names("\0.nv.info.k\0.names\0", 19);

  Elf64_Ehdr header{};
  std::memcpy(header.e_ident, ELFMAG, SELFMAG);
  header.e_ident[EI_CLASS] = ELFCLASS64;
  header.e_ident[EI_ABIVERSION] = 7;
  header.e_machine = 190;
  header.e_flags = architecture;
  header.e_shoff = sizeof header + info.size() + names.size();
  header.e_shentsize = sizeof(Elf64_Shdr);
  header.e_shnum = 2;
  header.e_shstrndx = 1;
  Elf64_Shdr sections[2] = {};
  sections[0].sh_name = 1;
  sections[0].sh_offset = sizeof header;
  sections[0].sh_size = info.size();
  sections[1].sh_name = 12;
  sections[1].sh_offset = sizeof header + info.size();
  sections[1].sh_size = names.size();
  std::string image;
  append(image, header);
  image += info + names;
  for (const auto& section : sections) append(image, section);
  return image;
}

/// A device buffer and a stream; afterwards nothing may be live, and no violation left unseen.
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
  /// What device memory holds.
  std::vector<unsigned char> content(size_t size = kSize) {
    std::vector<unsigned char> bytes(size);
    EXPECT_EQ(cudaMemcpy(bytes.data(), device_, size, cudaMemcpyDeviceToHost), cudaSuccess);
    return bytes;
  }
  /// Captures what `body` does.
  cudaError_t capture(const std::function<void()>& body, cudaGraph_t* graph) {
    EXPECT_EQ(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal), cudaSuccess);
    body();
    return cudaStreamEndCapture(stream_, graph);
  }

  static constexpr size_t kSize = 1000;
  unsigned char* device_ = nullptr;
  cudaStream_t stream_ = nullptr;
};

class Launches : public FakeCuda {
 protected:
  void SetUp() override {
    FakeCuda::SetUp();
    const std::string image = cubin();
    ASSERT_EQ(cuModuleLoadData(&module_, image.data()), CUDA_SUCCESS);
    ASSERT_EQ(cuModuleGetFunction(&kernel_, module_, "k"), CUDA_SUCCESS);
  }
  void TearDown() override {
    if (module_) {
      EXPECT_EQ(cuModuleUnload(module_), CUDA_SUCCESS);
    }
    FakeCuda::TearDown();
  }
  CUresult launch(void* pointer, unsigned threads = 128, unsigned blocks = 1, unsigned shared = 0) {
    int number = 3;
    void* scratch = nullptr;
    void* arguments[] = {&pointer, &number, &scratch};
    return cuLaunchKernel(kernel_, blocks, 1, 1, threads, 1, 1, shared, stream_, arguments,
                          nullptr);
  }
  CUmodule module_ = nullptr;
  CUfunction kernel_ = nullptr;
};

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
  EXPECT_EQ(content()[0], 2);  // changed before it was copied: the mistake shows
  char pageable[kSize];
  std::memset(pageable, 3, kSize);
  ASSERT_EQ(cudaMemcpyAsync(device_, pageable, kSize, cudaMemcpyHostToDevice, stream_),
            cudaSuccess);
  std::memset(pageable, 4, kSize);
  EXPECT_EQ(cudaStreamSynchronize(stream_), cudaSuccess);
  EXPECT_EQ(content()[0], 3);
  EXPECT_EQ(cudaFreeHost(pinned), cudaSuccess);
}

TEST_F(FakeCuda, EventsWaitForTheirPositionOnly) {
  cudaEvent_t event = nullptr;
  ASSERT_EQ(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), cudaSuccess);
  EXPECT_EQ(cudaEventSynchronize(event), cudaSuccess);  // never recorded
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
  EXPECT_EQ(content()[0], 0);  // recorded, not run
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
  cudaGraph_t graph = nullptr;  // a thread of its own may allocate
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

TEST_F(Launches, RunWhenWaitedFor) {
  const uint64_t before = fake_cuda_launches();
  EXPECT_EQ(launch(device_), CUDA_SUCCESS);
  EXPECT_EQ(fake_cuda_launches(), before);
  EXPECT_EQ(cudaStreamSynchronize(stream_), cudaSuccess);
  EXPECT_EQ(fake_cuda_launches(), before + 1);
}

TEST_F(Launches, AddressesAreLive) {
  EXPECT_EQ(launch(nullptr), CUDA_SUCCESS);
  EXPECT_EQ(launch(device_ + kSize - 1), CUDA_SUCCESS);
  EXPECT_EQ(launch(device_ + kSize), CUDA_ERROR_INVALID_VALUE);
  EXPECT_VIOLATION("cuLaunchKernel: k: argument 0: not a live address");
}

TEST_F(Launches, HaveTheParametersOfTheBinary) {
  int number = 0;
  void* arguments[] = {&number, &number, nullptr};  // the third is missing
  EXPECT_EQ(cuLaunchKernel(kernel_, 1, 1, 1, 128, 1, 1, 0, stream_, arguments, nullptr),
            CUDA_ERROR_INVALID_VALUE);
  EXPECT_VIOLATION("k: the kernel has 3 parameters, argument 2 cannot be read");
}

TEST_F(Launches, SizesAreWithinLimits) {
  EXPECT_EQ(launch(device_, 64), CUDA_ERROR_INVALID_VALUE);
  EXPECT_VIOLATION("blocks of 64 x 1 x 1 threads, the kernel was compiled for 128 x 1 x 1");
  EXPECT_EQ(launch(device_, 128, 0), CUDA_ERROR_INVALID_VALUE);
  EXPECT_VIOLATION("a grid of 0 x 1 x 1 blocks");
  EXPECT_EQ(launch(device_, 128, 1, 48 << 10), CUDA_SUCCESS);
  EXPECT_EQ(launch(device_, 128, 1, (48 << 10) + 1), CUDA_ERROR_INVALID_VALUE);
  EXPECT_VIOLATION("49153 bytes of shared memory, allowed are 49152");
  constexpr auto kName = CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
  EXPECT_EQ(cuFuncSetAttribute(kernel_, kName, 232448), CUDA_SUCCESS);
  EXPECT_EQ(launch(device_, 128, 1, 232448), CUDA_SUCCESS);
  EXPECT_EQ(cuFuncSetAttribute(kernel_, kName, 232449), CUDA_ERROR_INVALID_VALUE);
  EXPECT_VIOLATION("cuFuncSetAttribute: k: 232449 bytes of shared memory");
}

TEST_F(Launches, MayOverlap) {
  void* pointer = device_;
  int number = 3;
  void* arguments[] = {&pointer, &number, &pointer};
  CUlaunchAttribute attribute{};
  CUlaunchConfig config{1, 1, 1, 128, 1, 1, 0, stream_, &attribute, 1};
  attribute.id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
  EXPECT_EQ(cuLaunchKernelEx(&config, kernel_, arguments, nullptr), CUDA_SUCCESS);
  attribute.id = CU_LAUNCH_ATTRIBUTE_COOPERATIVE;
  EXPECT_EQ(cuLaunchKernelEx(&config, kernel_, arguments, nullptr), CUDA_ERROR_INVALID_VALUE);
  EXPECT_VIOLATION("cuLaunchKernelEx: an attribute that is not known");
}

TEST_F(Launches, FunctionsDieWithTheirModule) {
  cudaGraph_t graph = nullptr;
  ASSERT_EQ(capture([&] { launch(device_); }, &graph), cudaSuccess);
  cudaGraphExec_t executable = nullptr;
  ASSERT_EQ(cudaGraphInstantiate(&executable, graph, 0), cudaSuccess);
  ASSERT_EQ(cudaGraphLaunch(executable, stream_), cudaSuccess);
  ASSERT_EQ(cudaStreamSynchronize(stream_), cudaSuccess);
  ASSERT_EQ(cuModuleUnload(module_), CUDA_SUCCESS);
  EXPECT_EQ(launch(device_), CUDA_ERROR_INVALID_HANDLE);
  EXPECT_VIOLATION("cuLaunchKernel: not a live function");
  EXPECT_EQ(cuModuleUnload(module_), CUDA_ERROR_INVALID_HANDLE);
  EXPECT_VIOLATION("cuModuleUnload: not a module");
  module_ = nullptr;
  EXPECT_EQ(cudaGraphExecDestroy(executable), cudaSuccess);
  EXPECT_EQ(cudaGraphDestroy(graph), cudaSuccess);
}

TEST_F(Launches, ModulesAreForThisDevice) {
  CUmodule other = nullptr;
  EXPECT_EQ(cuModuleLoadData(&other, cubin(80).data()), CUDA_ERROR_NO_BINARY_FOR_GPU);
  EXPECT_EQ(cuModuleLoadData(&other, cubin(90, 32).data()), CUDA_ERROR_INVALID_IMAGE);
  EXPECT_VIOLATION("the parameters of kernel k do not add up");
  EXPECT_EQ(cuModuleLoadData(&other, std::string(64, 'x').data()), CUDA_ERROR_INVALID_IMAGE);
  EXPECT_VIOLATION("cuModuleLoadData: not a cubin");
  CUfunction function = nullptr;
  EXPECT_EQ(cuModuleGetFunction(&function, module_, "other"), CUDA_ERROR_NOT_FOUND);
  EXPECT_VIOLATION("no kernel is named other");
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
  EXPECT_EQ(cudaFree(first), cudaErrorUnknown);  // and it is free: see TearDown
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

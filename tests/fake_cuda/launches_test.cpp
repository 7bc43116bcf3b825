// Checks of the fake CUDA on modules and launches, each made to fire.

#include <cuda.h>
#include <elf.h>

#include <cstring>

#include "tests/fake_cuda/fake_cuda_fixture.h"

namespace {

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
  for (uint16_t i : {2, 1, 0}) {  // the last one first, as the assembler does
    attribute(4, 0x17, 12);
    append(info, uint32_t{0});
    append(info, i);
    append(info, static_cast<uint16_t>(8 * i));
    append(info, uint32_t{i == 1 ? 4u : 8u} << 18 | 0x1f000);
  }
  attribute(3, 0x1b, 0xff);  // an attribute that is of no interest
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

TEST_F(Launches, ErrorsHaveTheNamesOfTheDriver) {
  const char* name = nullptr;
  EXPECT_EQ(cuGetErrorName(CUDA_ERROR_OUT_OF_MEMORY, &name), CUDA_SUCCESS);
  EXPECT_STREQ(name, "CUDA_ERROR_OUT_OF_MEMORY");
  EXPECT_STREQ(cudaGetErrorName(cudaErrorMemoryAllocation), "cudaErrorMemoryAllocation");
}

}  // namespace

// A CUDA driver and runtime without a GPU, for tests: one shared library that takes the places of
// libcudart.so.13 and libcuda.so.1.
//
// Device memory is host memory at addresses that the program cannot touch. Every call is checked:
// handles and pointers are live, copies stay inside one allocation of the right kind, kernels exist
// in their binary and get its number of parameters, launch sizes and shared memory are within the
// limits of binary and device, nothing allocates or synchronises during a capture, and everything
// is released at the end. Freed addresses are not used again. Work on a stream is put off until
// something waits for it, so a missing wait shows.
//
// Launches do nothing, and new memory is zero; or they run the kernel's own source under Triton's
// interpreter, and new memory is filled with 0xff (NaN, -1).
//
// Environment, read at the first call:
//   ET_MOE_FAKE_CUDA_ARCH     compute capability, such as sm_90 (the default)
//   ET_MOE_FAKE_CUDA_MEMORY   bytes of device memory (default 4 GiB)
//   ET_MOE_FAKE_CUDA_DRIVER   CUDA version of the driver, as cudaDriverGetVersion says it (13000)
//   ET_MOE_FAKE_CUDA_DEVICES  number of devices (1)
//   ET_MOE_FAKE_CUDA_EXECUTE  sidecar of `et-moe export`, JSON: launches are executed
//   ET_MOE_FAKE_CUDA_FAIL     the call that fails: N (the N-th of all, from 1) or NAME:N
//   ET_MOE_FAKE_CUDA_ERROR    what it fails with, such as cudaErrorLaunchFailure (the default
//                             depends on the function)
//   ET_MOE_FAKE_CUDA_DRAW     N:TOKEN, where launches are not executed: from the N-th run (from 1)
//                             of the kernel that hands tokens over on, calls draw this token
//   ET_MOE_FAKE_CUDA_REPORT   file for a report at exit, JSON: calls (number of all calls),
//                             calls_by_name, launches (by kernel, as they ran), failed (the name
//                             of the call that was made to fail, or null), violations and leaks
//                             (lists of text)
// A process with violations or leaks prints them to stderr at exit and ends with status 86.
//
// A call that is made to fail does nothing, but one that releases something or waits does that
// first, as in CUDA, where such calls may return errors of earlier work. After an error that ends a
// CUDA context (an illegal address, a launch failure) all calls return it.
//
// Not modelled, and reported as violations: blocking streams, events in captures, peer access,
// memory pools, more than one current device.
#pragma once

#include <cstddef>
#include <cstdint>

// For tests in the same process.
extern "C" {
/// The number of calls made so far. Only calls that can fail count, hence not the queries of
/// errors.
uint64_t fake_cuda_calls();
/// Makes the n-th call from now on (1 is the next) of `function` fail with `error`. If `function`
/// is null, calls of any function count; if `error` is 0, it is the function's default. n = 0
/// cancels it.
void fake_cuda_fail(const char* function, uint64_t n, int error);
/// Writes the oldest violation (a text, cut to `size`) to `text` and forgets it; false if there is
/// none.
bool fake_cuda_take_violation(char* text, size_t size);
/// The number of things that are not released: memory, streams, events, graphs and modules.
size_t fake_cuda_live();
/// The number of kernels that ran, including those in replays of graphs.
uint64_t fake_cuda_launches();
}

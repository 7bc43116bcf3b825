// A library to preload: starts as many threads as ET_MOE_TEST_THREADS says, and refuses the next,
// as the kernel does beyond `ulimit -u`.
#include <dlfcn.h>
#include <pthread.h>

#include <atomic>
#include <cerrno>
#include <cstdlib>

namespace {
std::atomic<int> left{std::atoi(std::getenv("ET_MOE_TEST_THREADS"))};
}

extern "C" int pthread_create(pthread_t* thread, const pthread_attr_t* attributes,
                              void* (*start)(void*), void* argument) {
  using Create = decltype(&pthread_create);
  static const auto create = reinterpret_cast<Create>(dlsym(RTLD_NEXT, "pthread_create"));
  if (left-- <= 0) return EAGAIN;
  return create(thread, attributes, start, argument);
}

// Threads that share a piece of work, as many as there are to be had.
#pragma once

#include <cstddef>
#include <exception>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

namespace et_moe {

/// Calls `work()` in `count` threads, of which this is one, and waits for all of them. There are
/// fewer where the system refuses to start one (`ulimit -u`, memory), so the calls must share what
/// there is to do. Passes on the first exception of a call once all have ended.
template <typename Work>
void run_in_threads(size_t count, const Work& work) {
  std::mutex mutex;
  std::exception_ptr failure;
  const auto guarded = [&] {
    try {
      work();
    } catch (...) {
      const std::lock_guard<std::mutex> lock(mutex);
      if (!failure) failure = std::current_exception();
    }
  };
  std::vector<std::thread> threads;
  threads.reserve(count);
  try {
    for (size_t i = 1; i < count; ++i) threads.emplace_back(guarded);
  } catch (const std::system_error&) {  // those that run do it all
  } catch (const std::bad_alloc&) {
  }
  guarded();
  for (auto& thread : threads) thread.join();
  if (failure) std::rethrow_exception(failure);
}

}  // namespace et_moe

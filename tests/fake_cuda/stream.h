// Streams, events, captures and graphs, whose work is put off until something waits for it.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#include "tests/fake_cuda/errors.h"

namespace et_moe::fake_cuda {

/// Work of a stream. It may run long after its call, and in a graph many times, so it checks again
/// what it touches.
using Work = std::function<cudaError_t()>;

/// What a capture recorded, and what an instantiated graph runs.
struct Graph {
  std::vector<Work> nodes;

  /// Runs all nodes; returns the first error.
  cudaError_t run() const {
    cudaError_t result = cudaSuccess;
    for (const Work& node : nodes) {
      if (ends_context(result)) break;
      const cudaError_t error = node();
      if (result == cudaSuccess) result = error;
    }
    return result;
  }
};

struct Capture {
  std::shared_ptr<Graph> graph = std::make_shared<Graph>();
  cudaStreamCaptureMode mode;
  std::thread::id thread = std::this_thread::get_id();
  bool valid = true;
};

class Stream {
 public:
  /// Records the work if the stream is being captured, else puts it behind what is pending.
  void enqueue(Work work) {
    if (capture) {
      capture->graph->nodes.push_back(std::move(work));
    } else {
      pending_.push_back(std::move(work));
    }
  }
  /// The position behind all work so far.
  uint64_t end() const { return done_ + pending_.size(); }
  bool reached(uint64_t position) const { return done_ >= position; }
  /// Runs what is pending up to a position; returns the first error.
  cudaError_t run_until(uint64_t position) {
    cudaError_t result = cudaSuccess;
    while (!reached(position)) {
      const Work work = std::move(pending_.front());
      pending_.pop_front();
      const cudaError_t error = ends_context(result) ? result : work();
      ++done_;
      if (result == cudaSuccess) result = error;
    }
    return result;
  }
  cudaError_t run() { return run_until(end()); }

  std::unique_ptr<Capture> capture;

 private:
  std::deque<Work> pending_;
  uint64_t done_ = 0;
};

/// The position of a stream at which it was last recorded; none at first.
struct Event {
  std::shared_ptr<Stream> stream;
  uint64_t position = 0;

  bool reached() const { return !stream || stream->reached(position); }
  cudaError_t wait() const { return stream ? stream->run_until(position) : cudaSuccess; }
};

}  // namespace et_moe::fake_cuda

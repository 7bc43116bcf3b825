// The CUDA runtime's functions for streams, events, captures and graphs.

#include <string>

#include "tests/fake_cuda/runtime_call.h"

namespace et_moe::fake_cuda {
namespace {

/// A call that runs `body` on the stream of a handle.
template <typename Body>
cudaError_t stream_call(const char* function, unsigned traits, cudaStream_t handle,
                        const Body& body) {
  return runtime_call(function, traits, [&](State& s) {
    const auto stream = s.stream(function, handle);
    return stream ? body(s, stream) : cudaErrorInvalidResourceHandle;
  });
}

/// A call that runs `body` on the event of a handle.
template <typename Body>
cudaError_t event_call(const char* function, unsigned traits, cudaEvent_t handle,
                       const Body& body) {
  return runtime_call(function, traits, [&](State& s) {
    const auto event = s.events.find(handle);
    if (event) return body(s, *event);
    return s.violation(cudaErrorInvalidResourceHandle,
                       std::string(function) + ": not a live event");
  });
}

/// Tells whether work is done. If it is not, it is done before the next call, so that programs that
/// ask in a loop end.
template <typename Waitable, typename Wait>
cudaError_t query(const Waitable& done, const Wait& wait) {
  if (done()) return cudaSuccess;
  const cudaError_t error = wait();
  return error != cudaSuccess ? error : cudaErrorNotReady;
}

cudaError_t not_in_capture(State& s, const char* function, const Stream& stream) {
  if (!stream.capture) return cudaSuccess;
  stream.capture->valid = false;
  return s.violation(cudaErrorStreamCaptureUnsupported,
                     std::string(function) + ": the stream is being captured");
}

cudaError_t begin_capture(State& s, Stream& stream, cudaStreamCaptureMode mode) {
  if (&stream == s.default_stream.get()) {
    return s.violation(cudaErrorStreamCaptureUnsupported,
                       "cudaStreamBeginCapture: the default stream cannot be captured");
  }
  if (stream.capture) {
    return s.violation(cudaErrorIllegalState, "cudaStreamBeginCapture: a capture is on already");
  }
  stream.capture = std::make_unique<Capture>();
  stream.capture->mode = mode;
  return cudaSuccess;
}

cudaError_t end_capture(State& s, Stream& stream, cudaGraph_t* graph) {
  *graph = nullptr;
  if (!stream.capture) {
    return s.violation(cudaErrorIllegalState, "cudaStreamEndCapture: no capture is on");
  }
  const std::unique_ptr<Capture> capture = std::move(stream.capture);
  if (capture->thread != std::this_thread::get_id()) {
    return s.violation(cudaErrorIllegalState,
                       "cudaStreamEndCapture: another thread began the capture");
  }
  if (!capture->valid) return cudaErrorStreamCaptureInvalidated;
  if (s.failing) return cudaSuccess;  // the capture ends, but there is no graph
  s.graphs.add(capture->graph, graph);
  return cudaSuccess;
}

template <typename T>
cudaError_t destroy(State& s, const char* function, Handles<T>& handles, const void* handle) {
  if (handles.remove(handle)) return cudaSuccess;
  return s.violation(cudaErrorInvalidResourceHandle, std::string(function) + ": not a live handle");
}

cudaError_t create_event(const char* function, cudaEvent_t* event) {
  return runtime_call(function, kPlain, [&](State& s) {
    s.events.add(std::make_shared<Event>(), event);
    return cudaSuccess;
  });
}

}  // namespace
}  // namespace et_moe::fake_cuda

using namespace et_moe::fake_cuda;

extern "C" {

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  return runtime_call("cudaStreamCreateWithFlags", kPlain, [&](State& s) {
    if (flags != cudaStreamNonBlocking) {
      return s.violation(cudaErrorNotSupported,
                         "cudaStreamCreateWithFlags: blocking streams are not modelled");
    }
    s.streams.add(std::make_shared<Stream>(), stream);
    return cudaSuccess;
  });
}

cudaError_t cudaStreamDestroy(cudaStream_t handle) {
  return stream_call("cudaStreamDestroy", kReleases, handle, [&](State& s, const auto& stream) {
    cudaError_t error = not_in_capture(s, "cudaStreamDestroy", *stream);
    stream->capture.reset();
    const cudaError_t ran = stream->run();
    if (error == cudaSuccess) error = ran;
    const cudaError_t destroyed = destroy(s, "cudaStreamDestroy", s.streams, handle);
    return error != cudaSuccess ? error : destroyed;
  });
}

cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
  return stream_call("cudaStreamSynchronize", kReleases | kUnsafeInCapture, handle,
                     [](State& s, const auto& stream) {
                       const cudaError_t error =
                           not_in_capture(s, "cudaStreamSynchronize", *stream);
                       return error != cudaSuccess ? error : stream->run();
                     });
}

cudaError_t cudaStreamQuery(cudaStream_t handle) {
  return stream_call("cudaStreamQuery", kUnsafeInCapture, handle, [](State&, const auto& stream) {
    return query([&] { return stream->reached(stream->end()); }, [&] { return stream->run(); });
  });
}

cudaError_t cudaDeviceSynchronize() {
  return runtime_call("cudaDeviceSynchronize", kReleases | kUnsafeInCapture,
                      [](State& s) { return s.run_all(); });
}

cudaError_t cudaEventCreate(cudaEvent_t* event) { return create_event("cudaEventCreate", event); }

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  return create_event("cudaEventCreateWithFlags", event);
}

cudaError_t cudaEventDestroy(cudaEvent_t handle) {
  return runtime_call("cudaEventDestroy", kReleases,
                      [&](State& s) { return destroy(s, "cudaEventDestroy", s.events, handle); });
}

cudaError_t cudaEventRecord(cudaEvent_t handle, cudaStream_t stream_handle) {
  return event_call("cudaEventRecord", kPlain, handle, [&](State& s, Event& event) {
    const auto stream = s.stream("cudaEventRecord", stream_handle);
    if (!stream) return cudaErrorInvalidResourceHandle;
    const cudaError_t error = not_in_capture(s, "cudaEventRecord", *stream);
    if (error == cudaSuccess) event = {stream, stream->end()};
    return error;
  });
}

cudaError_t cudaEventQuery(cudaEvent_t handle) {
  return event_call("cudaEventQuery", kUnsafeInCapture, handle, [](State&, Event& event) {
    return query([&] { return event.reached(); }, [&] { return event.wait(); });
  });
}

cudaError_t cudaEventSynchronize(cudaEvent_t handle) {
  return event_call("cudaEventSynchronize", kReleases | kUnsafeInCapture, handle,
                    [](State&, Event& event) { return event.wait(); });
}

cudaError_t cudaStreamWaitEvent(cudaStream_t stream_handle, cudaEvent_t handle, unsigned) {
  return event_call("cudaStreamWaitEvent", kPlain, handle, [&](State& s, Event& event) {
    const auto stream = s.stream("cudaStreamWaitEvent", stream_handle);
    if (!stream) return cudaErrorInvalidResourceHandle;
    const cudaError_t error = not_in_capture(s, "cudaStreamWaitEvent", *stream);
    if (error == cudaSuccess) stream->enqueue([recorded = event] { return recorded.wait(); });
    return error;
  });
}

cudaError_t cudaStreamBeginCapture(cudaStream_t handle, cudaStreamCaptureMode mode) {
  return stream_call("cudaStreamBeginCapture", kPlain, handle,
                     [&](State& s, const auto& stream) { return begin_capture(s, *stream, mode); });
}

cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t* graph) {
  return stream_call("cudaStreamEndCapture", kReleases, handle,
                     [&](State& s, const auto& stream) { return end_capture(s, *stream, graph); });
}

cudaError_t cudaStreamIsCapturing(cudaStream_t handle, cudaStreamCaptureStatus* status) {
  return stream_call("cudaStreamIsCapturing", kPlain, handle, [&](State&, const auto& stream) {
    const Capture* capture = stream->capture.get();
    *status = !capture         ? cudaStreamCaptureStatusNone
              : capture->valid ? cudaStreamCaptureStatusActive
                               : cudaStreamCaptureStatusInvalidated;
    return cudaSuccess;
  });
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  return runtime_call("cudaGraphDestroy", kReleases,
                      [&](State& s) { return destroy(s, "cudaGraphDestroy", s.graphs, graph); });
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t handle,
                                 unsigned long long) {
  return runtime_call("cudaGraphInstantiate", kUnsafeInCapture, [&](State& s) {
    const auto graph = s.graphs.find(handle);
    if (!graph) {
      return s.violation(cudaErrorInvalidValue, "cudaGraphInstantiate: not a live graph");
    }
    s.executables.add(graph, executable);
    return cudaSuccess;
  });
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
  return runtime_call("cudaGraphExecDestroy", kReleases, [&](State& s) {
    return destroy(s, "cudaGraphExecDestroy", s.executables, executable);
  });
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream_handle) {
  return runtime_call("cudaGraphLaunch", kPlain, [&](State& s) {
    const auto graph = s.executables.find(executable);
    if (!graph) return s.violation(cudaErrorInvalidValue, "cudaGraphLaunch: not a live graph");
    const auto stream = s.stream("cudaGraphLaunch", stream_handle);
    if (!stream) return cudaErrorInvalidResourceHandle;
    const cudaError_t error = not_in_capture(s, "cudaGraphLaunch", *stream);
    if (error == cudaSuccess) stream->enqueue([graph] { return graph->run(); });
    return error;
  });
}

}  // extern "C"

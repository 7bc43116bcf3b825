#include "backends/cuda/runtime/compiled_method.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <utility>

#include "backends/cuda/runtime/alignment.h"
#include "backends/cuda/runtime/errors.h"
#include "backends/cuda/runtime/scope.h"

namespace et_moe::cuda {
namespace {

using executorch::aten::ScalarType;
using executorch::runtime::NamedDataMap;

std::unique_ptr<Tensor> view_of(std::byte* data, const TensorSpec& spec) {
  return view(data, {spec.shape.begin(), spec.shape.end()}, static_cast<int32_t>(spec.dtype));
}

}  // namespace

CompiledMethod::CompiledMethod(MethodInfo info, const NamedDataMap& data)
    : info_(std::move(info)), context_(Context::of(data)) {
  for (const CodeInfo& code : info_.code_for(architecture())) {
    for (const std::string& kernel : code.kernels) context_->kernels_.adopt(data, kernel);
    const auto blob = load_code(data, code.data, code.sha256);
    ranges_.push_back({code.longest, std::make_unique<Container>(blob.data(), blob.size(),
                                                                 code.data, context_->kernels_)});
  }
  context_->adopt(data, info_);
}

CompiledMethod::~CompiledMethod() { context_->forget(*this); }

const CompiledMethod::Range& CompiledMethod::range_of(int64_t length) const {
  return *std::find_if(ranges_.begin(), ranges_.end(),
                       [length](const Range& range) { return length <= range.longest; });
}

int64_t CompiledMethod::bucket(int64_t length) const {
  // Of a few tokens a power of two. Of more a multiple of an eighth of the power of two below, at
  // least 16: padding stays under 1/8 of long prompts.
  int64_t step = 1;
  while (step < std::min<int64_t>(length, 16)) step *= 2;
  while (step * 16 <= length) step *= 2;
  // A longer range has kernels for more tokens, which are slower for these.
  return std::min(range_of(length).longest, (length + step - 1) / step * step);
}

std::vector<size_t> CompiledMethod::offsets(int64_t length) const {
  std::vector<size_t> offsets{0};
  for (const TensorSpec& input : info_.spec.inputs) {
    offsets.push_back(offsets.back() + aligned(nbytes_at(input, length)));
  }
  if (info_.hand_over && info_.hand_over->versions) {
    // Behind the inputs the code counts the calls of each sequence.
    const auto sequences = static_cast<size_t>(info_.sequences_at(length));
    offsets.push_back(offsets.back() + aligned(sequences * sizeof(int64_t)));
  }
  return offsets;
}

Calls::Outputs CompiledMethod::enqueue(Session& session, const Calls& calls) {
  std::vector<std::unique_ptr<Tensor>> tensors;
  const std::vector<size_t> offset = offsets(calls.length);
  for (size_t i = 0; i < info_.spec.inputs.size(); ++i) {
    tensors.push_back(
        view_of(calls.inputs.data() + offset[i], with_length(info_.spec.inputs[i], calls.length)));
  }
  for (const StateSpec& t : info_.state) {
    tensors.push_back(view_of(session.at(t.name), session.spec(t.name)));
  }
  for (const TensorSpec& t : info_.weights) {
    tensors.push_back(view_of(context_->weights_->at(t.name), t));
  }
  if (calls.drawn) {
    constexpr auto kLong = static_cast<int32_t>(ScalarType::Long);
    std::byte* drawn = calls.drawn->memory.device_data();
    const int64_t sequences = calls.drawn->sequences;
    if (calls.drawn->drafts) {
      const auto width = static_cast<int64_t>(calls.drawn->width);
      tensors.push_back(view(drawn, {2, sequences, width}, kLong));
      std::byte* count = calls.inputs.data() + offset[info_.spec.inputs.size()];
      tensors.push_back(view(count, {sequences}, kLong));
    } else {
      tensors.push_back(view(drawn, {2, sequences}, kLong));
    }
  }
  const ArenaScope scope(context_->arena_);
  const auto results =
      range_of(calls.length)
          .code->run(std::move(tensors), info_.spec.outputs.size(), context_->stream_.get());
  Calls::Outputs outputs;
  for (size_t i = 0; i < results.size(); ++i) {
    const OutputSpec& spec = info_.spec.outputs[i];
    if (results[i]->nbytes() != static_cast<int64_t>(nbytes_at(spec, calls.length))) {
      throw DelegateError(Error::InvalidProgram, "the code of " + info_.method +
                                                     " returns another " + spec.name +
                                                     " than it is described to");
    }
    outputs.push_back(results[i]->data + results[i]->offset * results[i]->itemsize());
  }
  return outputs;  // the scratch memory goes back here but keeps its content until the next call
}

bool CompiledMethod::launch_graph(Session& session, Calls& calls) {
  auto found = calls.graphs.find(calls.length);
  if (found == calls.graphs.end()) {
    try {
      context_->arena_.set_frozen(true);
      Calls::Outputs outputs;
      Graph graph = Graph::capture(context_->stream_, [&] { outputs = enqueue(session, calls); });
      context_->arena_.set_frozen(false);
      Calls::Captured captured{std::move(graph), std::move(outputs)};
      found = calls.graphs.emplace(calls.length, std::move(captured)).first;
    } catch (const std::exception& e) {
      context_->arena_.set_frozen(false);
      capture_failed_ = true;
      std::fprintf(stderr, "no CUDA graph for %s, running without: %s\n", info_.method.c_str(),
                   e.what());
      return false;
    }
  }
  found->second.graph.launch(context_->stream_);
  calls.outputs = found->second.outputs;
  return true;
}

void CompiledMethod::launch(Session& session, Calls& calls) {
  context_->last_ = &calls;
  // The first call of a length warms up: it loads kernels and takes scratch memory.
  const bool as_graph =
      context_->use_graphs_ && !capture_failed_ && calls.warm.count(calls.length) > 0;
  if (!as_graph || !launch_graph(session, calls)) {
    calls.outputs = enqueue(session, calls);
    calls.warm.insert(calls.length);
  }
  if (calls.drawn) calls.drawn->done(++calls.drawn->calls).record(context_->stream_);
}

void CompiledMethod::start(Session& session, Calls& calls, const HostTensors& tensors) {
  calls.length = bucket(tensors.length);
  const std::vector<TensorSpec>& inputs = info_.spec.inputs;
  const std::vector<size_t> offset = offsets(calls.length);
  std::byte* memory = calls.staging.data();
  for (size_t i = 0; i < inputs.size(); ++i) {
    const size_t size = nbytes_at(inputs[i], tensors.length);
    std::memcpy(memory + offset[i], tensors.inputs[i], size);
    std::memset(memory + offset[i] + size, 0, nbytes_at(inputs[i], calls.length) - size);
  }
  if (calls.drawn) {
    const auto* positions = static_cast<const int64_t*>(tensors.inputs[info_.hand_over->positions]);
    calls.drawn->positions.assign(positions, positions + info_.sequences_at(tensors.length));
    calls.drawn->sequences = info_.sequences_at(calls.length);
    calls.drawn->launches = 0;
    const size_t end = offset[inputs.size()];
    std::memset(memory + end, 0, offset.back() - end);
  }
  // Not in the graph, see backends/cuda/triton/hand_over/op.py.
  ET_MOE_CUDA(cudaMemcpyAsync(calls.inputs.data(), memory, offset.back(), cudaMemcpyHostToDevice,
                              context_->stream_.get()));
  launch(session, calls);
}

bool CompiledMethod::is_last(const Calls& calls, const HostTensors& tensors) const {
  const Drawn& drawn = *calls.drawn;
  const HandOverIndices& hand_over = *info_.hand_over;
  const auto sequences = static_cast<size_t>(info_.sequences_at(tensors.length));
  if (sequences != drawn.positions.size()) return false;
  std::vector<int64_t> tokens, versions;
  for (size_t i = 0; i < drawn.positions.size(); ++i) {
    const int64_t* values = drawn.values(i, 1);
    if (drawn.drafts) versions.push_back(*values);
    tokens.insert(tokens.end(), values + (drawn.drafts ? 1 : 0), values + drawn.width);
  }
  const std::vector<TensorSpec>& inputs = info_.spec.inputs;
  const std::vector<size_t> offset = offsets(calls.length);
  for (size_t i = 0; i < inputs.size(); ++i) {
    const void* expected = i == hand_over.positions ? drawn.positions.data()
                           : i == hand_over.tokens  ? tokens.data()
                           : i == hand_over.versions
                               ? versions.data()
                               : static_cast<const void*>(calls.staging.data() + offset[i]);
    const size_t size = nbytes_at(inputs[i], tensors.length);
    if (std::memcmp(expected, tensors.inputs[i], size) != 0) return false;
  }
  return true;
}

bool CompiledMethod::copy_outputs(const Calls& calls, const HostTensors& tensors) const {
  const std::vector<std::string>* wanted = CallScope::options().outputs;
  bool any = false;
  for (size_t i = 0; i < tensors.outputs.size(); ++i) {
    const OutputSpec& spec = info_.spec.outputs[i];
    if (info_.hand_over && info_.hand_over->token == i) continue;
    if (wanted && std::find(wanted->begin(), wanted->end(), spec.name) == wanted->end()) continue;
    if (context_->last_ != &calls) {
      throw DelegateError(Error::InvalidState, "the output " + spec.name +
                                                   " of a call that ran ahead is gone: another "
                                                   "session has made a call since");
    }
    const size_t size = nbytes_at(spec, tensors.length);
    ET_MOE_CUDA(cudaMemcpyAsync(tensors.outputs[i], calls.outputs[i], size, cudaMemcpyDeviceToHost,
                                context_->stream_.get()));
    any = true;
  }
  return any;
}

void CompiledMethod::run(const HostTensors& tensors) {
  Session& session = context_->session();
  auto found = session.calls_.find(this);
  if (found == session.calls_.end()) {
    const size_t size = offsets(info_.longest).back();
    const int64_t sequences = info_.sequences_at(info_.longest);
    found = session.calls_.try_emplace(this, size, sequences, info_.hand_over).first;
  }
  Calls& calls = found->second;
  if (!session.ahead_) {
    start(session, calls, tensors);
  } else if (session.ahead_ != &calls || !is_last(calls, tensors)) {
    throw DelegateError(Error::InvalidState,
                        "the session has gone on from the tokens it drew, as it was asked to: "
                        "settle it before another call of " +
                            info_.method);
  }
  session.ahead_ = nullptr;
  const bool copied = copy_outputs(calls, tensors);
  if (copied || !calls.drawn) context_->stream_.synchronize();
  if (!calls.drawn) return;
  Drawn& drawn = *calls.drawn;
  const uint64_t call = drawn.calls;
  const bool run_ahead = CallScope::options().run_ahead;
  if (run_ahead) {
    launch(session, calls);
    session.ahead_ = &calls;
    ++drawn.launches;
  }
  drawn.done(call).synchronize();
  const std::vector<int64_t> values = drawn.all(drawn.drafts && run_ahead ? 1 : 0);
  std::copy(values.begin(), values.end(),
            static_cast<int64_t*>(tensors.outputs[info_.hand_over->token]));
  if (run_ahead) drawn.advance(values);
}

}  // namespace et_moe::cuda

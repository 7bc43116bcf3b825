// The engine that serves many callers: requests in, events out. One thread of its own has the
// model.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <future>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "runner/event_queue.h"
#include "runner/model.h"
#include "runner/request.h"
#include "runner/sampler.h"
#include "runner/sequence.h"

namespace et_moe {

/// The engine has as many waiting requests as it takes.
class QueueFull : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// The device failed for good, or the engine is closed: it takes no more requests.
class EngineBroken : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

struct AsyncEngineOptions {
  ModelOptions model;                 // max_sequences: how many are served at once
  size_t max_waiting = 256;           // requests that wait for their turn
  size_t piece_beside_others = 1024;  // about how many tokens of a prompt are fed at once while
                                      // others decode, who wait for it; see `bounded_end`
};

/// How many snapshots a prefix cache for so many sequences has: one that each leaves while it runs,
/// and as many of those that have ended.
constexpr size_t snapshots_for(size_t sequences) { return 2 * sequences + 8; }

struct EngineStatus {
  size_t waiting, running, max_sequences;
  size_t pages, free_pages;           // of the KV cache
  size_t preemptions;                 // how often a sequence was put back
  std::optional<std::string> broken;  // why the engine takes no more requests
};

/// Every method but the constructor and `close` returns at once, and all but the destructor may be
/// called from any thread.
///
/// Requests are admitted in order, as far as there are places and pages of the KV cache for their
/// prompts. A step is one decode call of all sequences that have a token to feed (several, if the
/// program takes fewer at once), then one piece of the first prompt that is not done, a shorter one
/// if others decode. A guided sequence that has no mask yet sits out; the others go on. If the
/// program has drafts, sequences whose tokens it draws itself are fed them, in a call apart, unless
/// they are many.
///
/// Where pages run out, the sequence that was admitted last is put back: it waits at the head of
/// the queue and comes to the same state later. No token changes.
///
/// A failed call ends the requests that took part. If a call on a fresh state fails as well, the
/// engine is broken: all requests end with an error.
class AsyncEngine {
 public:
  /// Loads a program and the state of all sequences; throws std::runtime_error as Model does.
  AsyncEngine(const std::string& pte_path, const std::string& ptd_path,
              const AsyncEngineOptions& options);
  ~AsyncEngine();
  AsyncEngine(const AsyncEngine&) = delete;
  AsyncEngine& operator=(const AsyncEngine&) = delete;

  const ModelInfo& info() const { return info_; }

  /// Queues a request and returns its id. Throws InvalidRequest: a prompt that is empty, does not
  /// fit the context or has an id outside the vocabulary, a parameter out of range; QueueFull;
  /// EngineBroken.
  uint64_t submit(Request request);
  /// Queues all of them or none, so that none begins before the others are there.
  std::vector<uint64_t> submit(std::vector<Request> requests);
  /// Ends a request at its next token; nothing if it has ended.
  void cancel(uint64_t id);
  /// Which tokens the next one of a guided request may be: one call a token; the first may come at
  /// once. Nothing if the request has ended. Throws InvalidRequest for a mask of another size, or
  /// a request that is not guided.
  void allow(uint64_t id, TokenMask mask);

  /// See EventQueue; both go on working on an engine that is broken or closed.
  int fileno() const { return events_.fileno(); }
  std::vector<Event> take_events() { return events_.take(); }

  EngineStatus status() const;
  /// As Model's. Only while no request is in flight, and the engine is neither broken nor closed.
  std::optional<llm::GpuMemory> gpu_memory() const { return model_->gpu_memory(); }
  /// Cancels what runs and waits, and waits for the thread, which frees the model.
  void close();

 private:
  /// A request as its callers see it.
  struct Live {
    bool guided;
    bool cancelled = false;
    std::deque<TokenMask> masks;
  };
  void check(const Request& request) const;
  // All that follows runs on the engine's thread.
  void run(const std::string& pte_path, const std::string& ptd_path,
           std::promise<ModelInfo> loaded);
  void load(const std::string& pte_path, const std::string& ptd_path);
  /// Serves until the engine is closed. Throws what breaks the engine.
  void serve();
  /// Whether the first of those that wait may begin.
  bool can_admit() const;
  bool has_work() const;
  /// Waits for something to do and gives cancellations, masks and requests to the sequences.
  /// Returns whether to go on.
  bool collect();
  /// Gives sessions to those that wait, in order, as far as there are places and pages. If the
  /// device fails one ends; returns why.
  std::optional<std::string> admit();
  /// Draws the tokens that waited for masks.
  void draw_waiting();
  /// Decode calls of all sequences that have a token to feed.
  void decode();
  /// `is_all`: no others run. `drafts`: they are fed drafts.
  void decode(const std::vector<Sequence*>& batch, bool is_all, bool drafts);
  /// One piece of the first prompt that is not done.
  void prefill();
  /// Makes room for the next call of these, putting back others, the last one first, or of these
  /// themselves. Returns which of them can make it.
  std::vector<Sequence*> make_room(std::vector<Sequence*> batch);
  /// Those that run and for which a question has the answer yes.
  std::vector<Sequence*> choose(bool (Sequence::*wanted)() const) const;
  /// Sends what is new of a sequence, and ends it with its last event or an error.
  void deliver(Sequence& sequence, const std::function<Event()>& next);
  /// Ends a sequence; its state serves others.
  void finish(Sequence& sequence, Event event);
  /// Ends sequences whose call failed. Throws like `probe`.
  void fail(const std::vector<Sequence*>& batch, const std::string& why);
  /// After a failure: throws EngineBroken, with both reasons, if a call on a fresh state fails too.
  void probe(const std::string& why);
  void drop_ended();
  /// Ends all requests; those that come are refused.
  void end_all(RequestEnd end, const std::string& why);

  const AsyncEngineOptions options_;
  ModelInfo info_{};
  size_t pages_ = 0;
  EventQueue events_;

  mutable std::mutex mutex_;  // of what follows
  std::condition_variable changed_;
  uint64_t next_id_ = 1;
  std::deque<std::unique_ptr<Sequence>> waiting_;
  std::map<uint64_t, Live> live_;  // waiting and running
  bool closing_ = false;
  size_t free_pages_ = 0, preemptions_ = 0;
  std::optional<std::string> refusal_;  // of every request
  std::optional<std::string> broken_;

  // The engine's thread's own.
  std::unique_ptr<Model> model_;
  std::vector<std::unique_ptr<Sequence>> running_;  // in the order of their admission

  std::mutex closing_mutex_;  // of joining the thread
  std::thread thread_;
};

}  // namespace et_moe

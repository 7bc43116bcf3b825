// The Python module et_moe_engine: engine and tokenizer, without the classes that make them
// pleasant to use, which are in serving/. No call that may take long holds the GIL.

#include <dlfcn.h>
#include <nanobind/nanobind.h>
#include <nanobind/stl/filesystem.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <string>

#include "backends/messages.h"
#include "runner/async_engine.h"
#include "runner/tokenizer/tokenizer.h"

namespace nb = nanobind;

namespace et_moe {
namespace {

/// A Python value as a C++ one; `name` is for the error.
template <typename Value>
Value convert(nb::handle value, const char* name, const char* expected) {
  try {
    return nb::cast<Value>(value);
  } catch (const nb::cast_error&) {
    throw InvalidRequest(std::string(name) + " " + shortened(nb::repr(value).c_str()) +
                         ": expected " + expected);
  }
}

/// An attribute of serving.interface.SamplingParams.
template <typename Value>
void read(nb::handle params, const char* name, const char* expected, Value& value) {
  value = convert<Value>(params.attr(name), name, expected);
}

SamplingParams read_params(nb::handle from) {
  constexpr const char *integer = "an integer", *number = "a number", *flag = "True or False";
  SamplingParams params;
  read(from, "max_tokens", integer, params.max_tokens);
  read(from, "temperature", number, params.sampling.temperature);
  read(from, "top_k", integer, params.sampling.top_k);
  read(from, "top_p", number, params.sampling.top_p);
  read(from, "seed", "an integer of 64 bits", params.sampling.seed);
  read(from, "min_p", number, params.min_p);
  read(from, "presence_penalty", number, params.presence_penalty);
  read(from, "frequency_penalty", number, params.frequency_penalty);
  read(from, "repetition_penalty", number, params.repetition_penalty);
  read(from, "logit_bias", "token ids with numbers", params.logit_bias);
  read(from, "stop_token_ids", "token ids", params.stop_token_ids);
  read(from, "ignore_eos", flag, params.ignore_eos);
  read(from, "logprobs", integer, params.logprobs);
  read(from, "prompt_logprobs", integer, params.prompt_logprobs);
  read(from, "guided", flag, params.guided);
  return params;
}

uint64_t submit(AsyncEngine& engine, nb::handle prompt_ids, nb::handle params) {
  Request request{convert<std::vector<int64_t>>(prompt_ids, "prompt_ids", "token ids"),
                  read_params(params)};
  const nb::gil_scoped_release release;
  return engine.submit(std::move(request));
}

void allow(AsyncEngine& engine, uint64_t id, nb::bytes mask) {
  const auto* data = static_cast<const uint8_t*>(mask.data());
  TokenMask copy(data, data + mask.size());
  const nb::gil_scoped_release release;
  engine.allow(id, std::move(copy));
}

template <typename Item>
nb::tuple to_tuple(const std::vector<Item>& items) {
  nb::list list;
  for (const Item& item : items) list.append(item);
  return nb::tuple(list);
}

/// (logprob, ((token id, logprob), ...)) of each.
nb::list to_list(const std::vector<TokenLogprob>& logprobs) {
  nb::list list;
  for (const TokenLogprob& l : logprobs) list.append(nb::make_tuple(l.logprob, to_tuple(l.top)));
  return list;
}

nb::object name_of(const std::optional<RequestEnd>& end) {
  constexpr const char* names[] = {"stop", "length", "cancelled", "error"};
  return end ? nb::object(nb::str(names[static_cast<size_t>(*end)])) : nb::none();
}

/// (request id, token ids, logprobs or None, those of the prompt or None, cached tokens, drafts or
/// None, reason to finish or None, error or None, milliseconds at which each token was drawn);
/// drafts are (calls, tokens, accepted by place).
nb::tuple to_tuple(const Event& event) {
  const auto optional = [](bool is_there, auto make) {
    return is_there ? nb::object(make()) : nb::none();
  };
  return nb::make_tuple(
      event.request_id, to_tuple(event.token_ids),
      optional(!event.logprobs.empty(), [&] { return to_list(event.logprobs); }),
      optional(event.prompt_logprobs.has_value(), [&] { return to_list(*event.prompt_logprobs); }),
      event.cached_tokens,
      optional(event.drafts.steps > 0,
               [&] {
                 const llm::DraftStats& d = event.drafts;
                 return nb::make_tuple(d.steps, d.tokens, to_tuple(d.accepted));
               }),
      name_of(event.end),
      optional(event.end == RequestEnd::kError, [&] { return nb::str(event.error.c_str()); }),
      to_tuple(event.drawn_ms));
}

nb::list take_events(AsyncEngine& engine) {
  std::vector<Event> events;
  {
    const nb::gil_scoped_release release;
    events = engine.take_events();
  }
  nb::list list;
  for (const Event& event : events) list.append(to_tuple(event));
  return list;
}

void bind_engine(nb::module_& m) {
  using Release = nb::call_guard<nb::gil_scoped_release>;
  nb::exception<InvalidRequest>(m, "InvalidRequestError", PyExc_ValueError);
  nb::exception<QueueFull>(m, "QueueFullError", PyExc_RuntimeError);
  nb::exception<EngineBroken>(m, "EngineBrokenError", PyExc_RuntimeError);
  nb::class_<AsyncEngine>(m, "Engine", "See serving.interface.Engine, and runner/async_engine.h.")
      .def(
          "__init__",
          [](AsyncEngine* self, const std::filesystem::path& pte_path,
             const std::filesystem::path& ptd_path, size_t max_sequences, size_t max_waiting,
             std::optional<double> memory_fraction, bool prefix_cache, bool cuda_graph) {
            ModelOptions model;
            model.device.cuda_graph = cuda_graph;
            model.max_sequences = max_sequences;
            model.snapshots = prefix_cache ? snapshots_for(max_sequences) : 0;
            model.memory_fraction = memory_fraction;
            new (self) AsyncEngine(pte_path, ptd_path, {model, max_waiting});
          },
          nb::arg("pte_path"), nb::arg("ptd_path"), nb::kw_only(), nb::arg("max_sequences"),
          nb::arg("max_waiting"), nb::arg("memory_fraction").none(), nb::arg("prefix_cache"),
          nb::arg("cuda_graph"), Release())
      .def("submit", &submit, nb::arg("prompt_ids"), nb::arg("params"))
      .def("cancel", &AsyncEngine::cancel, nb::arg("request_id"), Release())
      .def("allow", &allow, nb::arg("request_id"), nb::arg("mask"))
      .def("fileno", &AsyncEngine::fileno)
      .def("take_events", &take_events)
      .def("close", &AsyncEngine::close, Release())
      .def("status",
           [](const AsyncEngine& engine) {
             const EngineStatus s = engine.status();
             return nb::make_tuple(s.waiting, s.running, s.max_sequences, s.pages, s.free_pages,
                                   s.preemptions, s.broken);
           })
      .def_prop_ro("info", [](const AsyncEngine& engine) {
        const ModelInfo& i = engine.info();
        return nb::make_tuple(i.max_seq_len, i.page_size, i.vocab_size, to_tuple(i.eos_ids),
                              i.backend);
      });
}

void bind_tokenizer(nb::module_& m) {
  nb::class_<Tokenizer>(m, "Tokenizer", "Of a tokenizer.json: see runner/tokenizer/tokenizer.h.")
      .def(nb::new_([](const std::filesystem::path& path) { return Tokenizer::load(path); }),
           nb::arg("path"))
      .def(
          "encode",
          [](const Tokenizer& tokenizer, std::string_view text, bool parse_special) {
            try {
              return tokenizer.encode(text, parse_special);
            } catch (const std::runtime_error& e) {
              throw std::invalid_argument(e.what());
            }
          },
          nb::arg("text"), nb::arg("parse_special"), nb::call_guard<nb::gil_scoped_release>())
      .def(
          "id_to_bytes",
          [](const Tokenizer& tokenizer, int64_t id) {
            const std::string_view bytes = tokenizer.id_to_bytes(id);
            return nb::bytes(bytes.data(), bytes.size());
          },
          nb::arg("id"))
      .def("is_special", &Tokenizer::is_special, nb::arg("id"))
      .def("token_to_id", &Tokenizer::token_to_id, nb::arg("token"))
      .def_prop_ro("vocab_size", &Tokenizer::vocab_size);
}

/// Messages name files, whose names may be no UTF-8: Python's own form of such bytes is the one
/// that its paths have.
void translate_messages() {
  nb::register_exception_translator([](const std::exception_ptr& pointer, void*) {
    try {
      std::rethrow_exception(pointer);
    } catch (const nb::builtin_exception&) {
      throw;  // nanobind's
    } catch (const std::runtime_error& e) {
      const nb::object message = nb::steal(PyUnicode_DecodeFSDefault(e.what()));
      PyErr_SetObject(PyExc_RuntimeError, message.ptr());
    }
  });
}

/// Python loads extensions with local symbols, and the code of a CUDA program, which is loaded
/// later, is linked to functions of the delegate by name.
void make_symbols_global() {
  Dl_info self;
  static const char here = 0;
  if (!dladdr(&here, &self) || !dlopen(self.dli_fname, RTLD_NOLOAD | RTLD_NOW | RTLD_GLOBAL)) {
    throw std::runtime_error("the extension cannot make its symbols global");
  }
}

}  // namespace
}  // namespace et_moe

NB_MODULE(et_moe_engine, m) {
  et_moe::make_symbols_global();
  et_moe::translate_messages();
  et_moe::bind_engine(m);
  et_moe::bind_tokenizer(m);
}

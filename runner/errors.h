// Errors that say what they are about.
#pragma once

#include <exception>
#include <new>
#include <stdexcept>
#include <string>

namespace et_moe {

/// How the message of an error begins whose cause can be in a program or in its weights, or in its
/// tokenizer: they do not fit each other, or what is computed of both is no result.
inline std::string both_files(const std::string& program, const std::string& other) {
  return program + " with " + other;
}

/// What `body` returns. Where it runs out of memory, std::runtime_error says so of `where`, a file
/// or a flag.
template <typename Body>
auto needing_memory(const std::string& where, const Body& body) {
  try {
    return body();
  } catch (const std::bad_alloc&) {
    throw std::runtime_error(where + ": out of memory");
  }
}

/// As `needing_memory`, and puts `where` in front of every other error, too.
template <typename Body>
auto in_context(const std::string& where, const Body& body) {
  try {
    return body();
  } catch (const std::bad_alloc&) {
    throw std::runtime_error(where + ": out of memory");
  } catch (const std::exception& e) {
    throw std::runtime_error(where + ": " + e.what());
  }
}

}  // namespace et_moe

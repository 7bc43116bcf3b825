// Parts of messages.
#pragma once

#include <exception>
#include <string>

namespace et_moe {

/// A text that a user or a file gave, which may be of any length; cut between characters of UTF-8.
inline std::string shortened(const std::string& text, size_t longest = 40) {
  if (text.size() <= longest) return text;
  while (longest > 0 && (text[longest] & 0xc0) == 0x80) --longest;
  return text.substr(0, longest) + "...";
}

/// What an exception says, cut short, and without the name that nlohmann json puts in front, such
/// as
/// "[json.exception.parse_error.101] ".
inline std::string reason(const std::exception& error) {
  std::string text = error.what();
  const size_t end = text.find("] ");
  if (text.rfind("[json.exception.", 0) == 0 && end != std::string::npos) text.erase(0, end + 2);
  return shortened(text, 300);
}

}  // namespace et_moe

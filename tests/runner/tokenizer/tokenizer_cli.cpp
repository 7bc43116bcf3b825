// Makes the tokenizer available to tests that are not in C++. Reads lines from stdin and writes one
// line of JSON for each:
//   tokenizer_cli FILE --encode        JSON string -> list of ids
//   tokenizer_cli FILE --encode-plain  the same, but special tokens stay text
//   tokenizer_cli FILE --decode        list of ids -> JSON string
//   tokenizer_cli PATTERN --split      JSON string -> list of the pieces it is cut into
//   tokenizer_cli --normalize          JSON string -> its NFC
//   tokenizer_cli --check              path of a tokenizer.json -> null if it loads and works, else
//                                      the error's message
//   tokenizer_cli --try                {"path": of a tokenizer.json, "texts": strings,
//                                      "parse_special": bool} -> {"seconds": processor time, and
//                                      "error": message if it does not load, else "results": for
//                                      each text {"ids": list, "text": what they decode to} or
//                                      {"error": message}}
#include <ctime>
#include <iostream>
#include <stdexcept>
#include <string>
#include <vector>

#include "backends/json.h"
#include "runner/tokenizer/normalizer.h"
#include "runner/tokenizer/pre_tokenizer.h"
#include "runner/tokenizer/tokenizer.h"

namespace {

using et_moe::Tokenizer;
using nlohmann::json;

std::string parse_string(const std::string& line) {
  return et_moe::parse_json(line).get<std::string>();
}

json error_of_file(const std::string& path) {
  try {
    const Tokenizer tokenizer = Tokenizer::load(path);
    tokenizer.decode(tokenizer.encode("<|im_start|>It's  10 cafe\u0301s\n", true));
    return nullptr;
  } catch (const std::runtime_error& error) {  // anything else is a bug and ends the program
    return error.what();
  }
}

json try_text(const Tokenizer& tokenizer, const std::string& text, bool parse_special) {
  try {
    const std::vector<int64_t> ids = tokenizer.encode(text, parse_special);
    return {{"ids", ids}, {"text", tokenizer.decode(ids)}};
  } catch (const std::runtime_error& error) {
    return {{"error", error.what()}};
  }
}

double seconds_since(std::clock_t start) {
  return static_cast<double>(std::clock() - start) / CLOCKS_PER_SEC;
}

json try_file(const std::string& line) {
  const json request = et_moe::parse_json(line);
  const std::clock_t start = std::clock();
  json answer;
  try {
    const Tokenizer tokenizer = Tokenizer::load(request["path"].get<std::string>());
    answer["results"] = json::array();
    for (const json& text : request["texts"]) {
      answer["results"].push_back(
          try_text(tokenizer, text.get<std::string>(), request["parse_special"]));
    }
  } catch (const std::runtime_error& error) {
    answer = {{"error", error.what()}};
  }
  answer["seconds"] = seconds_since(start);
  return answer;
}

template <typename Convert>
void for_each_line(const Convert& convert) {
  std::string line;
  while (std::getline(std::cin, line)) {
    const json result = convert(line);
    // A message may quote bytes of a malformed file.
    std::cout << et_moe::to_ascii(result) << std::endl;
  }
}

int run(const std::string& mode) {
  if (mode == "--normalize") {
    for_each_line(
        [](const std::string& line) { return et_moe::normalize_nfc(parse_string(line)); });
  } else if (mode == "--check") {
    for_each_line(error_of_file);
  } else if (mode == "--try") {
    for_each_line(try_file);
  } else {
    std::cerr << "unknown mode " << mode << "\n";
    return 2;
  }
  return 0;
}

int run(const std::string& subject, const std::string& mode) {
  if (mode == "--split") {
    const et_moe::PreTokenizer pre_tokenizer(subject);
    for_each_line([&](const std::string& line) -> json {
      const std::string text = parse_string(line);
      uint64_t steps_left = et_moe::PreTokenizer::step_limit(text.size());
      return pre_tokenizer.split(text, steps_left);
    });
    return 0;
  }
  std::clock_t start = std::clock();  // processor time: others may use the machine too
  const Tokenizer tokenizer = Tokenizer::load(subject);
  const double load_seconds = seconds_since(start);
  start = std::clock();
  if (mode == "--decode") {
    for_each_line([&](const std::string& line) {
      return tokenizer.decode(et_moe::parse_json(line).get<std::vector<int64_t>>());
    });
  } else if (mode == "--encode" || mode == "--encode-plain") {
    for_each_line([&](const std::string& line) {
      return tokenizer.encode(parse_string(line), mode == "--encode");
    });
  } else {
    std::cerr << "unknown mode " << mode << "\n";
    return 2;
  }
  std::cerr << "load " << load_seconds << " s, convert " << seconds_since(start) << " s\n";
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    if (argc == 2) return run(argv[1]);
    if (argc == 3) return run(argv[1], argv[2]);
    std::cerr << "usage: tokenizer_cli [FILE|PATTERN] MODE\n";
    return 2;
  } catch (const std::runtime_error& error) {
    std::cerr << error.what() << "\n";
    return 1;
  }
}

#include "runner/tokenizer/bpe.h"

#include <utf8proc.h>

#include <queue>
#include <stdexcept>
#include <tuple>

#include "runner/tokenizer/utf8.h"

namespace et_moe {
namespace {

constexpr size_t kNone = static_cast<size_t>(-1);
constexpr int kNoByte = -1;
constexpr char32_t kFirstStandIn = 256;  // bytes that do not print as themselves map to here and up

struct Alphabet {
  std::array<std::string, 256> characters;             // byte -> UTF-8
  std::array<int, kFirstStandIn + 256> bytes_by_char;  // code point -> byte, or kNoByte

  Alphabet() {
    bytes_by_char.fill(kNoByte);
    char32_t next_stand_in = kFirstStandIn;
    for (char32_t byte = 0; byte < 256; ++byte) {
      const bool prints = (byte >= 0x21 && byte <= 0x7E) || (byte >= 0xA1 && byte != 0xAD);
      const char32_t character = prints ? byte : next_stand_in++;
      utf8proc_uint8_t utf8[4];
      const auto length = utf8proc_encode_char(static_cast<utf8proc_int32_t>(character), utf8);
      characters[byte].assign(utf8, utf8 + length);
      bytes_by_char[character] = static_cast<int>(byte);
    }
  }
};

const Alphabet& alphabet() {
  static const Alphabet instance;
  return instance;
}

uint64_t pair_key(int32_t left, int32_t right) {
  return static_cast<uint64_t>(static_cast<uint32_t>(left)) << 32 | static_cast<uint32_t>(right);
}

}  // namespace

std::string bytes_to_alphabet(std::string_view bytes) {
  std::string token;
  for (const char byte : bytes) token += alphabet().characters[static_cast<unsigned char>(byte)];
  return token;
}

std::string alphabet_to_bytes(std::string_view token) {
  const auto& bytes_by_char = alphabet().bytes_by_char;
  std::string bytes;
  for (size_t pos = 0; pos < token.size();) {
    const Utf8Sequence sequence = read_utf8(token, pos);
    const char32_t character = sequence.code_point;
    const int byte = character < bytes_by_char.size() ? bytes_by_char[character] : kNoByte;
    if (byte == kNoByte) return std::string(token);
    bytes.push_back(static_cast<char>(byte));
    pos += sequence.length;
  }
  return bytes;
}

/// A token in the making; the symbols of a piece form a doubly linked list.
struct Bpe::Symbol {
  int32_t id;  // -1 once it is merged into its left neighbour
  size_t previous, next;
};

/// A merge that was possible when it was noted down: of the symbol at `position` with its next.
struct Bpe::Candidate {
  uint32_t rank;
  size_t position;
  int32_t id;

  bool operator<(const Candidate& other) const {  // std::priority_queue pops the greatest first
    return std::tie(other.rank, other.position) < std::tie(rank, position);
  }
};

Bpe::Bpe(Vocabulary vocabulary, const Merges& merges, bool ignore_merges)
    : vocabulary_(std::move(vocabulary)), ignore_merges_(ignore_merges) {
  for (size_t byte = 0; byte < byte_ids_.size(); ++byte) {
    const auto token = vocabulary_.find(alphabet().characters[byte]);
    if (token == vocabulary_.end()) {
      throw std::runtime_error("vocab: no token for byte " + std::to_string(byte) + ", \"" +
                               alphabet().characters[byte] + "\"");
    }
    byte_ids_[byte] = token->second;
  }
  merges_.reserve(merges.size());
  for (size_t rank = 0; rank < merges.size(); ++rank) {
    const auto id_of = [&](const std::string& token) {
      const auto found = vocabulary_.find(token);
      if (found != vocabulary_.end()) return found->second;
      throw std::runtime_error("merges[" + std::to_string(rank) + "]: \"" + token +
                               "\" is not in vocab");
    };
    const auto& [left, right] = merges[rank];
    merges_[pair_key(id_of(left), id_of(right))] = {static_cast<uint32_t>(rank),
                                                    id_of(left + right)};
  }
}

void Bpe::encode(std::string_view piece, std::vector<int64_t>& ids) const {
  if (ignore_merges_) {
    const auto whole = vocabulary_.find(bytes_to_alphabet(piece));
    if (whole != vocabulary_.end()) {
      ids.push_back(whole->second);
      return;
    }
  }
  std::vector<Symbol> symbols(piece.size());
  for (size_t i = 0; i < piece.size(); ++i) {
    const int32_t id = byte_ids_[static_cast<unsigned char>(piece[i])];
    symbols[i] = {id, i == 0 ? kNone : i - 1, i + 1 == piece.size() ? kNone : i + 1};
  }
  merge_all(symbols);
  for (const Symbol& symbol : symbols) {
    if (symbol.id >= 0) ids.push_back(symbol.id);
  }
}

const Bpe::Merge* Bpe::find_merge(int32_t left, int32_t right) const {
  const auto merge = merges_.find(pair_key(left, right));
  return merge == merges_.end() ? nullptr : &merge->second;
}

void Bpe::merge_all(std::vector<Symbol>& symbols) const {
  std::priority_queue<Candidate> candidates;
  const auto note = [&](size_t position) {
    if (position == kNone || symbols[position].next == kNone) return;
    const Symbol& left = symbols[position];
    const Merge* merge = find_merge(left.id, symbols[left.next].id);
    if (merge != nullptr) candidates.push({merge->rank, position, merge->id});
  };
  for (size_t i = 0; i < symbols.size(); ++i) note(i);

  while (!candidates.empty()) {
    const Candidate best = candidates.top();
    candidates.pop();
    Symbol& left = symbols[best.position];
    if (left.id < 0 || left.next == kNone) continue;
    Symbol& right = symbols[left.next];
    // Another merge may have taken one of the two since.
    const Merge* merge = find_merge(left.id, right.id);
    if (merge == nullptr || merge->id != best.id) continue;

    left.id = best.id;
    left.next = right.next;
    right.id = -1;
    if (left.next != kNone) symbols[left.next].previous = best.position;
    note(left.previous);
    note(best.position);
  }
}

}  // namespace et_moe

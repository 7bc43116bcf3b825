#include "runner/printer.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <stdexcept>

namespace et_moe {
namespace {

[[noreturn]] void fail(int error) {
  throw std::runtime_error(std::string("the output could not be written: ") + std::strerror(error));
}

}  // namespace

void check_standard_output() {
  const int flags = fcntl(STDOUT_FILENO, F_GETFL);
  if (flags < 0 || (flags & O_ACCMODE) == O_RDONLY) fail(EBADF);
}

void print(const std::string& text) {
  std::fwrite(text.data(), 1, text.size(), stdout);
  if (std::fflush(stdout) == 0 && !std::ferror(stdout)) return;
  if (errno == EPIPE) throw ReaderGone{};
  fail(errno);
}

void Printer::token(int64_t id) {
  if (!tokenizer_) {
    print(std::to_string(id) + " ");
  } else if (id < tokenizer_->vocab_size() && !tokenizer_->is_special(id)) {
    print(stream_.push(tokenizer_->id_to_bytes(id)));
  }
}

}  // namespace et_moe

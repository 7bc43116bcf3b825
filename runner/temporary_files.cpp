#include "runner/temporary_files.h"

#include <fcntl.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <csignal>
#include <set>

namespace et_moe {
namespace {

std::atomic_flag changing = ATOMIC_FLAG_INIT;

void lock() {
  while (changing.test_and_set(std::memory_order_acquire)) {
  }
}

/// Never destroyed: a signal may come while the process exits.
std::set<std::string>& names() {
  static auto* const set = new std::set<std::string>;
  return *set;
}

/// Holds all signals of this thread off and the lock, for which a signal handler spins.
class Change {
 public:
  Change() {
    names();
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before_);
    lock();
  }
  ~Change() {
    changing.clear(std::memory_order_release);
    pthread_sigmask(SIG_SETMASK, &before_, nullptr);
  }
  Change(const Change&) = delete;
  Change& operator=(const Change&) = delete;

 private:
  sigset_t before_;
};

}  // namespace

int create_temporary_file(const std::string& path, mode_t mode) {
  const Change change;
  const auto name = names().insert(path).first;
  const int fd = open(path.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, mode);
  if (fd < 0) {
    const int error = errno;
    names().erase(name);
    errno = error;
  }
  return fd;
}

void forget_temporary_file(const std::string& path) {
  const Change change;
  names().erase(path);
}

void remove_temporary_files() {
  lock();
  for (const std::string& name : names()) unlink(name.c_str());
}

}  // namespace et_moe

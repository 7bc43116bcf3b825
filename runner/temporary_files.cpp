#include "runner/temporary_files.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cctype>
#include <cerrno>
#include <csignal>
#include <filesystem>
#include <fstream>
#include <random>
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

std::string random_digits(int count) {
  std::random_device random;
  std::string digits;
  for (int i = 0; i < count; ++i) digits += "0123456789abcdef"[random() % 16];
  return digits;
}

/// How the names of this kernel's temporary files begin. Where it has no name itself, files have
/// one that no process looks for.
std::string prefix() {
  std::string boot(8, '\0');
  std::ifstream("/proc/sys/kernel/random/boot_id").read(boot.data(), 8);
  const auto is_digit = [](unsigned char c) { return std::isxdigit(c) != 0; };
  if (!std::all_of(boot.begin(), boot.end(), is_digit)) boot = random_digits(8);
  return "et-moe-" + boot + "-";
}

/// Opens a new file and locks it. Another process may take it for stale before it is locked, and
/// remove it: then it is made once more.
int open_locked(const std::string& path, mode_t mode) {
  for (;;) {
    const int fd = open(path.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, mode);
    if (fd < 0) return fd;
    flock(fd, LOCK_EX);  // where there are no locks, nothing is ever taken for stale
    struct stat info{};
    if (fstat(fd, &info) != 0 || info.st_nlink > 0) return fd;
    close(fd);
  }
}

void remove_if_stale(const std::string& path) {
  const int fd = open(path.c_str(), O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
  if (fd < 0) return;
  struct stat info{};
  const bool is_ours = fstat(fd, &info) == 0 && S_ISREG(info.st_mode) && info.st_uid == geteuid();
  if (is_ours && flock(fd, LOCK_EX | LOCK_NB) == 0) unlink(path.c_str());
  close(fd);
}

}  // namespace

std::string temporary_path(const std::string& target) {
  const std::string name = prefix() + random_digits(16) + ".tmp";
  return std::filesystem::path(target).replace_filename(name);
}

int create_temporary_file(const std::string& path, mode_t mode) {
  const Change change;
  const auto name = names().insert(path).first;
  const int fd = open_locked(path, mode);
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

void remove_stale_files(const std::string& folder) {
  const std::string begin = prefix();
  std::error_code error;
  std::filesystem::directory_iterator entry(folder.empty() ? "." : folder, error);
  for (; !error && entry != std::filesystem::directory_iterator(); entry.increment(error)) {
    const std::string name = entry->path().filename();
    const bool is_temporary = name.rfind(begin, 0) == 0 && entry->path().extension() == ".tmp";
    if (is_temporary) remove_if_stale(entry->path());
  }
}

void remove_temporary_files() {
  lock();
  for (const std::string& name : names()) unlink(name.c_str());
}

}  // namespace et_moe

#include "runner/files.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <charconv>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <memory>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <utility>

#include "backends/messages.h"
#include "runner/errors.h"
#include "runner/temporary_files.h"

namespace et_moe {
namespace {

[[noreturn]] void fail(const std::string& path, const char* what) {
  throw std::runtime_error(path + ": " + what + ": " + std::strerror(errno));
}

/// The descriptor that a path names: 7 of "/dev/fd/7". -1 if it names none.
int named_descriptor(const std::string& path) {
  for (const std::string folder : {"/dev/fd/", "/proc/self/fd/"}) {
    int fd = -1;
    const char* const end = path.data() + path.size();
    if (path.rfind(folder, 0) == 0 &&
        std::from_chars(path.data() + folder.size(), end, fd).ptr == end) {
      return fd;
    }
  }
  return -1;
}

/// The descriptor with which this process has the file of a path open already, so that it is
/// written through that; -1 if there is none.
int known_descriptor(const std::string& path, const struct stat& found) {
  const auto is_open_for_writing = [](int fd) {
    const int flags = fcntl(fd, F_GETFL);
    return flags >= 0 && (flags & O_ACCMODE) != O_RDONLY;
  };
  if (const int fd = named_descriptor(path); fd >= 0) {
    errno = EBADF;
    if (!is_open_for_writing(fd)) fail(path, "cannot be written");
    return fd;
  }
  for (int stream : {STDOUT_FILENO, STDERR_FILENO}) {
    struct stat info{};
    if (fstat(stream, &info) == 0 && info.st_dev == found.st_dev && info.st_ino == found.st_ino &&
        is_open_for_writing(stream)) {
      return stream;
    }
  }
  return -1;
}

/// Whether what is there is written to as it is: what is no regular file, and a file that is
/// mounted there, as containers do. Nobody may rename over a mount point (EBUSY), and the folder
/// around it often is not the user's.
bool stays(const std::string& path, const struct stat& found) {
  if (!S_ISREG(found.st_mode)) return true;
  struct statx info{};
  return statx(AT_FDCWD, path.c_str(), 0, 0, &info) == 0 &&
         (info.stx_attributes & STATX_ATTR_MOUNT_ROOT) != 0;
}

/// Refuses what `open` would refuse only when the work is done.
void check_kind(const std::string& path, const struct stat& found) {
  if (S_ISSOCK(found.st_mode)) throw std::runtime_error(path + ": cannot be written: is a socket");
  errno = EISDIR;
  if (S_ISDIR(found.st_mode)) fail(path, "cannot be written");
}

/// Throws where a regular file may not be replaced: it is another user's in a folder with the
/// sticky bit, or immutable. `rmdir` asks the kernel that before it sees that this is no folder
/// (ENOTDIR).
void check_replaceable(const std::string& path, const std::string& target) {
  if (rmdir(target.c_str()) == 0 || errno != EPERM) return;
  throw std::runtime_error(
      path +
      ": cannot be written: it may not be replaced, being immutable or another "
      "user's in a sticky folder");
}

/// A descriptor of what is to be written to as it is, or -1 for a file that is to be replaced.
int open_in_place(const std::string& path, const struct stat& found) {
  if (const int known = known_descriptor(path, found); known >= 0) {
    std::fflush(stdout);
    return fcntl(known, F_DUPFD_CLOEXEC, 0);
  }
  if (!stays(path, found)) return -1;
  check_kind(path, found);
  const int fd = open(path.c_str(), O_WRONLY | O_TRUNC | O_NOCTTY | O_CLOEXEC);
  if (fd < 0) fail(path, "cannot be written");
  return fd;
}

/// Makes a file with the owner, group and permissions of the one that it is to replace, or with
/// 0666 less the umask; -1 on an error. Nobody else may open it before it has its final
/// permissions.
int create(const std::string& temporary, const struct stat* replaced) {
  const int fd = create_temporary_file(temporary, replaced ? 0600 : 0666);
  if (fd < 0 || !replaced) return fd;
  // A process may set a group of its own, but no owner. Some file systems have neither.
  [[maybe_unused]] const bool kept = fchown(fd, replaced->st_uid, replaced->st_gid) == 0 ||
                                     fchown(fd, static_cast<uid_t>(-1), replaced->st_gid) == 0;
  fchmod(fd, replaced->st_mode & 0777);
  return fd;
}

/// Reads an open file to its end.
void append_all(const std::string& path, int fd, std::string& content) {
  struct stat info{};
  if (fstat(fd, &info) != 0) fail(path, "cannot be read");
  if (S_ISDIR(info.st_mode)) throw std::runtime_error(path + ": is a directory, expected a file");
  size_t size = S_ISREG(info.st_mode) ? static_cast<size_t>(info.st_size) : 0;
  content.resize(size + 1);  // the last byte finds the end
  size = 0;
  for (;;) {
    const ssize_t count = read(fd, content.data() + size, content.size() - size);
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) fail(path, "cannot be read");
    if (count == 0) return content.resize(size);
    size += static_cast<size_t>(count);
    if (size == content.size()) content.resize(2 * size);
  }
}

/// What a parser reads of a JSON list of token ids, or of a list of such lists where `takes_lists`.
/// It stops at the first fault.
struct IdList : nlohmann::json_sax<nlohmann::json> {
  const bool takes_lists;
  Windows windows;
  std::string error;
  int depth = 0;

  explicit IdList(bool lists) : takes_lists(lists) {}

  bool fail(const std::string& what) {
    error = what;
    return false;
  }
  bool other() {
    const auto& lists = windows.ids;
    if (depth == 0) return fail("expected a JSON list of token ids");
    if (depth == 1 && windows.is_list) {
      return fail("entry " + std::to_string(lists.size()) + " is not a list of token ids");
    }
    const std::string of = depth == 2 ? " of list " + std::to_string(lists.size() - 1) : "";
    return fail("entry " + std::to_string(lists.back().size()) + of + " is not a token id");
  }
  bool number_integer(int64_t value) override {
    if (depth == 0 || (depth == 1 && windows.is_list)) return other();
    windows.ids.back().push_back(value);
    return true;
  }
  bool number_unsigned(uint64_t value) override {
    return value <= INT64_MAX ? number_integer(static_cast<int64_t>(value)) : other();
  }
  bool start_array(size_t) override {
    const bool is_item = depth == 1 && takes_lists && (windows.is_list || windows.ids[0].empty());
    if (depth > 0 && !is_item) return other();
    if (depth == 0 || windows.is_list) windows.ids.emplace_back();
    windows.is_list = is_item;
    ++depth;
    return true;
  }
  bool end_array() override {
    --depth;
    return true;
  }
  bool parse_error(size_t, const std::string&, const nlohmann::json::exception& e) override {
    return fail("not a JSON list of token ids: " + reason(e));
  }
  bool null() override { return other(); }
  bool boolean(bool) override { return other(); }
  bool number_float(double, const std::string&) override { return other(); }
  bool string(std::string&) override { return other(); }
  bool binary(nlohmann::json::binary_t&) override { return other(); }
  bool start_object(size_t) override { return other(); }
  bool key(std::string&) override { return other(); }
  bool end_object() override { return other(); }
};

/// Has `list` read a file.
void read_list(const std::string& path, IdList& list) {
  const std::unique_ptr<std::FILE, int (*)(std::FILE*)> file(std::fopen(path.c_str(), "re"),
                                                             std::fclose);
  if (!file) fail(path, "cannot be opened");
  needing_memory(path, [&] { nlohmann::json::sax_parse(file.get(), &list); });
  if (std::ferror(file.get())) fail(path, "cannot be read");
  // The parser takes a byte 0 for the end.
  const bool met_end =
      list.error.empty() || list.error.find("unexpected end of input") != std::string::npos;
  if (met_end && !std::feof(file.get())) list.fail("not a JSON list of token ids: it has a byte 0");
  if (!list.error.empty()) throw std::runtime_error(path + ": " + list.error);
}

}  // namespace

std::string follow_links(const std::string& path) {
  std::filesystem::path target(path);
  constexpr int kMostLinks = 40;  // as the kernel has it
  for (int i = 0; i < kMostLinks; ++i) {
    std::error_code no_link;
    const auto next = std::filesystem::read_symlink(target, no_link);
    if (no_link) break;
    target = target.parent_path() / next;
  }
  return target;
}

std::string read_file(const std::string& path) {
  const int fd = open(path.c_str(), O_RDONLY | O_NOCTTY | O_CLOEXEC);
  if (fd < 0) fail(path, "cannot be opened");
  std::string content;
  try {
    needing_memory(path, [&] { append_all(path, fd, content); });
  } catch (...) {
    ::close(fd);
    throw;
  }
  ::close(fd);
  return content;
}

OutputFile::OutputFile(std::string path) : path_(std::move(path)) {
  struct stat found{};
  const bool exists = stat(path_.c_str(), &found) == 0;
  check(exists || errno == ENOENT);
  if (exists) fd_ = open_in_place(path_, found);
  if (fd_ >= 0) return;
  target_ = follow_links(path_);
  if (exists) check_replaceable(path_, target_);
  temporary_ = temporary_path(target_);
  fd_ = create(temporary_, exists ? &found : nullptr);
  check(fd_ >= 0);
}

OutputFile::~OutputFile() { discard(); }

void OutputFile::check(bool success) const {
  if (!success) fail(path_, "cannot be written");
}

void OutputFile::discard() {
  if (fd_ >= 0) ::close(fd_);
  fd_ = -1;
  if (temporary_.empty()) return;
  unlink(temporary_.c_str());
  forget_temporary_file(temporary_);
  temporary_.clear();
}

void OutputFile::write(const void* data, size_t size) {
  const char* bytes = static_cast<const char*>(data);
  while (size > 0) {
    const ssize_t written = ::write(fd_, bytes, size);
    if (written < 0 && errno == EINTR) continue;
    check(written > 0);
    bytes += written;
    size -= static_cast<size_t>(written);
  }
}

void OutputFile::close() {
  if (temporary_.empty()) return check(::close(std::exchange(fd_, -1)) == 0);
  check(fsync(fd_) == 0);
  // The file keeps its lock until it has its final name, else it could be taken for stale.
  const int lock = fcntl(fd_, F_DUPFD_CLOEXEC, 0);
  const bool renamed =
      ::close(std::exchange(fd_, -1)) == 0 && std::rename(temporary_.c_str(), target_.c_str()) == 0;
  const int error = errno;
  ::close(lock);
  errno = error;
  check(renamed);
  forget_temporary_file(temporary_);
  temporary_.clear();
}

void check_writable(const std::string& path) {
  struct stat found{};
  if (stat(path.c_str(), &found) == 0) {
    if (known_descriptor(path, found) >= 0) return;
    check_kind(path, found);
    if (stays(path, found)) {
      if (access(path.c_str(), W_OK) != 0) fail(path, "cannot be written");
      return;
    }
  }
  const OutputFile probe(path);
  remove_stale_files(std::filesystem::path(follow_links(path)).parent_path());
}

void write_file(const std::string& path, std::string_view content) {
  OutputFile file(path);
  file.write(content.data(), content.size());
  file.close();
}

std::vector<int64_t> read_ids(const std::string& path) {
  IdList list(false);
  read_list(path, list);
  return std::move(list.windows.ids.front());
}

Windows read_windows(const std::string& path) {
  IdList list(true);
  read_list(path, list);
  return std::move(list.windows);
}

MappedFile::MappedFile(const std::string& path) {
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);  // a FIFO would wait
  if (fd < 0) fail(path, "cannot be opened");
  struct stat info{};
  const bool known = fstat(fd, &info) == 0;
  if (!known || !S_ISREG(info.st_mode) || info.st_size == 0) {
    ::close(fd);
    throw std::runtime_error(path + ": is empty or not a regular file");
  }
  size_ = static_cast<size_t>(info.st_size);
  // Writable, though nobody should: a kernel of a crafted program that takes a weight for its state
  // then changes a copy of its own, instead of ending the process.
  void* map = mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_NORESERVE, fd, 0);
  ::close(fd);
  if (map == MAP_FAILED) fail(path, "cannot be mapped");
  data_ = static_cast<const uint8_t*>(map);
}

MappedFile::~MappedFile() { munmap(const_cast<uint8_t*>(data_), size_); }

NpyWriter::NpyWriter(const std::string& path, size_t rows, size_t columns)
    : file_(path), columns_(columns) {
  std::string header = "{'descr': '<f4', 'fortran_order': False, 'shape': (" +
                       std::to_string(rows) + ", " + std::to_string(columns) + "), }";
  constexpr size_t kPreamble = 10;
  header.append(63 - (kPreamble + header.size()) % 64, ' ');
  header.push_back('\n');
  const auto size = static_cast<uint16_t>(header.size());
  std::string start("\x93NUMPY\x01\x00", 8);
  start.push_back(static_cast<char>(size & 0xff));
  start.push_back(static_cast<char>(size >> 8));
  file_.write((start + header).data(), kPreamble + header.size());
}

void NpyWriter::write_row(const float* row) { file_.write(row, columns_ * sizeof(float)); }

}  // namespace et_moe

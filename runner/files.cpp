#include "runner/files.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>
#include <stdexcept>

namespace et_moe {
namespace {

[[noreturn]] void fail(const std::string& path, const char* what) {
  throw std::runtime_error(path + ": " + what + ": " + std::strerror(errno));
}

std::string temporary_name(const std::string& path) {
  return path + "." + std::to_string(getpid()) + ".tmp";
}

/// Opens the temporary file that becomes `path`.
int create(const std::string& temporary, const std::string& path) {
  const int fd = open(temporary.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
  if (fd < 0) fail(path, "cannot be written");
  return fd;
}

void write_all(int fd, const void* data, size_t size, const std::string& path) {
  const char* bytes = static_cast<const char*>(data);
  while (size > 0) {
    const ssize_t written = ::write(fd, bytes, size);
    if (written < 0 && errno == EINTR) continue;
    if (written <= 0) fail(path, "cannot be written");
    bytes += written;
    size -= static_cast<size_t>(written);
  }
}

}  // namespace

std::string read_file(const std::string& path) {
  struct stat info{};
  if (stat(path.c_str(), &info) != 0) fail(path, "cannot be opened");
  if (S_ISDIR(info.st_mode)) throw std::runtime_error(path + ": is a directory, expected a file");
  std::ifstream file(path, std::ios::binary);
  if (!file) fail(path, "cannot be opened");
  std::ostringstream content;
  content << file.rdbuf();
  if (file.bad()) fail(path, "cannot be read");
  return content.str();
}

void write_file(const std::string& path, std::string_view content) {
  const std::string temporary = temporary_name(path);
  const int fd = create(temporary, path);
  try {
    write_all(fd, content.data(), content.size(), path);
    if (::close(fd) != 0) fail(path, "cannot be written");
    if (std::rename(temporary.c_str(), path.c_str()) != 0) fail(path, "cannot be written");
  } catch (...) {
    unlink(temporary.c_str());
    throw;
  }
}

std::vector<int64_t> read_ids(const std::string& path) {
  const std::string text = read_file(path);
  // A list of numbers nests one level deep; a parser must not recurse on what a file makes up.
  const auto too_deep = [](int depth, nlohmann::json::parse_event_t, nlohmann::json&) {
    if (depth > 2) throw std::runtime_error("nested lists");
    return true;
  };
  nlohmann::json list;
  try {
    list = nlohmann::json::parse(text, too_deep);
  } catch (const std::exception& e) {
    throw std::runtime_error(path + ": not a JSON list of token ids: " + e.what());
  }
  if (!list.is_array()) throw std::runtime_error(path + ": expected a JSON list of token ids");
  std::vector<int64_t> ids;
  for (size_t i = 0; i < list.size(); ++i) {
    if (!list[i].is_number_integer()) {
      throw std::runtime_error(path + ": entry " + std::to_string(i) + " is not a token id");
    }
    ids.push_back(list[i].get<int64_t>());
  }
  return ids;
}

MappedFile::MappedFile(const std::string& path) {
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) fail(path, "cannot be opened");
  struct stat info{};
  const bool known = fstat(fd, &info) == 0;
  if (!known || !S_ISREG(info.st_mode) || info.st_size == 0) {
    ::close(fd);
    throw std::runtime_error(path + ": is empty or not a regular file");
  }
  size_ = static_cast<size_t>(info.st_size);
  void* map = mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, fd, 0);
  ::close(fd);
  if (map == MAP_FAILED) fail(path, "cannot be mapped");
  data_ = static_cast<const uint8_t*>(map);
}

MappedFile::~MappedFile() { munmap(const_cast<uint8_t*>(data_), size_); }

NpyWriter::NpyWriter(const std::string& path, size_t rows, size_t columns)
    : path_(path), temporary_(temporary_name(path)), columns_(columns) {
  std::string header = "{'descr': '<f4', 'fortran_order': False, 'shape': (" +
                       std::to_string(rows) + ", " + std::to_string(columns) + "), }";
  constexpr size_t kPreamble = 10;
  header.append(63 - (kPreamble + header.size()) % 64, ' ');
  header.push_back('\n');
  const auto size = static_cast<uint16_t>(header.size());
  std::string start("\x93NUMPY\x01\x00", 8);
  start.push_back(static_cast<char>(size & 0xff));
  start.push_back(static_cast<char>(size >> 8));
  fd_ = create(temporary_, path_);
  try {
    write((start + header).data(), kPreamble + header.size());
  } catch (...) {
    discard();
    throw;
  }
}

NpyWriter::~NpyWriter() { discard(); }

void NpyWriter::discard() {
  if (fd_ < 0) return;
  ::close(fd_);
  unlink(temporary_.c_str());
}

void NpyWriter::write(const void* data, size_t size) { write_all(fd_, data, size, path_); }

void NpyWriter::write_row(const float* row) { write(row, columns_ * sizeof(float)); }

void NpyWriter::close() {
  if (fsync(fd_) != 0 || std::rename(temporary_.c_str(), path_.c_str()) != 0) {
    fail(path_, "cannot be written");
  }
  ::close(fd_);
  fd_ = -1;
}

}  // namespace et_moe

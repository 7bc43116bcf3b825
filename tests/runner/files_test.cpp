// Tests of outputs: what they replace, what they leave behind, and what is written to in place.
#include "runner/files.h"

#include <fcntl.h>
#include <grp.h>
#include <gtest/gtest.h>
#include <sched.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <thread>

#include "files_fixture.h"

namespace {
int synced = 0;
}  // namespace

/// Stands in for the C library's function and counts the calls.
extern "C" int fsync(int fd) {
  ++synced;
  return static_cast<int>(syscall(SYS_fsync, fd));
}

namespace et_moe {
namespace {

/// Stands in for a full disk: the kernel refuses bytes of a file beyond a limit.
class FullDisk {
 public:
  explicit FullDisk(rlim_t limit) {
    std::signal(SIGXFSZ, SIG_IGN);
    getrlimit(RLIMIT_FSIZE, &before_);
    const rlimit now{limit, before_.rlim_max};
    setrlimit(RLIMIT_FSIZE, &now);
  }
  ~FullDisk() { setrlimit(RLIMIT_FSIZE, &before_); }

 private:
  rlimit before_{};
};

mode_t permissions(const std::string& path) {
  struct stat info{};
  stat(path.c_str(), &info);
  return info.st_mode & 07777;
}

long open_descriptors() {
  return std::distance(fs::directory_iterator("/proc/self/fd"), fs::directory_iterator());
}

TEST_F(Files, WriteReplacesWholeFilesAndLeavesNothingBehind) {
  write_file(path("a"), "first");
  write_file(path("a"), "second");
  EXPECT_EQ(read_file(path("a")), "second");
  EXPECT_THROW(write_file(path("missing/a"), "x"), std::runtime_error);
  EXPECT_THROW(write_file(folder, "x"), std::runtime_error);
  fs::create_symlink("loop", folder / "loop");
  EXPECT_THROW(write_file(path("loop"), "x"), std::runtime_error);
  EXPECT_EQ(names(), (Names{"a", "loop"}));
}

TEST_F(Files, AFailedWriteLeavesNeitherFilesNorDescriptors) {
  write_file(path("a"), "kept");
  const long before = open_descriptors();
  for (rlim_t limit : {0, 10}) {
    const FullDisk full(limit);
    EXPECT_THROW(write_file(path("a"), std::string(100, 'x')), std::runtime_error);
    const float row[100] = {};
    EXPECT_THROW(NpyWriter(path("a"), 1, 100).write_row(row), std::runtime_error);
  }
  EXPECT_EQ(open_descriptors(), before);
  EXPECT_EQ(read_file(path("a")), "kept");
  EXPECT_EQ(names(), Names{"a"});
}

TEST_F(Files, ContentIsOnTheDiskBeforeTheNameIs) {
  synced = 0;
  write_file(path("a"), "x");
  EXPECT_EQ(synced, 1);
  NpyWriter(path("b"), 0, 1).close();
  EXPECT_EQ(synced, 2);
}

TEST_F(Files, PermissionsOfWhatIsReplacedStay) {
  for (mode_t mode : {0600, 0640, 0444, 0777}) {
    write_file(path("a"), "first");
    chmod(path("a").c_str(), mode);
    write_file(path("a"), "second");
    EXPECT_EQ(permissions(path("a")), mode);
  }
}

TEST_F(Files, ANewFileObeysTheUmask) {
  for (mode_t mask : {022, 077, 002}) {
    umask(mask);
    write_file(path("a"), "x");
    EXPECT_EQ(permissions(path("a")), 0666 & ~mask);
    fs::remove(path("a"));
  }
}

TEST_F(Files, ContentIsNeverOpenToMoreThanTheFileWas) {
  write_file(path("a"), "x");
  chmod(path("a").c_str(), 0600);
  const OutputFile file(path("a"));
  for (const auto& name : names()) EXPECT_EQ(permissions(path(name.c_str())), 0600u) << name;
  EXPECT_EQ(names().size(), 2u);
}

TEST_F(Files, TheOwnerOfWhatIsReplacedStays) {
  if (geteuid() != 0) GTEST_SKIP() << "only root may give files away";
  write_file(path("a"), "x");
  ASSERT_EQ(chown(path("a").c_str(), 12345, 23456), 0);
  write_file(path("a"), "y");
  struct stat info{};
  stat(path("a").c_str(), &info);
  EXPECT_EQ(info.st_uid, 12345u);
  EXPECT_EQ(info.st_gid, 23456u);
}

TEST_F(Files, WritingToAMappedFileEndsNothingAndLeavesTheFile) {
  write_file(path("file"), "abc");
  const MappedFile file(path("file"));
  const_cast<uint8_t*>(file.data())[0] = 'x';
  EXPECT_EQ(read_file(path("file")), "abc");
}

TEST_F(Files, ALinkIsFollowed) {
  fs::create_directory(folder / "d");
  fs::create_symlink("d/second", folder / "first");
  fs::create_symlink("../target", folder / "d" / "second");
  for (const char* content : {"made", "replaced"}) {  // the target does not exist yet, then it does
    write_file(path("first"), content);
    EXPECT_EQ(read_file(path("target")), content);
    EXPECT_TRUE(fs::is_symlink(path("first")) && fs::is_symlink(path("d/second")));
  }
  EXPECT_EQ(names(), (Names{"d", "first", "target"}));
}

TEST_F(Files, AFifoIsWrittenTo) {
  ASSERT_EQ(mkfifo(path("fifo").c_str(), 0600), 0);
  fs::create_symlink("fifo", folder / "link");
  for (const char* name : {"fifo", "link"}) {
    std::string content;
    std::thread reader([&] { content = read_file(path("fifo")); });
    write_file(path(name), std::string(100'000, 'x'));
    reader.join();
    EXPECT_EQ(content, std::string(100'000, 'x'));
  }
  EXPECT_TRUE(fs::is_fifo(path("fifo")));
  EXPECT_EQ(names(), (Names{"fifo", "link"}));
}

TEST_F(Files, WhatStandardOutputGoesToIsWrittenThroughIt) {
  // This is a link of our own to where /dev/stdout leads. If the test ran as root, a fault would
  // replace /dev/stdout itself for the whole machine.
  fs::create_symlink("/proc/self/fd/1", folder / "link");
  for (const char* name : {"file", "link"}) {
    std::fflush(stdout);  // otherwise the child prints it too
    const pid_t child = fork();
    if (child == 0) {
      dup2(open(path("file").c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0600), STDOUT_FILENO);
      std::printf("before ");
      write_file(path(name), "within ");
      std::printf("after");
      std::fflush(stdout);
      _exit(0);
    }
    waitpid(child, nullptr, 0);
    EXPECT_EQ(read_file(path("file")), "before within after") << name;
  }
  EXPECT_EQ(names(), (Names{"file", "link"}));
}

TEST_F(Files, WhetherAFileCanBeWrittenIsFoundWithoutATrace) {
  write_file(path("a"), "kept");
  ASSERT_EQ(mkfifo(path("fifo").c_str(), 0600),
            0);  // nobody reads it, so opening it would never end
  const Names before = names();
  for (const char* name : {"a", "new", "fifo"}) check_writable(path(name));
  check_writable("/dev/null");
  for (const char* name : {"missing/a", "a/b", "."}) {
    try {
      check_writable(path(name));
      ADD_FAILURE() << name;
    } catch (const std::runtime_error& e) {
      EXPECT_EQ(std::string(e.what()).find(path(name) + ": cannot be written: "), 0u) << e.what();
    }
  }
  EXPECT_EQ(names(), before);
  EXPECT_EQ(read_file(path("a")), "kept");
}

/// What `body` prints in a process of its own.
template <typename Body>
std::string in_a_process(const std::string& output, const Body& body) {
  const pid_t child = fork();
  if (child == 0) {
    std::string said = "done";
    try {
      body();
    } catch (const std::exception& e) {
      said = e.what();
    }
    const int fd = open(output.c_str(), O_WRONLY | O_TRUNC);
    _exit(write(fd, said.data(), said.size()) < 0);
  }
  waitpid(child, nullptr, 0);
  return read_file(output);
}

TEST_F(Files, ASocketIsRefusedBeforeTheWork) {
  const int fd = socket(AF_UNIX, SOCK_STREAM, 0);
  sockaddr_un address{AF_UNIX, {}};
  path("socket").copy(address.sun_path, sizeof address.sun_path - 1);
  ASSERT_EQ(bind(fd, reinterpret_cast<sockaddr*>(&address), sizeof address), 0);
  for (const auto& attempt : {check_writable, +[](const std::string& p) { write_file(p, "x"); }}) {
    try {
      attempt(path("socket"));
      ADD_FAILURE();
    } catch (const std::runtime_error& e) {
      EXPECT_EQ(e.what(), path("socket") + ": cannot be written: is a socket");
    }
  }
  close(fd);
}

TEST_F(Files, ADescriptorThatIsOnlyReadIsRefusedBeforeTheWork) {
  write_file(path("a"), "kept");
  const int fd = open(path("a").c_str(), O_RDONLY);
  EXPECT_THROW(check_writable("/dev/fd/" + std::to_string(fd)), std::runtime_error);
  close(fd);
  EXPECT_EQ(read_file(path("a")), "kept");
}

TEST_F(Files, AnotherUsersFileInAStickyFolderIsRefusedBeforeTheWork) {
  if (geteuid() != 0) GTEST_SKIP() << "only root may become another user";
  write_file(path("a"), "kept");
  write_file(path("said"), "");
  fs::permissions(folder, fs::perms::all | fs::perms::sticky_bit);
  for (const char* name : {"a", "said"}) chmod(path(name).c_str(), 0666);
  const auto as_another = [&](const std::string& name) {
    return in_a_process(path("said"), [&] {
      if (setgroups(0, nullptr) != 0 || setgid(12345) != 0 || setuid(12345) != 0) _exit(1);
      check_writable(name);
    });
  };
  const std::string expected = path("a") + ": cannot be written: it may not be replaced";
  EXPECT_EQ(as_another(path("a")).substr(0, expected.size()), expected);
  EXPECT_EQ(as_another(path("new")), "done");
  EXPECT_EQ(read_file(path("a")), "kept");
}

TEST_F(Files, AFileThatIsAMountPointIsWrittenTo) {
  for (const char* name : {"source", "mounted", "read-only", "said"})
    write_file(path(name), "kept");
  const auto mounted = [&](const char* name, unsigned long more, const auto& body) {
    return in_a_process(path("said"), [&] {
      const auto mount_on = [&](unsigned long flags) {
        return mount(path("source").c_str(), path(name).c_str(), nullptr, flags, nullptr) == 0;
      };
      if (unshare(CLONE_NEWNS) != 0 || mount(nullptr, "/", nullptr, MS_REC | MS_PRIVATE, nullptr) ||
          !mount_on(MS_BIND) || (more && !mount_on(MS_REMOUNT | MS_BIND | more))) {
        throw std::runtime_error("no mounts");
      }
      body(path(name));
    });
  };
  const auto write_both = [](const std::string& p) {
    check_writable(p);
    if (read_file(p) != "kept") throw std::runtime_error("the probe changed it");
    write_file(p, "new");
  };
  const std::string said = mounted("mounted", 0, write_both);
  if (said == "no mounts") GTEST_SKIP() << "only root may mount";
  EXPECT_EQ(said, "done");
  EXPECT_EQ(read_file(path("source")), "new");
  EXPECT_EQ(read_file(path("mounted")), "kept");
  EXPECT_EQ(mounted("read-only", MS_RDONLY, check_writable),
            path("read-only") + ": cannot be written: Read-only file system");
}

TEST_F(Files, FilesOfUnknownSizeAreReadWhole) {
  EXPECT_EQ(read_file("/proc/self/comm"), "files_test\n");  // a file whose size is 0
  write_file(path("empty"), "");
  EXPECT_EQ(read_file(path("empty")), "");
  for (size_t size : {1u, 4096u, 100'000u}) {
    write_file(path("a"), std::string(size, 'x'));
    EXPECT_EQ(read_file(path("a")), std::string(size, 'x'));
  }
  for (const char* name : {"missing", "."}) EXPECT_THROW(read_file(path(name)), std::runtime_error);
}

TEST_F(Files, IdsAreAListOfIntegers) {
  const std::string ids = path("ids.json");
  write_file(ids, "[1, 2,3]");
  EXPECT_EQ(read_ids(ids), (std::vector<int64_t>{1, 2, 3}));
  for (const char* bad : {"", "{}", "[1, 2", "[1.5]", "[\"1\"]", "[[1]]", "[[[[[[1]]]]]]", "1"}) {
    write_file(ids, bad);
    EXPECT_THROW(read_ids(ids), std::runtime_error) << bad;
  }
}

TEST_F(Files, WindowsAreListsOfIdsOrOne) {
  const std::string file = path("ids.json");
  const auto read = [&](const char* text) {
    write_file(file, text);
    return read_windows(file);
  };
  using Lists = std::vector<std::vector<int64_t>>;
  EXPECT_EQ(read("[1, 2]").ids, (Lists{{1, 2}}));
  EXPECT_FALSE(read("[1, 2]").is_list);
  EXPECT_EQ(read("[]").ids, Lists{{}});
  EXPECT_EQ(read("[[1, 2], [], [3]]").ids, (Lists{{1, 2}, {}, {3}}));
  EXPECT_EQ(read("[[]]").ids, Lists{{}});
  EXPECT_TRUE(read("[[]]").is_list);
  for (const char* bad : {"[[1], 2]", "[1, [2]]", "[[[1]]]", "[[1]", "[[1]] [2]", "[[1], null]"}) {
    EXPECT_THROW(read(bad), std::runtime_error) << bad;
  }
}

TEST_F(Files, NpyHasAnAlignedHeaderAndAppearsOnClose) {
  const std::string npy = path("a.npy");
  const float row[] = {1, 2, 3};
  {
    NpyWriter dropped(npy, 2, 3);
    dropped.write_row(row);
  }
  EXPECT_NE(access(npy.c_str(), F_OK), 0);
  NpyWriter writer(npy, 2, 3);
  writer.write_row(row);
  writer.write_row(row);
  writer.close();
  const std::string content = read_file(npy);
  EXPECT_EQ(content.size() % 64, 24u);
  EXPECT_NE(content.find("'shape': (2, 3)"), std::string::npos);
}

}  // namespace
}  // namespace et_moe

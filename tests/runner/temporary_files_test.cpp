// Tests of temporary files: their names, and who removes them.
#include "runner/temporary_files.h"

#include <sys/wait.h>
#include <unistd.h>

#include <csignal>

#include "files_fixture.h"
#include "runner/files.h"

/// Stands in for the C library's function, so that there are many tries in a second.
extern "C" int fsync(int) { return 0; }

namespace et_moe {
namespace {

using TemporaryFiles = Files;

TEST_F(TemporaryFiles, TemporaryNamesDifferAndSayNothingOfTheProcess) {
  Names seen;
  for (int i = 0; i < 3; ++i) {
    const OutputFile file(path("a"));
    for (const auto& name : names()) seen.insert(name);
  }
  EXPECT_EQ(seen.size(), 3u);
  for (const auto& name : seen) EXPECT_EQ(name.find(std::to_string(getpid())), name.npos) << name;
  EXPECT_EQ(names(), Names{});
}

TEST_F(TemporaryFiles, TemporaryFilesGoWithTheProcess) {
  const pid_t child = fork();
  if (child == 0) {
    write_file(path("done"), "x");
    OutputFile first(path("first")), second(path("second"));
    remove_temporary_files();
    _exit(0);
  }
  int status = -1;
  waitpid(child, &status, 0);
  EXPECT_EQ(status, 0);
  EXPECT_EQ(names(), Names{"done"});
}

TEST_F(TemporaryFiles, WhatAKilledProcessLeftIsRemoved) {
  const pid_t child = fork();
  if (child == 0) {
    const OutputFile file(path("a"));
    raise(SIGKILL);
  }
  waitpid(child, nullptr, 0);
  ASSERT_EQ(names().size(), 1u);
  const std::string stale = *names().begin();
  const Names others = {"et-moe-00000000-" + stale.substr(16), stale + ".mine", "b.tmp"};
  for (const auto& name : others) write_file(path(name.c_str()), "x");  // not of this naming
  const OutputFile used(path("used"));
  EXPECT_EQ(names().size(), 5u);
  check_writable(path("a"));
  EXPECT_EQ(names().count(stale), 0u);
  EXPECT_EQ(names().size(), 4u);
  for (const auto& name : others) EXPECT_EQ(names().count(name), 1u) << name;
}

TEST_F(TemporaryFiles, WhatIsInUseIsNeverTakenForStale) {
  const pid_t child = fork();
  if (child == 0) {
    for (;;) remove_stale_files(folder);
  }
  for (int i = 0; i < 5'000; ++i) {
    EXPECT_NO_THROW(write_file(path("a"), "x")) << i;
    fs::remove(path("a"));
  }
  kill(child, SIGKILL);
  waitpid(child, nullptr, 0);
  EXPECT_EQ(names(), Names{});
}

}  // namespace
}  // namespace et_moe

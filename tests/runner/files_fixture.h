// A folder for the tests of files.
#pragma once

#include <gtest/gtest.h>
#include <sys/stat.h>

#include <cstdlib>
#include <filesystem>
#include <set>
#include <string>

namespace et_moe {

namespace fs = std::filesystem;

using Names = std::set<std::string>;

class Files : public ::testing::Test {
 protected:
  Files() {
    std::string name = ::testing::TempDir() + "et_moe_XXXXXX";
    folder = mkdtemp(name.data());
    umask(022);
  }
  ~Files() override { fs::remove_all(folder); }

  std::string path(const char* name) const { return folder / name; }

  Names names() const {
    Names found;
    for (const auto& entry : fs::directory_iterator(folder)) found.insert(entry.path().filename());
    return found;
  }

  fs::path folder;
};

}  // namespace et_moe

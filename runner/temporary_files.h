// Temporary files, which are removed even where a signal ends the process.
#pragma once

#include <sys/types.h>

#include <string>

namespace et_moe {

/// Makes a file that `remove_temporary_files` knows until `forget_temporary_file`. `path` must not
/// exist, not even as a symbolic link. Returns a descriptor for writing, or -1 with errno set.
int create_temporary_file(const std::string& path, mode_t mode);

/// For a file that was renamed or removed.
void forget_temporary_file(const std::string& path);

/// Removes all temporary files of a process that is about to end: from then on the functions above
/// do not return. May be called in a signal handler, once.
void remove_temporary_files();

}  // namespace et_moe

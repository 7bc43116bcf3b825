// Temporary files, which are removed even where a signal ends the process, or by a later process
// where this one is killed.
//
// A process locks (flock) each file that it makes, and the kernel takes the lock away with the
// process, however it ends. Such a lock says something to the processes of one kernel only, so the
// name says which one made it. What bears the name of this kernel and is not locked is stale.
// `backends/temporary_files.py` does the same.
#pragma once

#include <sys/types.h>

#include <string>

namespace et_moe {

/// A name beside `target` that nobody can have planted something at.
std::string temporary_path(const std::string& target);

/// Makes a file that `remove_temporary_files` knows until `forget_temporary_file`. `path` must not
/// exist, not even as a symbolic link. Returns a descriptor for writing, or -1 with errno set. The
/// file is locked until that and its duplicates are closed.
int create_temporary_file(const std::string& path, mode_t mode);

/// For a file that was renamed or removed.
void forget_temporary_file(const std::string& path);

/// Removes this user's temporary files of a folder whose process has ended. Whatever cannot be
/// removed stays, without an error.
void remove_stale_files(const std::string& folder);

/// Removes all temporary files of a process that is about to end: from then on the functions above
/// do not return. May be called in a signal handler, once.
void remove_temporary_files();

}  // namespace et_moe

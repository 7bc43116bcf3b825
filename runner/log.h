// ExecuTorch's log, as the text of our errors.
#pragma once

#include <string>

namespace et_moe {

/// From now on ExecuTorch's log goes nowhere but to `take_log`; fatal messages also to stderr.
void capture_log();

/// The first error that ExecuTorch or a kernel logged since the last call, which is the one nearest
/// to its cause, as " (text)"; empty if there was none.
std::string take_log();

}  // namespace et_moe

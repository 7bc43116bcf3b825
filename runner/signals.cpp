#include "runner/signals.h"

#include <unistd.h>

#include <atomic>
#include <csignal>
#include <cstring>

#include "runner/temporary_files.h"

namespace et_moe {
namespace {

/// What a SIGINT does or has done: each goes over into the next, and none back.
enum Interrupt { kEnds, kIsNoted, kWasNoted };
std::atomic<Interrupt> interrupt{kEnds};
static_assert(std::atomic<Interrupt>::is_always_lock_free, "a signal handler changes it");

void end(int number) {
  Interrupt first = kIsNoted;
  if (number == SIGINT && interrupt.compare_exchange_strong(first, kWasNoted)) return;
  remove_temporary_files();
  const char* const line = number == SIGINT    ? "error: ended by SIGINT\n"
                           : number == SIGTERM ? "error: ended by SIGTERM\n"
                           : number == SIGHUP  ? "error: ended by SIGHUP\n"
                           : number == SIGQUIT ? "error: ended by SIGQUIT\n"
                                               : "error: ended by SIGXCPU\n";
  [[maybe_unused]] const ssize_t written = write(STDERR_FILENO, line, std::strlen(line));
  _exit(128 + number);
}

}  // namespace

void handle_ending_signals() {
  struct sigaction action{};
  action.sa_handler = end;
  action.sa_flags = SA_RESTART;
  sigfillset(&action.sa_mask);
  // A file that grows beyond a limit is an error of the call that writes it.
  std::signal(SIGXFSZ, SIG_IGN);
  for (int number : {SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGXCPU}) {
    struct sigaction before{};
    sigaction(number, nullptr, &before);
    if (before.sa_handler != SIG_IGN) sigaction(number, &action, nullptr);
  }
}

void defer_interrupt() {
  Interrupt before = kEnds;
  interrupt.compare_exchange_strong(before, kIsNoted);
}

bool interrupted() { return interrupt == kWasNoted; }

}  // namespace et_moe

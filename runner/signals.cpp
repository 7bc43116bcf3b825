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

/// A signal that ends the runner, and what is said then.
struct Ending {
  int number;
  const char* line;
};
constexpr Ending kEndings[] = {{SIGINT, "error: ended by SIGINT\n"},
                               {SIGTERM, "error: ended by SIGTERM\n"},
                               {SIGHUP, "error: ended by SIGHUP\n"},
                               {SIGQUIT, "error: ended by SIGQUIT\n"},
                               {SIGXCPU, "error: ended by SIGXCPU\n"}};

void end(int number) {
  Interrupt first = kIsNoted;
  if (number == SIGINT && interrupt.compare_exchange_strong(first, kWasNoted)) return;
  remove_temporary_files();
  for (const Ending& ending : kEndings) {
    if (ending.number != number) continue;
    [[maybe_unused]] const ssize_t written =
        write(STDERR_FILENO, ending.line, std::strlen(ending.line));
  }
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
  for (const Ending& ending : kEndings) {
    struct sigaction before{};
    sigaction(ending.number, nullptr, &before);
    if (before.sa_handler != SIG_IGN) sigaction(ending.number, &action, nullptr);
  }
}

void defer_interrupt() {
  Interrupt before = kEnds;
  interrupt.compare_exchange_strong(before, kIsNoted);
}

bool interrupted() { return interrupt == kWasNoted; }

}  // namespace et_moe

#include "runner/signals.h"

#include <unistd.h>

#include <atomic>
#include <csignal>
#include <cstring>

#include "runner/temporary_files.h"

namespace et_moe {
namespace {

/// Which signals are noted instead of ending the process.
enum Deferred { kNone, kInterrupt, kInterruptAndTermination };
std::atomic<Deferred> deferred{kNone};
std::atomic<int> noted{0};  // the first of them, or 0
static_assert(std::atomic<Deferred>::is_always_lock_free && std::atomic<int>::is_always_lock_free,
              "a signal handler uses them");

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
  const Deferred least = number == SIGINT    ? kInterrupt
                         : number == SIGTERM ? kInterruptAndTermination
                                             : kNone;
  int none = 0;
  if (least != kNone && deferred >= least && noted.compare_exchange_strong(none, number)) return;
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

void defer_interrupt() { deferred = kInterrupt; }

void defer_interrupt_and_termination() { deferred = kInterruptAndTermination; }

int interrupted() { return noted; }

}  // namespace et_moe

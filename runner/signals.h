// Signals that ask the process to end: `pipeline/signals.py` does the same for the pipeline.
#pragma once

namespace et_moe {

/// From now on SIGINT, SIGTERM and SIGHUP end the process at once: the temporary files of
/// `OutputFile` are removed, stderr gets one line, and the exit code is 128 plus the signal's
/// number, as a shell reports a process that the signal killed. What was ignored before (by nohup)
/// still is.
void handle_ending_signals();

/// From now on the first SIGINT only makes `interrupted` true; a second one ends the process.
void defer_interrupt();
/// The same of SIGTERM, too: the first of either.
void defer_interrupt_and_termination();

/// The signal that was deferred, or 0 if none came.
int interrupted();

/// The signal came, and the stats up to there are printed.
struct Interrupted {
  int signal;
};

}  // namespace et_moe

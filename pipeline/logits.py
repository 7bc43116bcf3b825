"""Logits of texts, a few rows at a time: of a program, by the runner, and of a Hugging Face model.

Texts are windows of token ids, each of which begins with nothing before it. A window of n tokens
has n - 1 rows of logits, which predict all but its first token. Rows are read in the order of the
windows; those of one window may be read in several parts.
"""

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Protocol

import numpy
import torch
from torch import Tensor

from et_moe.pipeline.config import ConfigError, warn

Windows = Sequence[Sequence[int]]

LOCAL = {"local_files_only": True, "trust_remote_code": False}
"""How transformers opens a checkpoint: no network, and none of the code that it may bring."""
PIPE_BYTES = 1 << 20
"""Of the pipe to the runner, where the system allows it: about a row of a large vocabulary."""
SCORE_METHOD = b"get_score_tokens"
"""Name of a method that programs have if they can be given many tokens for their logits. As bytes
of the file: what would parse it takes seconds to be imported."""
BATCH_TOKENS = 4096
"""Most tokens that the Hugging Face model is given at once, in windows of one length."""


class Logits(Protocol):
    """Where rows come from.

    Attributes:
        vocabulary: V.
    """

    @property
    def vocabulary(self) -> int: ...

    def read(self, count: int) -> Tensor:
        """The next rows, all of one window: `float [count, V]`."""
        ...


class ProgramLogits(contextlib.AbstractContextManager):
    """Those of an exported program. The runner works while the block is open, in one process that
    loads the program once, and waits where its rows are not read.

    Args:
        runner: the runner's binary. program_dir: what `export` wrote.

    Raises:
        ConfigError: the runner cannot be run, or fails; with its message.
    """

    def __init__(self, runner: Path, program_dir: Path, windows: Windows) -> None:
        self._runner, self._program_dir, self._windows = runner, program_dir, windows
        self._shape: tuple[int, int] | None = None

    def __enter__(self) -> "ProgramLogits":
        self._say_how_slow()
        with contextlib.ExitStack() as stack:
            # Files without names: nothing is left of them, however this process ends.
            self._errors = stack.enter_context(tempfile.TemporaryFile())
            ids = stack.enter_context(tempfile.TemporaryFile("w"))
            json.dump([list(window) for window in self._windows], ids)
            ids.flush()
            reading, writing = os.pipe()
            self._rows = stack.enter_context(os.fdopen(reading, "rb", buffering=0))
            try:
                self._process = self._start(ids.fileno(), writing)
            finally:
                os.close(writing)  # the runner's is the only one: that it ends is seen
            stack.callback(self._end)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _say_how_slow(self) -> None:
        """Warns of a program that is fed token by token."""
        path = self._program_dir / "model.pte"
        if path.is_file() and SCORE_METHOD not in path.read_bytes():
            warn(
                f"{path}: takes one token a call; `export --score` makes programs that take 64, "
                "which is faster where weights are large"
            )

    def _start(self, ids: int, writing: int) -> subprocess.Popen:
        self._ids = f"/dev/fd/{ids}"
        with contextlib.suppress(OSError):
            fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        command = [
            self._runner,
            f"--model_path={self._program_dir / 'model.pte'}",
            f"--data_path={self._program_dir / 'model.ptd'}",
            f"--score_ids_path={self._ids}",
            f"--logits_path=/dev/fd/{writing}",
            "--cuda_graph",  # a CPU program ignores it
        ]
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
        try:
            return subprocess.Popen(
                command, stderr=self._errors, pass_fds=(ids, writing), **streams
            )
        except OSError as e:
            message = f"{self._runner}: cannot be run ({e.strerror}); is it built?"
            raise ConfigError(message) from None

    def _end(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _failure(self) -> ConfigError:
        """What is wrong where the rows end too early, or are none."""
        self._rows.close()  # what still writes must not wait for a reader
        code = self._process.wait()
        self._errors.seek(0)
        said = self._errors.read().decode(errors="replace").strip()
        # What it says of the windows is said of a file that nobody but us knows.
        said = said.replace(f"error: {self._ids}: ", f"{self._program_dir}: ")
        if code < 0:
            said = f"{said} (ended by {signal.Signals(-code).name})".strip()
        return ConfigError(f"{self._runner} failed: {said or 'it gave fewer logits than expected'}")

    def _header(self) -> tuple[int, int]:
        if self._shape is None:
            try:
                numpy.lib.format.read_magic(self._rows)
                self._shape, _, _ = numpy.lib.format.read_array_header_1_0(self._rows)
            except ValueError:
                raise self._failure() from None
        return self._shape

    @property
    def vocabulary(self) -> int:
        return self._header()[1]

    def read(self, count: int) -> Tensor:
        """See `Logits`; float32."""
        rows = numpy.empty((count, self.vocabulary), numpy.float32)
        rest = memoryview(rows).cast("B")
        while rest:
            size = self._rows.readinto(rest)
            if not size:
                raise self._failure()
            rest = rest[size:]
        return torch.from_numpy(rows)


SPARE_BYTES = 8 << 30
"""Of a GPU's memory beside a reference on it: for what its batches take, and the calls of a program
that is on the same GPU."""


def reference_device(size: int) -> torch.device:
    """Where a Hugging Face model of so many bytes computes: on a GPU that torch finds, if it has
    room for it, else on the CPU."""
    try:
        if torch.cuda.is_available() and torch.cuda.mem_get_info()[0] >= size + SPARE_BYTES:
            return torch.device("cuda")
    except RuntimeError:
        pass  # a process may have it to itself, such as that of the program
    return torch.device("cpu")


class HuggingFaceLogits:
    """Those of a Hugging Face model, in the checkpoint's dtype; computed on a GPU where there is
    one with enough memory. What the model gives of a batch are hidden states; logits are made of
    them row by row."""

    def __init__(self, model_dir: Path, windows: Windows) -> None:
        from transformers import AutoModelForCausalLM

        self._whole = AutoModelForCausalLM.from_pretrained(
            model_dir, dtype="auto", use_safetensors=True, **LOCAL
        ).eval()
        self._model, self._head = self._whole.base_model, self._whole.get_output_embeddings()
        size = sum(p.nbytes for p in self._whole.parameters())
        self._model_dir, self._device = model_dir, reference_device(size)
        self._compute(self._move, torch.empty(0))
        self._windows = self._hidden(windows)
        self._rest: Tensor | None = None

    @property
    def vocabulary(self) -> int:
        return self._head.weight.shape[0]

    def _move(self, to: Tensor) -> Tensor:
        self._whole.to(to.device)
        return to

    def _compute(self, function: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
        """A function of values, where the model is. Where memory does not suffice for it, all goes
        to the CPU."""
        with torch.no_grad():
            with contextlib.suppress(torch.OutOfMemoryError):
                return function(values.to(self._device))
            warn(f"{self._model_dir}: too little GPU memory is left, so the CPU runs the reference")
            self._device = torch.device("cpu")
            self._whole.to(self._device)
            torch.cuda.empty_cache()  # others have use for it
            return function(values.to(self._device))

    def _forward(self, ids: Tensor) -> Tensor:
        """The hidden states of a batch of windows, `[B, n, H]`."""
        # Without a cache: that of transformers wants a layer of full attention. And without TF32,
        # in which PyTorch computes fp32 convolutions if it may.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            return self._model(ids, use_cache=False).last_hidden_state

    def _hidden(self, windows: Windows) -> Iterator[Tensor]:
        """Of each window the hidden states that its logits are made of, `[n - 1, H]`."""
        for length, group in groupby(windows, len):
            alike, size = list(group), max(1, BATCH_TOKENS // length)
            for begin in range(0, len(alike), size):
                batch = torch.tensor(alike[begin : begin + size])
                yield from self._compute(self._forward, batch)[:, :-1]

    def read(self, count: int) -> Tensor:
        """See `Logits`; in the checkpoint's dtype, on the CPU."""
        if self._rest is None or not len(self._rest):
            self._rest = next(self._windows)
        rows, self._rest = self._rest[:count], self._rest[count:]
        return self._compute(self._head, rows).cpu()

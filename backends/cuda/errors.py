"""Errors that a user can do something about, apart from what takes seconds to import."""


class ToolchainError(RuntimeError):
    """This machine lacks something that compiling for CUDA needs; the message says what."""

"""The C++ runner; `python` has its engine for Python."""

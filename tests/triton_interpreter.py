"""Triton's interpreter as the tests use it: it rounds as a GPU does, and takes less time.

Interpreted kernels spend their time not in numpy but in what surrounds each operation. Triton's
language is replaced at every call of a function, the types of values and the constants in
expressions are built anew, and the arithmetic of integers is checked for overflow by a dozen
further operations, of which nobody reads the result. `install` does the first once, keeps the
second, and leaves out the third. Values stay the same to the last bit, but for the rounding.
"""

import dataclasses
import functools
import math

import numpy as np
import triton.language as tl
from triton.language import core
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter


def install() -> None:
    """Changes `triton.runtime.interpreter` and `triton.language` for the rest of the process."""
    builder = interpreter.interpreter_builder
    if builder.options.debug:
        raise RuntimeError("in debug mode overflow is reported, and may not be left out")
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    interpreter.InterpreterBuilder.cast_impl = _cast(interpreter.InterpreterBuilder.cast_impl)
    interpreter._get_np_dtype = _numpy_type(interpreter._get_np_dtype)
    core._unwrap_if_constexpr = _unwrap(core._unwrap_if_constexpr)
    core.block_type.__new__ = _block_type(core.block_type.__init__)
    core.block_type.__init__ = lambda self, element_ty, shape: None
    core.tensor.__init__ = _initialize_tensor
    TritonSemantic.broadcast_impl_value = _broadcast(TritonSemantic.broadcast_impl_value)
    checking = _check_types(TritonSemantic.binary_op_type_checking_impl)
    TritonSemantic.binary_op_type_checking_impl = checking
    _patch_language()


def _patch_language() -> None:
    """Replaces the language's functions by interpreted ones for good, so that no call replaces them
    again."""
    interpreter._patch_attr = _patch_builtin
    # One of them refers to this file's `tl`, the other to Triton's `core`.
    for function in (_cast, tl.zeros.fn):
        interpreter._patch_lang(function)
    interpreter._patch_lang = lambda function: interpreter._LangPatchScope()


def _patch_builtin(owner, name: str, builtin, builder, scope) -> None:
    # This leaves out the wrapper that asks for `_semantic`.
    function = getattr(builtin, "__wrapped__", builtin)
    semantic = interpreter.interpreter_semantic

    @functools.wraps(function)
    def interpreted(*args, **kwargs):
        kwargs["_semantic"] = semantic
        return function(*args, **kwargs)

    scope.set_attr(owner, name, interpreted)


def _cast(original):
    """Casts that also convert between bf16 and float32. Casts to bf16 round to nearest, ties to
    even, where Triton's truncate."""

    def cast_impl(self, source, target):
        types = source.dtype.scalar.name, target.scalar.name
        if types == ("bf16", "fp32"):
            bits = source.data.astype(np.uint32) << np.uint32(16)
            return interpreter.TensorHandle(bits.view(np.float32), tl.float32)
        if types == ("fp32", "bf16"):
            bits = np.ascontiguousarray(source.data).view(np.uint32)
            last = bits >> np.uint32(16) & np.uint32(1)
            rounded = bits + np.uint32(0x7FFF) + last >> np.uint32(16)
            rounded = np.where(np.isnan(source.data), np.uint32(0x7FC0), rounded)
            return interpreter.TensorHandle(rounded.astype(np.uint16), tl.bfloat16)
        return original(self, source, target)

    return cast_impl


def _numpy_type(original):
    known: dict[str, np.dtype] = {}

    def _get_np_dtype(type_: tl.dtype) -> np.dtype:
        name = type_.name
        if name not in known:
            known[name] = original(type_)
        return known[name]

    return _get_np_dtype


def _unwrap(original):
    plain = {int, float, bool, str, type(None), tl.tensor, tl.dtype}

    def _unwrap_if_constexpr(value):
        kind = type(value)
        if kind in plain:
            return value
        return value.value if kind is tl.constexpr else original(value)

    return _unwrap_if_constexpr


def _block_type(initialize):
    """Equal types become one object, which also has its shape as integers, in `dimensions`."""
    known: dict[tuple, tl.block_type] = {}

    def __new__(cls, element_ty: tl.dtype, shape) -> tl.block_type:
        dimensions = tuple([core._unwrap_if_constexpr(size) for size in shape])
        key = (element_ty.name, getattr(element_ty, "address_space", None), dimensions)
        if key not in known:
            type_ = object.__new__(cls)
            initialize(type_, element_ty, shape)
            type_.dimensions = dimensions
            known[key] = type_
        return known[key]

    return __new__


def _initialize_tensor(self: tl.tensor, handle, type: tl.dtype) -> None:
    """Does what Triton's does, but makes the attributes that depend on the type alone only once per
    type."""
    if not hasattr(type, "of_tensors"):
        shape = type.dimensions if type.is_block() else ()
        sizes = core.tuple([tl.constexpr(size) for size in shape])
        type.of_tensors = {
            "shape": sizes,
            "numel": tl.constexpr(math.prod(shape)),
            "type": type,
            "dtype": type.scalar,
        }
    self.__dict__.update(type.of_tensors)
    self.handle = handle


def _broadcast(original):
    def broadcast_impl_value(self, lhs: tl.tensor, rhs: tl.tensor):
        a, b = lhs.type, rhs.type
        if a is b or (a.is_block() and b.is_block() and a.dimensions == b.dimensions):
            return lhs, rhs
        return original(self, lhs, rhs)

    return broadcast_impl_value


def _check_types(original):
    """Brings an operation's operands to their common type and shape. Most have it already, or are
    numbers."""
    # bf16 and fp16 are divided in float32, and pointers are not numbers.
    plain = {f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)}
    plain |= {"int1", "fp32", "fp64"}
    constants: dict[tuple, tl.tensor] = {}

    def binary_op_type_checking_impl(self, lhs, rhs, *options, **named):
        if isinstance(lhs, tl.tensor) and lhs.dtype.name in plain:
            if isinstance(rhs, tl.tensor):
                if lhs.type is rhs.type:
                    return lhs, rhs
            elif type(rhs) in (int, float):
                named_options = tuple(named.items())
                key = (lhs.type.name, type(rhs), rhs, options, named_options)
                if key not in constants:
                    left, constant = original(self, lhs, rhs, *options, **named)
                    if left is not lhs:
                        return left, constant
                    constant.handle.data.flags.writeable = False
                    constants[key] = constant
                return lhs, constants[key]
        return original(self, lhs, rhs, *options, **named)

    return binary_op_type_checking_impl

"""Weights as they were trained: bf16, fp16 or fp32, one tensor each."""

from collections.abc import Callable, Mapping

from torch import Tensor

from et_moe.pipeline.formats.format import Contents, StoredTensor, TensorError
from et_moe.pipeline.storage import Int4

DTYPES = ("BF16", "F16", "F32")

_METHODS = {
    "ExecuTorch": ("._weight_qdata", ".__qdata", ".w1_scale"),
    "bitsandbytes": (".absmax", ".SCB", ".weight_format", ".quant_map"),
    "HQQ": (".W_q",),
    "EXL3": (".trellis", ".suh", ".svh"),
    "EXL2": (".q_weight", ".q_scale", ".q_invperm"),
    "AQLM": (".codebooks",),
    "Quanto": ("._data", "._scale"),
    "MXFP4": ("_blocks", "_scales"),
    "NVFP4 (ModelOpt)": (".weight_scale_2",),
    "GPTQ or AWQ": (".qweight", ".qzeros"),
    "": (".weight_packed", ".weight_scale", ".weight_scale_inv"),
}
"""Method -> what the names of tensors end with that only its weights have; the last ones are of
several methods."""

_INTEGERS = ("I8", "U8", "I16", "U16", "I32", "U32", "I64")
"""Dtypes of values and codes, as safetensors names them."""


def _find(contents: Contents, said: bool) -> tuple[str, str] | None:
    """A tensor of quantized weights, if there is one, and the method that its name tells.

    Args:
        said: the configuration says that there are some, which may be told by what they hold alone.
    """
    every = tuple(end for ends in _METHODS.values() for end in ends)
    told = [name for name in contents.tensors if name.endswith(every)]
    for method, ends in _METHODS.items():
        for name in told:
            if name.endswith(ends):
                return name, method
    for name, tensor in contents.tensors.items():
        if said and tensor.dtypes[0] in _INTEGERS:
            return name, ""
    return None


class Floats:
    """What formats have in common whose weights are floats once they are read."""

    def __init__(self, tensors: Mapping[str, StoredTensor]) -> None:
        self.names, self.skipped = tensors, ()

    def kept(self, name: str) -> Int4 | None:
        return None


class Unquantized(Floats):
    """A tensor a weight, under its own name. A `quantization_config` that was left in a
    configuration over such tensors is of no account."""

    def __init__(self, contents: Contents) -> None:
        super().__init__(contents.tensors)
        section = contents.config.get("quantization_config")
        said = section.get("quant_method") if isinstance(section, dict) else None
        if (found := _find(contents, bool(said))) is None:
            return
        name, method = found
        by = f" by {said or method}" if said or method else ""
        raise TensorError(
            name,
            f"is of weights quantized{by}, which is not supported: use the bf16 checkpoint,"
            " the block-wise FP8 one, or symmetric INT4 by GPTQ or compressed-tensors",
        )

    @staticmethod
    def matches(contents: Contents) -> bool:
        return True

    def stored(self, name: str, shape: tuple[int, ...]) -> dict[str, StoredTensor]:
        return {name: StoredTensor(DTYPES, shape)}

    def read(self, name: str, read: Callable[[str], Tensor]) -> Tensor:
        return read(name)

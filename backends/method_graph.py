"""What the model hands to a backend: one exported method, with the meaning of its inputs."""

from dataclasses import dataclass

from torch.export import ExportedProgram


@dataclass(frozen=True)
class MethodGraph:
    """An exported method whose graph is made of `torch.ops.et_moe` ops and a few aten ops.

    Weights and state are inputs, not constants: the graph's user inputs are `inputs`, then
    `state` (updated in place), then `weights`, in that order, each a list of names. The outputs
    are the next token, `int64 [1, 1]`, and its logits, `float32 [1, V]`.
    """

    program: ExportedProgram
    inputs: list[str]
    state: list[str]
    weights: list[str]

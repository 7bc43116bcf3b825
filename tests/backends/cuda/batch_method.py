"""Compiles a method of many sequences, with every op that keeps state or knows of sequences.

It runs in a process of its own, since under Triton's interpreter there is nothing to compile.
Run: `python batch_method.py FILE`.
"""

import json
import sys
from pathlib import Path

import torch
from torch._subclasses import FakeTensorMode
from torch.export import Dim

from et_moe.backends import ops
from et_moe.backends.cuda.compile import compile_method
from et_moe.backends.cuda.prepack import plan_weights
from et_moe.backends.method_graph import MethodGraph

SEQUENCES, PAGES, SLOTS = 8, 10, 9
HEADS, KV_HEADS, DIM, HALF = 4, 2, 64, 8
NET_HEADS, NET_DIM = 4, 32
CHANNELS = 3 * NET_HEADS * NET_DIM
FLOAT, LONG, INT, BF16 = torch.float32, torch.int64, torch.int32, torch.bfloat16
INPUTS = {
    "qkv": (BF16, (SEQUENCES, 2 * (HEADS + KV_HEADS) * DIM)),
    "projected": (BF16, (SEQUENCES, CHANNELS + NET_HEADS * NET_DIM + 2 * NET_HEADS)),
    "pages": (INT, (SEQUENCES, 4)),
    "positions": (LONG, (SEQUENCES,)),
    "slots": (INT, (SEQUENCES,)),
    "num_tokens": (LONG, (SEQUENCES,)),
    "temperature": (FLOAT, (SEQUENCES,)),
    "top_k": (LONG, (SEQUENCES,)),
    "top_p": (FLOAT, (SEQUENCES,)),
    "seed": (LONG, (SEQUENCES,)),
}
STATE = {
    "k": (BF16, (PAGES, KV_HEADS, ops.PAGE_SIZE, DIM)),
    "v": (BF16, (PAGES, KV_HEADS, ops.PAGE_SIZE, DIM)),
    "conv": (BF16, (SLOTS, 3, CHANNELS)),
    "recurrent": (FLOAT, (SLOTS, NET_HEADS, NET_DIM, NET_DIM)),
}
WEIGHTS = {
    "head_norm": (BF16, (DIM,)),
    "inv_freq": (FLOAT, (HALF,)),
    "conv": (BF16, (CHANNELS, 4)),
    "gate": (BF16, (NET_HEADS,)),
    "net_norm": (BF16, (NET_DIM,)),
    "norm": (BF16, (HEADS * DIM,)),
    "router": (BF16, (9, HEADS * DIM)),
    "linear": (torch.uint8, (64, HEADS * DIM // 2)),
    "linear_scale": (BF16, (64, HEADS * DIM // 128)),
    "int8": (torch.int8, (64, HEADS * DIM)),
    "int8_scale": (BF16, (64, 1)),
    "dense": (BF16, (64, HEADS * DIM)),
}


class Batch(torch.nn.Module):
    """The ops, one behind the other as far as their shapes fit."""

    def forward(self, qkv, projected, pages, positions, slots, num_tokens, *rest):
        *options, state, w = rest
        et, norm = torch.ops.et_moe, w["head_norm"]
        caches = (state["k"], state["v"], pages, positions)
        x = et.attention(qkv, norm, norm, w["inv_freq"], *caches, 1e-6, num_tokens)
        net = (w["conv"], w["gate"], w["gate"], w["net_norm"], state["conv"], state["recurrent"])
        y = et.gated_delta_net(projected, *net, slots, 1e-6, num_tokens)
        _, weights, ids = et.moe_router(x, w["norm"], w["router"], 2, 1, 1e-6, num_tokens)
        z = et.linear_w4a8(x, w["linear"], w["linear_scale"], 128, w["norm"])
        z8 = et.linear_w8a8(x, w["int8"], w["int8_scale"], w["norm"])
        z16 = et.linear(x, w["dense"], w["norm"])
        return et.sample(x.float(), *options, positions), y, weights, ids, z, z8, z16


def make_method() -> MethodGraph:
    """The method `decode` of 2 to 16 sequences."""

    def empty(tensors):
        return {n: torch.empty(shape, dtype=dtype) for n, (dtype, shape) in tensors.items()}

    with FakeTensorMode():
        arguments = (*empty(INPUTS).values(), empty(STATE), empty(WEIGHTS))
    varying = [{0: Dim("B", min=2, max=16)}] * len(INPUTS)
    shapes = (*varying[:6], (*varying[6:], dict.fromkeys(STATE), dict.fromkeys(WEIGHTS)))
    program = torch.export.export(Batch(), arguments, dynamic_shapes=shapes, strict=False)
    return MethodGraph(
        program=program,
        inputs=list(INPUTS),
        state={name: "slots" if name in ("conv", "recurrent") else "pages" for name in STATE},
        weights=[f"w.{name}" for name in WEIGHTS],
        outputs=["token", "net", "weights", "ids", "linear", "int8", "dense"],
    )


if __name__ == "__main__":
    graph = make_method()
    ranges = compile_method(graph, plan_weights({"decode": graph}), "sm_90").ranges
    kernels = {
        code.longest: {kernel.function: kernel.dependent for kernel in code.kernels}
        for code in ranges
    }
    Path(sys.argv[1]).write_text(json.dumps(kernels))

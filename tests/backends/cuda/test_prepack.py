"""Which weights are prepacked, what shapes they get, and the prepacked tensors themselves."""

import copy
import dataclasses

import pytest
import torch
from lowering_methods import GROUP, HIDDEN, STATE, WEIGHTS, Small, method, methods

from et_moe.backends.cuda import prepack
from et_moe.backends.cuda.prepack import plan_weights
from et_moe.backends.cuda.triton.linear import layout as linear
from et_moe.backends.cuda.triton.moe import layout as moe


@pytest.fixture(scope="module")
def graphs():
    return methods()


def _tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        name: torch.randn(shape).to(dtype)
        if dtype.is_floating_point
        else torch.randint(0, 100, shape).to(dtype)
        for name, (dtype, shape) in WEIGHTS.items()
    }


def test_spec_keeps_names_and_order(graphs):
    plan = plan_weights(graphs)
    assert list(plan.spec) == list(WEIGHTS)
    for name in ("embed.weight", "embed.scale", "conv.weight", "norm.weight"):
        assert plan.spec[name] == WEIGHTS[name]


def test_tensors_are_those_of_the_kernels_prepack(graphs):
    plan, tensors = plan_weights(graphs), _tensors()
    packed = dict(plan.pack(tensors))
    assert list(packed) == list(plan.spec)
    for layer in ("proj", "head"):
        names = (f"{layer}.weight", f"{layer}.scale")
        for name, expected in zip(
            names, linear.prepack_linear(*(tensors[n] for n in names), GROUP), strict=True
        ):
            assert torch.equal(packed[name], expected)
            assert plan.spec[name] == (expected.dtype, tuple(expected.shape))
    assert torch.equal(packed["conv.weight"], tensors["conv.weight"])


def test_pack_by_groups(graphs):
    """Tensors come as an export streams them, those of some layers at a time."""
    plan, tensors = plan_weights(graphs), _tensors()
    halves = [dict(list(tensors.items())[:6]), dict(list(tensors.items())[6:])]
    streamed = [item for half in halves for item in plan.pack(half)]
    assert [name for name, _ in streamed] == list(plan.spec)
    whole = dict(plan.pack(tensors))
    assert all(torch.equal(tensor, whole[name]) for name, tensor in streamed)


def test_experts_are_packed_together():
    experts, inner = 4, 64
    shapes = {
        "w13": (torch.uint8, (experts, 2 * inner, HIDDEN // 2)),
        "w13_scale": (torch.bfloat16, (experts, 2 * inner, HIDDEN // GROUP)),
        "w2": (torch.uint8, (experts, HIDDEN, inner // 2)),
        "w2_scale": (torch.bfloat16, (experts, HIDDEN, inner // GROUP)),
    }

    class Moe(Small):
        def forward(self, tokens, positions, slots, num_tokens, state, w):
            x = self.hidden(tokens, slots, num_tokens, state, w)
            tables = [w[name] for name in shapes]
            weights, ids = torch.ones(1, 2), torch.zeros(1, 2, dtype=torch.int32)
            logits = torch.ops.et_moe.moe_w4a8(x, *tables, weights, ids, GROUP).float()
            return logits.argmax(-1, keepdim=True), logits

    with pytest.MonkeyPatch.context() as patch:
        for name, entry in shapes.items():
            patch.setitem(WEIGHTS, name, entry)
        plan = plan_weights({"decode": method(Moe(), True)})
        tensors = _tensors()
    expected = moe.prepack_experts(*(tensors[name] for name in shapes), GROUP)
    packed = dict(plan.pack(tensors))
    for name, tensor in zip(shapes, expected, strict=True):
        assert torch.equal(packed[name], tensor)


def test_a_missing_scale_is_named(graphs):
    tensors = _tensors()
    del tensors["head.scale"]
    with pytest.raises(ValueError, match=r"head.weight is prepacked together with head.scale"):
        list(plan_weights(graphs).pack(tensors))


def test_a_wrong_shape_is_named(graphs):
    tensors = _tensors()
    tensors["norm.weight"] = tensors["norm.weight"][:-1]
    with pytest.raises(ValueError, match=r"norm.weight: prepacked to .*\(127,\), expected"):
        list(plan_weights(graphs).pack(tensors))


def test_methods_must_agree(graphs):
    narrow = copy.deepcopy(graphs["decode"])
    node = narrow.input_nodes()["norm.weight"]
    node.meta["val"] = node.meta["val"][:64]
    with pytest.raises(ValueError, match=r"narrow: weight norm.weight is .*64.*, elsewhere .*128"):
        plan_weights({**graphs, "narrow": narrow})


def test_one_weight_in_two_orders(graphs, monkeypatch):
    other = dataclasses.replace(prepack._LINEAR, pack=lambda weight, scale, group: (weight, scale))
    decode = plan_weights({"decode": graphs["decode"]})
    monkeypatch.setitem(prepack._PACKERS, "linear_w4a8", other)
    assert plan_weights({"decode": graphs["decode"]}).spec != decode.spec

    class Both(Small):
        def forward(self, tokens, positions, slots, num_tokens, state, w):
            token, logits = super().forward(tokens, positions, slots, num_tokens, state, w)
            x = self.hidden(tokens, slots, num_tokens, state, w)
            et = torch.ops.et_moe
            return token, logits + et.linear_w4a16(x, w["head.weight"], w["head.scale"], GROUP)

    with pytest.raises(ValueError, match=r"two ops want weight head.* in different orders"):
        plan_weights({"decode": method(Both(), True)})


def test_inputs_are_named_in_order(graphs):
    assert list(graphs["decode"].input_nodes()) == [
        "tokens",
        "positions",
        "slots",
        *STATE,
        *WEIGHTS,
    ]

"""SafetensorsWriter against the safetensors library, and its failure modes."""

import errno
import resource
import signal
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from et_moe.pipeline.safetensors_stream import SafetensorsWriter


def example_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "f32": torch.randn(3, 5, generator=generator),
        "bf16": torch.randn(2, 3, 8, generator=generator).to(torch.bfloat16),
        "f16": torch.randn(7, generator=generator).to(torch.float16),
        "scalar": torch.randn((), generator=generator).to(torch.bfloat16),
        "empty": torch.empty(0, 4, dtype=torch.float16),
        "u8": torch.randint(0, 256, (4, 3), generator=generator, dtype=torch.uint8),
        "i8": torch.randint(-128, 128, (5,), generator=generator, dtype=torch.int8),
    }


def entries_of(tensors: dict[str, torch.Tensor]) -> dict:
    return {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}


def test_round_trip(tmp_path: Path) -> None:
    tensors = example_tensors()
    path = tmp_path / "model.safetensors"
    with SafetensorsWriter(path, entries_of(tensors), {"format": "pt"}) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
        assert not path.exists()

    loaded = load_file(path)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype and loaded[name].shape == tensor.shape
        assert torch.equal(loaded[name], tensor), name
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_no_entries_and_no_metadata(tmp_path: Path) -> None:
    path = tmp_path / "empty.safetensors"
    with SafetensorsWriter(path, {}):
        pass
    assert load_file(path) == {}


def test_chunks_and_non_contiguous_tensors(tmp_path: Path) -> None:
    whole = torch.arange(24, dtype=torch.float32).reshape(6, 4)
    path = tmp_path / "chunks.safetensors"
    entries = {"chunked": (torch.float32, (6, 4)), "transposed": (torch.float32, (4, 6))}
    with SafetensorsWriter(path, entries) as writer:
        writer.write_chunks("chunked", (whole[i : i + 2] for i in range(0, 6, 2)))
        writer.write("transposed", whole.T)
    loaded = load_file(path)
    assert torch.equal(loaded["chunked"], whole)
    assert torch.equal(loaded["transposed"], whole.T)


def test_an_existing_file_is_replaced_only_on_success(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"old")
    entries = {"a": (torch.int8, (2,))}
    with pytest.raises(RuntimeError, match="crash"), SafetensorsWriter(path, entries) as writer:
        writer.write("a", torch.zeros(2, dtype=torch.int8))
        raise RuntimeError("crash")
    assert path.read_bytes() == b"old"
    with SafetensorsWriter(path, entries) as writer:
        writer.write("a", torch.ones(2, dtype=torch.int8))
    assert load_file(path)["a"].tolist() == [1, 1]


TWO = {"a": (torch.float32, (2, 3)), "b": (torch.uint8, (4,))}
A, B = torch.zeros(2, 3), torch.zeros(4, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("writes", "message"),
    [
        ([("b", [B])], "tensor 'b': out of order, expected 'a'"),
        ([("c", [A])], "tensor 'c': out of order, expected 'a'"),
        ([("a", [A]), ("a", [A])], "tensor 'a': out of order, expected 'b'"),
        ([("a", [A]), ("b", [B]), ("b", [B])], "expected no further tensor"),
        ([("a", [A.half()])], r"tensor 'a': dtype torch.float16, expected torch.float32"),
        ([("a", [A.T])], r"tensor 'a': piece of shape \(3, 2\) does not fit \(2, 3\)"),
        ([("a", [A.flatten()])], r"tensor 'a': piece of shape \(6,\) does not fit \(2, 3\)"),
        ([("a", [A[:1]])], r"tensor 'a': got 3 elements, expected 6 of shape \(2, 3\)"),
        ([("a", [A, A])], r"tensor 'a': got 12 elements, expected 6 of shape \(2, 3\)"),
        ([("a", [A])], "tensor 'b': was never written"),
        ([], "tensor 'a': was never written"),
    ],
)
def test_wrong_writes_raise_and_leave_nothing(tmp_path: Path, writes: list, message: str) -> None:
    path = tmp_path / "model.safetensors"
    with pytest.raises(ValueError, match=message), SafetensorsWriter(path, TWO) as writer:
        for name, chunks in writes:
            writer.write_chunks(name, chunks)
    assert list(tmp_path.iterdir()) == []


def test_write_names_the_expected_shape(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match=r"tensor 'a': shape \(3, 2\), expected \(2, 3\)"),
        SafetensorsWriter(tmp_path / "x.safetensors", TWO) as writer,
    ):
        writer.write("a", A.T)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("entries", "metadata", "message"),
    [
        ({"x": (torch.float64, (1,))}, None, "tensor 'x': dtype torch.float64 is not one of"),
        ({"x": (torch.int8, (2, -1))}, None, r"tensor 'x': shape \(2, -1\) has a negative size"),
        ({"__metadata__": (torch.int8, (1,))}, None, "reserved"),
        (
            {"odd": (torch.uint8, (3,)), "x": (torch.bfloat16, (1,))},
            None,
            "tensor 'x': starts at byte 3, not a multiple of the 2 bytes",
        ),
        ({}, {"group_size": 32}, "metadata 'group_size': 32 is not text"),
    ],
)
def test_bad_headers_are_refused_before_a_file_exists(
    tmp_path: Path, entries: dict, metadata: dict | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        SafetensorsWriter(tmp_path / "x.safetensors", entries, metadata)
    assert list(tmp_path.iterdir()) == []


def test_writing_outside_the_block_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    writer = SafetensorsWriter(path, {"a": (torch.int8, (1,))})
    with pytest.raises(ValueError, match="is not open for writing"):
        writer.write("a", torch.zeros(1, dtype=torch.int8))
    with writer:
        writer.write("a", torch.zeros(1, dtype=torch.int8))
    with pytest.raises(ValueError, match="is not open for writing"):
        writer.write("a", torch.zeros(1, dtype=torch.int8))


def test_disk_full_leaves_nothing(tmp_path: Path) -> None:
    """RLIMIT_FSIZE stands in for the full disk: the kernel refuses the bytes beyond it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
        with pytest.raises(OSError) as caught:  # noqa: SIM117
            with SafetensorsWriter(
                tmp_path / "x.safetensors", {"a": (torch.float32, (1 << 16,))}
            ) as writer:
                writer.write("a", torch.zeros(1 << 16))
        assert caught.value.errno == errno.EFBIG
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == []

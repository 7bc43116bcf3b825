"""How tuning tables are read and looked up."""

import pytest
import torch
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from et_moe.backends.cuda.triton import tuning
from et_moe.backends.cuda.triton.cases.table import ONE_ORDER
from et_moe.backends.cuda.triton.tuning import find_config, parse_table, tuning_target


def table(**changes) -> dict:
    rows = [{"max_tokens": 16, "config": {"A": 1}}, {"max_tokens": None, "config": {"A": 2}}]
    return {"key": "tokens", "entries": {"default": rows}} | changes


@pytest.fixture
def read(monkeypatch):
    """Replaces every table by one that has entries for two GPUs."""
    found = table()
    found["entries"]["sm_90"] = [{"max_tokens": None, "config": {"A": 3}}]
    monkeypatch.setattr(tuning, "read_table", lambda name: parse_table(found))


@pytest.mark.parametrize(("tokens", "value"), [(1, 1), (16, 1), (17, 2), (10**9, 2)])
def test_bounds(read, tokens, value):
    with tuning_target():
        assert find_config("t", tokens=tokens) == {"A": value}


def test_a_symbolic_size_takes_the_last_entry(read):
    size = ShapeEnv().create_unbacked_symint()
    with tuning_target():
        assert isinstance(size, torch.SymInt) and find_config("t", tokens=size) == {"A": 2}


@pytest.mark.parametrize("names", [("NVIDIA H200", "sm_90"), ("sm_90",)])
def test_the_most_specific_name_counts(read, names):
    with tuning_target(*names):
        assert find_config("t", tokens=1) == {"A": 3}
    with tuning_target("sm_80"):
        assert find_config("t", tokens=1) == {"A": 1}


def test_callers_may_change_what_they_get(read):
    with tuning_target():
        find_config("t", tokens=1)["A"] = 9
        assert find_config("t", tokens=1) == {"A": 1}


@pytest.mark.parametrize("size", [{"capacity": 1}, {}, {"tokens": 1, "capacity": 1}])
def test_another_size_than_the_tables(read, size):
    with pytest.raises(ValueError, match=r"t is looked up by .*expected tokens"):
        find_config("t", **size)


def rows(*bounds, key="max_tokens"):
    return {"default": [{key: bound, "config": {}} for bound in bounds]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"entries": rows(16, None, key="max_m")}, r"default: an entry has the keys .*max_m"),
        ({"entries": rows(16)}, "expected ascending numbers, then null"),
        ({"entries": rows(16, 16, None)}, "expected ascending"),
        ({"entries": rows(None, 16, None)}, "expected ascending"),
        ({"entries": rows()}, "expected ascending"),
        ({"entries": {"sm_90": rows(None)["default"]}}, 'no entries for "default"'),
        ({"keys": "tokens"}, "has the keys"),
    ],
)
def test_tables_that_are_none(changes, message, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=message):
        parse_table(table(**changes))


def test_the_file_at_fault_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match=r"broken\.json: "):
        tuning.read_table("broken")


@pytest.mark.parametrize("name", sorted(ONE_ORDER))
def test_the_order_of_additions_does_not_depend_on_the_number_of_tokens(name):
    for gpu, entries in tuning.read_table(name).entries.items():
        orders = {tuple(entry.config[key] for key in ONE_ORDER[name]) for entry in entries}
        assert len(orders) == 1, gpu

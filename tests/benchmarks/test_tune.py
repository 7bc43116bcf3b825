"""The tuner's parts that need no GPU: which sizes it tunes for, and the tables that it writes."""

import pytest

from et_moe.backends.cuda.triton import tuning
from et_moe.benchmarks import tune

TABLES = sorted(path.stem for path in tuning.FOLDER.glob("*.json"))


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_written_as_they_are_read(name):
    text = (tuning.FOLDER / f"{name}.json").read_text()
    assert tune.format_table(tuning.read_table(name)) == text


def test_save_changes_one_gpu(tmp_path, monkeypatch):
    name, gpu = "linear_w4_gemv", "NVIDIA B200"
    before = tuning.read_table(name)
    (tmp_path / "table").write_text(tune.format_table(before))
    (tmp_path / f"{name}.json").symlink_to("table")  # the link must be followed
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    tuning.read_table.cache_clear()
    try:
        tune.save(name, gpu, tune.merge({64: {"SPAN": 1}, 512: {"SPAN": 1}, 4096: {"SPAN": 2}}))
        entries = [tuning.Entry(512, {"SPAN": 1}), tuning.Entry(None, {"SPAN": 2})]
        assert tuning.read_table(name) == tuning.Table(before.key, before.entries | {gpu: entries})
        assert (tmp_path / f"{name}.json").is_symlink() and len(list(tmp_path.iterdir())) == 2
    finally:
        tuning.read_table.cache_clear()


def test_a_table_is_tuned_for_the_sizes_that_it_is_looked_up_by():
    assert set(tune.uses("linear_w4_gemv", [1])) == {12352, 9216, 2048, 248320}
    assert set(tune.uses("attention_decode", [1])) == {4096}
    assert set(tune.uses("router_prefill", [1, 16, 17, 4095])) == {17, 4095}
    # Rows that have the bits of a call of their own are four at most.
    assert {m for _, m in tune.uses("linear_w4_rows", [1, 2, 4, 8])[4]} == {4}
    assert tune.uses("gated_delta_step", [1, 2, 4, 8, 4095])


def test_a_configuration_that_is_tried_is_the_only_one():
    with tune.configured("linear_w4_gemv", {"SPAN": 8}):
        assert tuning.find_config("linear_w4_gemv", out_features=1) == {"SPAN": 8}
        assert tuning.find_config("causal_conv1d", tokens=1) != {"SPAN": 8}
    assert tuning.find_config("linear_w4_gemv", out_features=1) != {"SPAN": 8}


def test_parameters_that_all_sizes_share_are_chosen_together():
    fast, even, slow, alone = ({"ORDER": i, "BLOCK": i} for i in range(4))
    other = {"ORDER": 1, "BLOCK": 7}
    times = {
        1: [(slow, 9.0), (fast, 1.0), (even, 2.0), (alone, 0.5)],
        8: [(slow, 9.0), (fast, 20.0), (even, 6.0), (other, 5.0)],
    }
    assert tune.choose(times, ()) == {1: alone, 8: other}
    # 20 is four times the best of its size, and `alone` was not run for all.
    assert tune.choose(times, ("ORDER",)) == {1: even, 8: other}
    with pytest.raises(RuntimeError, match="agree in"):
        tune.choose({1: [(fast, 1.0)], 8: [(even, 1.0)]}, ("ORDER",))

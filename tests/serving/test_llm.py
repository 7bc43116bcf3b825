"""Generating in Python: texts, batches, streams, conversations."""

import json
import shutil
import time
from pathlib import Path

import pytest

from et_moe.serving.llm import LLM, GenerationError, SamplingParams

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}{{ tools | length if tools }}"
    "{{ mood }}"
)


@pytest.fixture(scope="module")
def program(tiny_program: Path, tmp_path_factory) -> Path:
    """`tiny_program` with a chat template and a recommendation."""
    folder = tmp_path_factory.mktemp("llm") / "program"
    shutil.copytree(tiny_program, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.7, "top_k": 20}))
    return folder


@pytest.fixture(scope="module")
def llm(program: Path):
    with LLM(program, max_sequences=3, max_waiting=2) as llm:
        yield llm


@pytest.fixture
def writes_aabaab(llm) -> dict:
    """Parameters with which the model writes AABABABA..., whatever the prompt."""
    (a,), (b,) = llm.tokenizer.encode("A", True), llm.tokenizer.encode("B", True)
    bias = {a: 5000.0, b: 4900.0}
    return {"temperature": 0.0, "logit_bias": bias, "frequency_penalty": 70.0, "max_tokens": 6}


def test_one_prompt(llm, writes_aabaab) -> None:
    (request,) = llm.generate("Hello", SamplingParams(**writes_aabaab, logprobs=0))
    assert request.prompt == "Hello"
    assert request.prompt_token_ids == llm.tokenizer.encode("Hello", True)
    (output,) = request.outputs
    assert (output.text, output.finish_reason, output.index) == ("AABABA", "length", 0)
    assert len(output.token_ids) == len(output.logprobs) == 6


def test_more_prompts_than_the_engine_takes_at_once(llm) -> None:
    prompts = ["x" * i for i in range(1, 21)]
    params = SamplingParams(max_tokens=7, temperature=1.2, seed=3, ignore_eos=True)
    together = llm.generate(prompts, params)
    assert [request.prompt for request in together] == prompts
    alone = [llm.generate([prompt], params)[0] for prompt in prompts]
    assert together == alone and len({r.outputs[0].text for r in together}) > 10


def test_prompts_of_ids_and_parameters_of_each(llm) -> None:
    params = [SamplingParams(max_tokens=n, ignore_eos=True) for n in (1, 3)]
    one, three = llm.generate([[5, 6], [7]], params)
    assert one.prompt is None and one.prompt_token_ids == [5, 6]
    assert [len(r.outputs[0].token_ids) for r in (one, three)] == [1, 3]
    assert llm.generate([5, 6], params[0]) == [one]
    with pytest.raises(ValueError, match="2 for 3 prompts, expected one for each"):
        llm.generate([[1], [2], [3]], params)


def test_several_answers_differ_in_their_seeds(llm) -> None:
    params = {"max_tokens": 6, "temperature": 1.5, "ignore_eos": True}
    (request,) = llm.generate("x", SamplingParams(n=3, seed=4, **params))
    assert [output.index for output in request.outputs] == [0, 1, 2]
    for i, output in enumerate(request.outputs):
        (alone,) = llm.generate("x", SamplingParams(seed=4 + i, **params))
        assert alone.outputs[0].token_ids == output.token_ids


@pytest.mark.parametrize(
    ("stop", "text", "reason"),
    [
        ("BA", "AA", "BA"),
        (["ABB", "BAB"], "AA", "BAB"),
        (["ABAC"], "AABABA", None),
        (["C"], "AABABA", None),
        (["A"], "", "A"),
    ],
)
def test_stop_strings(llm, writes_aabaab, stop, text: str, reason: str | None) -> None:
    params = SamplingParams(stop=stop, **writes_aabaab)
    ((output,),) = [request.outputs for request in llm.generate("x", params)]
    assert (output.text, output.stop_reason) == (text, reason)
    assert output.finish_reason == ("stop" if reason else "length")
    streamed = list(llm.stream("x", params))
    assert "".join(new for new, _ in streamed) == text
    assert streamed[-1][1].stop_reason == reason


@pytest.mark.parametrize("seconds", [0.0, 0.1])
def test_ids_end_with_the_stop_string(llm, writes_aabaab, monkeypatch, seconds: float) -> None:
    """However many tokens have been drawn meanwhile, for a reader who is slow."""
    wait = llm._wait
    monkeypatch.setattr(llm, "_wait", lambda: [time.sleep(seconds), wait()][1])
    params = SamplingParams(stop="BA", logprobs=0, **{**writes_aabaab, "max_tokens": 25})
    for request in llm.generate(["x", "y"], params):
        (output,) = request.outputs
        text = b"".join(map(llm.tokenizer.id_to_bytes, output.token_ids))
        assert text == b"AABA" and len(output.logprobs) == 4


def test_a_stream_that_is_left_cancels_its_request(llm) -> None:
    stream = llm.stream("x", SamplingParams(max_tokens=25, ignore_eos=True))
    next(stream)
    stream.close()
    while llm.engine.status().running:
        pass
    assert llm.generate("y", SamplingParams(max_tokens=2, ignore_eos=True))


def test_conversations(llm) -> None:
    params = SamplingParams(max_tokens=2, ignore_eos=True)
    one = [{"role": "user", "content": "a"}]
    (request,) = llm.chat(one, params)
    assert request.prompt == "user:a;"
    requests = llm.chat([one, one * 2], params, tools=[{}], chat_template_kwargs={"mood": "!"})
    assert [r.prompt for r in requests] == ["user:a;1!", "user:a;user:a;1!"]


def test_defaults_are_those_of_the_program(llm, program) -> None:
    assert llm.get_default_sampling_params() == SamplingParams(temperature=0.7, top_k=20)
    expected = llm.generate("x", SamplingParams(temperature=0.7, top_k=20))
    assert llm.generate("x") == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "generation_config.json: "),
        ("[]", "an object"),
        ('{"top_k": "x"}', "top_k 'x'"),
        ('{"top_k": 1e999}', "top_k inf: expected a count"),
        ('{"top_k": 2.5}', "top_k 2.5: expected a count"),
        ('{"temperature": -1}', "temperature -1: expected 0 or at least 1e-5"),
        ('{"temperature": NaN}', "temperature nan: expected"),
        ('{"top_p": 0}', "top_p 0: expected more than 0"),
        ('{"min_p": 2}', "min_p 2: expected 0 to 1"),
        ('{"repetition_penalty": 0}', "repetition_penalty 0: expected"),
    ],
)
def test_a_bad_recommendation_is_named(tmp_path, content: str, message: str) -> None:
    from et_moe.serving.generation_config import read_sampling_defaults

    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_sampling_defaults(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"do_sample": false, "temperature": 2}')
    assert read_sampling_defaults(tmp_path) == {"temperature": 0.0}
    for given, top_k in ((-1, 0), (20.0, 20)):
        (tmp_path / "generation_config.json").write_text(json.dumps({"top_k": given}))
        assert repr(read_sampling_defaults(tmp_path)) == repr({"top_k": top_k})


def test_errors(llm, tiny_program, monkeypatch) -> None:
    with pytest.raises(ValueError, match="the prompt has 33 tokens"):
        llm.generate(["ok", [1] * 33])
    with pytest.raises(ValueError, match=r"the prompt has 32 tokens, .* needs one at least"):
        llm.generate([1] * 32)
    with pytest.raises(ValueError, match="the prompt is empty"):
        llm.generate("")
    with LLM(tiny_program) as plain:
        with pytest.raises(ValueError, match="no chat template"):
            plain.chat([{"role": "user", "content": "a"}])
        request = plain.engine.submit([1], SamplingParams(guided=True))
        plain.engine.allow(request, bytes(33))
        monkeypatch.setattr(plain.engine, "submit", lambda *_: request)
        with pytest.raises(GenerationError, match="allows no token"):
            plain.generate("x")


@pytest.mark.parametrize(
    ("prompts", "params", "kind", "fault"),
    [
        ({"prompt_token_ids": [1]}, None, TypeError, "prompts: expected .*, got dict"),
        ([{"prompt": "x"}], None, TypeError, "prompts: expected .*, got dict"),
        (b"x", None, TypeError, "prompts: expected .*, got bytes"),
        (None, None, TypeError, "prompts: expected .*, got NoneType"),
        ([None], None, TypeError, "prompts: expected .*, got NoneType"),
        ("\ud800", None, ValueError, "surrogates not allowed"),
        ("x", {"max_tokens": 2}, TypeError, "expected SamplingParams, got dict"),
        (["x", "y"], [SamplingParams()], ValueError, "1 for 2 prompts, expected one for each"),
    ],
)
def test_what_is_no_prompt(llm, prompts, params, kind, fault: str) -> None:
    with pytest.raises(kind, match=fault):
        llm.generate(prompts, params)


def test_parameters_as_vllm_has_them(llm) -> None:
    unset = SamplingParams(
        max_tokens=2, stop=None, stop_token_ids=None, logit_bias=None, seed=None, top_k=-1
    )
    assert (unset.stop, unset.stop_token_ids, unset.logit_bias, unset.top_k) == ((), (), {}, 0)
    assert len(llm.generate("x", unset)[0].outputs[0].token_ids) == 2
    for bad, fault in (({"n": 0}, "n 0"), ({"stop": ""}, "stop: "), ({"stop": ["a", ""]}, "stop")):
        with pytest.raises(ValueError, match=fault):
            SamplingParams(**bad)


def test_a_progress_bar(llm, monkeypatch, capsys) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    llm.generate(["a", "b"], SamplingParams(max_tokens=1))
    assert "generating" in capsys.readouterr().err
    llm.generate(["a", "b"], SamplingParams(max_tokens=1), use_tqdm=False)
    assert not capsys.readouterr().err

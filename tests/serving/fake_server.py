"""`serve` over a fake engine, as a process: `fake_server.py SECONDS_A_TOKEN DRAIN_SECONDS`.

The words of a prompt say what happens: "say N" gets N words, "weather" a tool call, "Python" some
Markdown after thinking, "fail" an error of the engine, and "break" breaks the device. The prompt
of "slowly" is tokenized once SIGUSR1 comes; that it waits is said on stderr.
"""

import re
import signal
import sys
import threading
from pathlib import Path

from fake_engine import FakeEngine

from et_moe.runner.python import Tokenizer
from et_moe.serving.engine import AsyncEngine
from et_moe.serving.run_server import serve
from et_moe.serving.served_model import ServedModel
from et_moe.serving.server import create_app

DEMO = Path(__file__).resolve().parents[2] / "examples/qwen3_5_moe/demo_checkpoint"

CALL = (
    "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n"
    "</function>\n</tool_call>"
)

MARKDOWN = """They want a short example.
</think>

## Lists

A *list* keeps its **order**; `sorted` makes a new one:

```python
names = ["Ann", "Bob"]
print(sorted(names, reverse=True))
```

1. It may hold anything,
   - even lists,
   - or `None`.
2. It <b>grows</b>, see [the tutorial](https://docs.python.org/3/tutorial/).

| method | does |
| --- | --- |
| `append` | adds one |
| `pop` | takes one away |

> [no](javascript:alert(1)) <img src=x onerror=alert(1)>
"""


class SlowTokenizer:
    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer, self._go_on = tokenizer, threading.Event()
        signal.signal(signal.SIGUSR1, lambda *_: self._go_on.set())

    def __getattr__(self, name: str):
        return getattr(self._tokenizer, name)

    def encode(self, text: str, parse_special: bool) -> list[int]:
        if "slowly" in text:
            print("it waits with a prompt", file=sys.stderr, flush=True)
            self._go_on.wait(60)
        return self._tokenizer.encode(text, parse_special)


def main() -> None:
    tokenizer = SlowTokenizer(Tokenizer(str(DEMO / "tokenizer.json")))

    def answers(prompt, params) -> list[int]:
        text = b"".join(map(tokenizer.id_to_bytes, prompt)).decode()
        if "break" in text:
            engine.break_device("it is on fire")
        if "fail" in text:
            engine.fail_next = "no luck"
        if "weather" in text:
            return [*tokenizer.encode("</think>\n\n" + CALL, True), 2045]
        if "Python" in text:
            return [*tokenizer.encode(MARKDOWN, True), 2045]
        count = int((re.findall(r"say (\d+)", text) or ["1"])[-1])
        return [*tokenizer.encode("</think>\n\n" + " word" * count, True), 2045]

    engine = FakeEngine(
        answers, max_sequences=2, max_waiting=2, seconds=float(sys.argv[1]), max_seq_len=20_000
    )

    async def open_model() -> ServedModel:
        return ServedModel.make("demo", AsyncEngine(engine), tokenizer, DEMO)

    serve(create_app(open_model), "127.0.0.1", 0, float(sys.argv[2]))


if __name__ == "__main__":
    main()

"""The page with the demo model: a served program, asked in headless Chromium."""

import re

import pytest
from page_driver import send, wait_for_end

# At temperature 0 the demo does not find an end to this, and stops where its context does.
LONG = f"Repeat: {' '.join(map(str, range(40)))}"
WIDE = "document.documentElement.scrollWidth > document.documentElement.clientWidth"
# The names of fields whose placeholder is wider than they are.
CLIPPED = """(fields) => fields.filter((field) => {
    const style = getComputedStyle(field);
    const canvas = document.createElement("canvas").getContext("2d");
    canvas.font = style.font;
    const room = field.clientWidth - parseFloat(style.paddingLeft) - parseFloat(style.paddingRight);
    return canvas.measureText(field.placeholder).width > room;
}).map((field) => field.name)"""
# Keeps each state of the first answer's text, and stops it once it has as many characters.
WATCH = """(stop) => {
    window.texts = [];
    const look = () => {
        const body = document.querySelector(".assistant .body");
        if (!body || body.textContent === texts.at(-1)) return;
        texts.push(body.textContent);
        if (body.textContent.length >= stop) document.getElementById("stop").click();
    };
    const options = { childList: true, subtree: true, characterData: true };
    new MutationObserver(look).observe(document.getElementById("messages"), options);
}"""


@pytest.fixture
def page(open_page, demo_server):
    """The page in a window on a desk, with a temperature of 0."""
    return cold(open_page(demo_server.url, 1000, 800))


def cold(page):
    page.click("#show-settings")
    page.fill("[name=temperature]", "0")
    page.click("#show-settings")
    return page


def ask(page, text: str, count: int = 1) -> dict:
    """Sends the question `count` and waits for its answer; gives the request's body."""
    with page.expect_request("**/v1/chat/completions") as asked:
        send(page, text)
    wait_for_end(page, count)
    return asked.value.post_data_json


def shown(page, count: int = 1):
    """The answer `count` on the page."""
    return page.locator(".assistant").nth(count - 1)


def answer(server, body: dict) -> dict:
    """What the API says to a request of the page, not streamed."""
    response = server.chat("", **{**body, "stream": False, "stream_options": None})
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]


def test_two_turns(page, demo_server) -> None:
    """The second needs the first; both are what the API answers, thoughts are folded."""
    page.locator("#model", has_text="demo").wait_for()
    bodies = [ask(page, "My name is Ada."), ask(page, "What is my name?", 2)]
    assert all(body["temperature"] == 0 for body in bodies)
    assert [turn["role"] for turn in bodies[1]["messages"]] == ["user", "assistant", "user"]
    for count, body in enumerate(bodies, 1):
        said = answer(demo_server, body)
        assert shown(page, count).locator(".body").inner_text() == said["content"]
        thoughts = shown(page, count).locator(".reasoning")
        assert thoughts.is_visible() == bool(said.get("reasoning_content"))
    assert said["content"] == "Your name is Ada."
    assert thoughts.locator("summary").inner_text() == "Thoughts"
    assert not thoughts.locator("div").is_visible()
    thoughts.locator("summary").click()
    assert thoughts.locator("div").inner_text() == said["reasoning_content"] != ""
    assert not page.faults


def test_a_long_answer_comes_in_pieces(page, demo_server) -> None:
    """And the page shows a speed near the one that the server counts. A busy machine may draw half
    a second's answer at once: then it is asked again."""
    between = "et_moe_time_between_tokens_seconds"
    page.evaluate(WATCH, 10**6)
    for _ in range(10):
        page.evaluate("texts = []")
        before = [demo_server.metric(f"{between}_{name}") for name in ("count", "sum")]
        body = ask(page, LONG)
        after = [demo_server.metric(f"{between}_{name}") for name in ("count", "sum")]
        texts, figures = page.evaluate("texts"), page.inner_text(".speed")
        if len(texts) > 3 and figures.endswith("tokens/s"):
            break
        page.click("#new")
    tokens, seconds = (new - old for new, old in zip(after, before, strict=True))
    said = answer(demo_server, body)["content"]
    assert len(texts) > 3 and all(said.startswith(text) for text in texts)
    assert shown(page).locator(".body").inner_text() == texts[-1] == said
    cut_off = r"cut off · (\d+) tokens · first after \d+ ms · ([\d.]+) tokens/s"
    count, speed = re.fullmatch(cut_off, figures).groups()
    assert int(count) == tokens + 1 > 1000
    assert 0.05 < float(speed) * seconds / tokens < 20  # the browser may be behind
    assert not page.faults


def ask_and_stop(page, server) -> dict:
    """The body of a request that was stopped. The demo answers in half a second, which on a busy
    machine ends before the browser gets to its beginning: then it is asked again."""
    page.evaluate(WATCH, 50)
    for _ in range(10):
        body = ask(page, LONG)
        server.wait_for("et_moe_requests_running", 0)
        if server.metric('et_moe_requests_total{finish_reason="cancelled"}'):
            return body
        page.click("#new")
    pytest.fail("no answer was stopped")


def test_stop_and_go_on(page, demo_server) -> None:
    body = ask_and_stop(page, demo_server)
    assert demo_server.metric('et_moe_requests_total{finish_reason="cancelled"}') == 1
    assert page.inner_text(".speed").startswith("stopped · ")
    kept = shown(page).locator(".body").inner_text()
    whole = answer(demo_server, body)["content"]
    assert 50 <= len(kept) < len(whole) and whole.startswith(kept)
    page.wait_for_selector("#send:visible")
    body = ask(page, "What does os.path.join do?", 2)
    assert [turn["content"].rstrip() for turn in body["messages"]][:2] == [LONG, kept]
    page.click("#new")
    assert ask(page, "What does os.path.join do?")["messages"] == body["messages"][2:]
    assert "Join two or more pathname components" in shown(page).inner_text()
    assert demo_server.metric("et_moe_requests_running") == 0
    assert not page.faults


@pytest.mark.parametrize(("width", "height"), [(390, 844), (320, 480), (844, 390)])
def test_on_a_phone(open_page, demo_server, width: int, height: int) -> None:
    """Nothing is wider than the window, and what sends stays in it, whatever is open or long."""
    page = open_page(demo_server.url, width, height)

    def assert_fits() -> None:
        assert not page.evaluate(WIDE)
        box = page.locator("#send").bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= width
        assert box["y"] >= 0 and box["y"] + box["height"] <= height

    assert_fits()
    cold(page)
    page.click("#show-settings")
    assert_fits()
    assert page.locator("#settings input").evaluate_all(CLIPPED) == []
    page.click("#show-settings")
    ask(page, f"Say {'x' * 300}")
    page.fill("#input", "What does\nos.path.join do?\n" * 20)
    assert_fits()
    page.fill("#input", "What does os.path.join do?")
    page.click("#send")
    wait_for_end(page, 2)
    assert shown(page, 2).locator(".body").inner_text()
    assert shown(page, 2).locator(".speed").bounding_box()["y"] < height
    assert_fits()
    assert not page.faults


def test_nothing_comes_from_elsewhere(page, demo_server) -> None:
    ask(page, "What does os.path.join do?")
    assert {url.removeprefix(demo_server.url) for url in page.asked} >= {"/", "/page/app.js"}
    assert all(url.startswith((f"{demo_server.url}/", "data:")) for url in page.asked)
    assert not page.faults

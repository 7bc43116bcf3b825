"""The page: its files and headers, and a real run of it in headless Chromium."""

import json
import re

import pytest
from page_driver import send, wait_for_end
from server_process import fake_server

from et_moe.serving.page import PAGE_PATHS


@pytest.mark.parametrize("path", sorted(PAGE_PATHS))
def test_files(ask, path: str) -> None:
    """Nothing is loaded from elsewhere, and nothing inline could run."""
    response = ask(path)
    assert response.status_code == 200
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    assert response.headers["x-content-type-options"] == "nosniff"
    kinds = {"": "text/html", "css": "text/css", "js": "text/javascript"}
    kind = kinds[path.rpartition(".")[2] if "." in path else ""]
    assert response.headers["content-type"].startswith(kind)
    for target in re.findall(r"""(?:src|href|from|url\()\s*=?\s*["']([^"']+)""", response.text):
        assert target in PAGE_PATHS or target == "data:,", target
    assert not re.search(r"<script>|<style|\son\w+=|style=|innerHTML|eval\(", response.text)


@pytest.fixture(scope="module")
def server():
    running = fake_server(0.005, 5)
    yield running
    running.stop()


@pytest.fixture
def page(open_page, server):
    """The page on a phone."""
    return open_page(server.url, 360, 640)


def test_two_turns(page, server) -> None:
    page.locator("#model", has_text="demo").wait_for()
    send(page, "say 400")  # for two seconds, of which a busy machine may take one to look
    page.wait_for_selector("#stop:visible")
    page.locator(".assistant .body", has_text="word word word").wait_for()
    wait_for_end(page)
    assert page.inner_text(".assistant .body") == " ".join(["word"] * 400)
    assert re.search(
        r"\d+ tokens · first after \d+ ms · [\d.]+ tokens/s", page.inner_text(".speed")
    )
    page.wait_for_selector("#send:visible")
    send(page, "say 2")
    wait_for_end(page, 2)
    assert page.locator(".assistant .body").nth(1).inner_text() == "word word"
    with page.expect_request("**/v1/chat/completions") as asked:
        send(page, "say 1")
    turns = asked.value.post_data_json["messages"]
    assert [turn["role"] for turn in turns] == ["user", "assistant"] * 2 + ["user"]
    wait_for_end(page, 3)
    assert not page.faults


def test_stop_and_new_chat(page, server) -> None:
    send(page, "say 5000")
    page.locator(".assistant .body", has_text="word word word").wait_for()
    page.click("#stop")
    wait_for_end(page)
    assert page.inner_text(".speed").startswith("stopped")
    server.wait_for("et_moe_requests_running", 0)
    send(page, "say 5000")
    page.locator(".assistant .body", has_text="word").nth(1).wait_for()
    page.click("#new")
    server.wait_for("et_moe_requests_running", 0)
    page.wait_for_selector("#send:visible")
    assert page.locator(".message").count() == 0
    with page.expect_request("**/v1/chat/completions") as asked:
        send(page, "say 1")
    assert [turn["role"] for turn in asked.value.post_data_json["messages"]] == ["user"]
    wait_for_end(page)
    assert not page.faults


def test_thinking_and_markdown(page) -> None:
    """Thinking is folded, Markdown becomes elements, and what looks like HTML stays text."""
    send(page, "Python")
    wait_for_end(page)
    assert page.get_attribute(".reasoning", "open") is None
    page.click(".reasoning summary")
    assert page.inner_text(".reasoning div") == "They want a short example."
    body = page.locator(".assistant .body")
    assert body.locator("h3").inner_text() == "Lists"
    assert body.locator("p em").inner_text() == "list"
    assert body.locator("p strong").inner_text() == "order"
    code = body.locator("pre[data-language=python] code").inner_text()
    assert code == 'names = ["Ann", "Bob"]\nprint(sorted(names, reverse=True))'
    assert body.locator("ol > li").count() == 2 and body.locator("ol > li > ul > li").count() == 2
    assert body.locator("td").all_inner_texts() == ["append", "adds one", "pop", "takes one away"]
    assert body.locator("a").count() == 1 and body.locator("img, b").count() == 0
    assert "<b>grows</b>" in body.inner_text() and "[no](javascript" in body.inner_text()
    wide = "document.documentElement.scrollWidth > document.documentElement.clientWidth"
    assert not page.evaluate(wide)
    assert not page.faults


def test_settings(page) -> None:
    """Settings go into the request and survive a reload; the key is kept for this tab only."""
    page.click("#show-settings")
    page.fill("[name=system]", "Be brief.")
    page.fill("[name=temperature]", "0.5")
    page.fill("[name=max_tokens]", "7")
    page.uncheck("[name=thinking]")
    page.fill("[name=key]", "secret")
    page.press("[name=key]", "Tab")
    page.reload()
    with page.expect_request("**/v1/chat/completions") as asked:
        send(page, "say 50")
    body = asked.value.post_data_json
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert (body["temperature"], body["max_tokens"]) == (0.5, 7) and "top_p" not in body
    assert body["chat_template_kwargs"] == {"enable_thinking": False}
    assert asked.value.headers["authorization"] == "Bearer secret"
    assert "secret" not in page.evaluate("JSON.stringify(localStorage)")
    wait_for_end(page)
    assert "cut off" in page.inner_text(".speed")
    assert not page.faults


def test_an_error_is_shown_and_the_question_kept(page) -> None:
    send(page, "fail")
    page.wait_for_selector(".fault")
    assert "no luck" in page.inner_text(".fault")
    assert page.input_value("#input") == "fail"
    send(page, "say 1")
    wait_for_end(page, 2)
    assert page.locator(".assistant .body").nth(1).inner_text() == "word"


MARKDOWN = {
    "": "",
    "a\nb\n\nc": "<p>a\nb</p><p>c</p>",
    "# A #\n#B": "<h2>A</h2><p>#B</p>",
    "a_b_c 2*3*4": "<p>a_b_c 2*3*4</p>",
    "**a *b* c**": "<p><strong>a <em>b</em> c</strong></p>",
    "`` a`b `` `<i>`": "<p><code>a`b</code> <code>&lt;i&gt;</code></p>",
    "```\n<x>\n```js": "<pre><code>&lt;x&gt;\n```js</code>",
    "~~~\na\n~~~\nb": "<pre><code>a</code>",
    "- a\n- b\n  more": "<ul><li>a</li><li>b\nmore</li></ul>",
    "- a\n\n- b\n\n  c\n\nd": "<ul><li>a</li><li>b<p>c</p></li></ul><p>d</p>",
    "1. a\n\n   - b\n2. c": '<ol start="1"><li>a<ul><li>b</li></ul></li><li>c</li></ol>',
    "1. a:\n   ```\n   x\n\n     - y\n   ```\n2. b": '<ol start="1"><li>a:'
    "<pre><code>x\n\n  - y</code>"
    '<button type="button">Copy</button></pre></li><li>b</li></ol>',
    "- a\n\n1. b": '<ul><li>a</li></ul><ol start="1"><li>b</li></ol>',
    "3. a\n4. b": '<ol start="3"><li>a</li><li>b</li></ol>',
    "> a\n> - b": "<blockquote><p>a</p><ul><li>b</li></ul></blockquote>",
    "---": "<hr>",
    "a | b\n--|--\n1 | 2": "<table><thead><tr><th>a</th><th>b</th></tr></thead>",
    "a | b\n--|--\n`1 \\| 2` | 3": "<table><thead><tr><th>a</th><th>b</th></tr></thead>"
    "<tbody><tr><td><code>1 | 2</code></td><td>3</td></tr></tbody></table>",
    r"\*a\* \(b\)": r"<p>*a* \(b\)</p>",
    "a  \nb": "<p>a<br>b</p>",
    "[a](data:x) [b](http://c/?d)": '<p>[a](data:x) <a href="http://c/?d"',
    "see http://a.b/c.": '<p>see <a href="http://a.b/c"',
    "**": "<p>**</p>",
    "<script>alert(1)</script>": "<p>&lt;script&gt;alert(1)&lt;/script&gt;</p>",
}


def test_markdown_whole_and_in_pieces(page) -> None:
    """A text that was rendered piece by piece looks as if it had come at once."""
    html = """async ([text, step]) => {
        const { render } = await import("/page/markdown.js");
        const target = document.createElement("div");
        for (let end = step; end < text.length + step; end += step)
            render(text.slice(0, end), target);
        return target.innerHTML;
    }"""
    for text, expected in MARKDOWN.items():
        whole = page.evaluate(html, [text, len(text) or 1])
        assert whole.startswith(expected), (text, whole)
        assert page.evaluate(html, [text, 1]) == whole
    assert not page.faults


def test_what_is_nested_too_deeply_is_text(page) -> None:
    for marks in ("> ", "- "):
        depth = """async (text) => {
            const { render } = await import("/page/markdown.js");
            const target = document.createElement("div");
            render(text, target);
            return [target.querySelectorAll("blockquote, ul").length, target.textContent];
        }"""
        count, text = page.evaluate(depth, marks * 20_000 + "a")
        assert count == 20 and text.endswith("- a" if marks == "- " else "> a")
    assert not page.faults


def events(*chunks: dict, done: bool = True) -> str:
    lines = [json.dumps(chunk) for chunk in chunks] + ["[DONE]"] * done
    return "".join(f"data: {line}\n\n" for line in lines)


def delta(**fields) -> dict:
    return {"choices": [{"index": 0, "delta": fields, "finish_reason": None}]}


def answered_with(page, body: str) -> None:
    """Sends a question that gets this body, all at once."""
    kind = "text/event-stream"
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body=body, content_type=kind))
    send(page, "Hi")
    wait_for_end(page)


def test_no_speed_is_made_of_what_came_at_once(page) -> None:
    words = [delta(content="word ") for _ in range(500)]
    usage = {"choices": [], "usage": {"completion_tokens": 510}}
    answered_with(page, events(delta(role="assistant"), *words, usage))
    figures = r"510 tokens · first after \d+ ms · last after \d+ ms"
    assert re.fullmatch(figures, page.inner_text(".speed"))
    assert not page.faults


def test_an_answer_that_breaks_off(page) -> None:
    answered_with(page, events(delta(content="word"), done=False))
    assert page.inner_text(".fault") == "the answer broke off"
    assert page.inner_text(".assistant .body") == "word"
    assert page.inner_text(".speed").startswith("at least 1 token ")
    assert not page.faults


def test_a_server_that_cannot_be_reached(page) -> None:
    """It is said in the same words by every browser, for the model and for an answer."""
    page.route("**/v1/**", lambda route: route.abort())
    page.click("#show-settings")
    page.fill("[name=seed]", "1")
    page.press("[name=seed]", "Tab")
    page.locator("#model", has_text="the server cannot be reached").wait_for()
    send(page, "say 1")
    assert page.inner_text(".fault") == "the server cannot be reached"
    assert page.input_value("#input") == "say 1"
    assert all("ERR_FAILED" in fault for fault in page.faults)


@pytest.mark.parametrize("clipboard", ["delete Navigator.prototype.clipboard", ""])
def test_copy(open_page, server, clipboard: str) -> None:
    """Also where there is no `navigator.clipboard`, as over plain HTTP from another machine."""
    page = open_page(server.url, 360, 640)
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.evaluate(clipboard)
    send(page, "Python")
    wait_for_end(page)
    page.click("pre button")
    page.locator("pre button", has_text="Copied").wait_for()
    page.focus("#input")
    page.keyboard.press("ControlOrMeta+V")
    assert page.input_value("#input") == page.locator("pre code").text_content()
    assert not page.faults

"""The chat page in a headless Chromium, against a server that follows a test's script."""

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.page_server import Failure, Script, answer, chunk, event, serving

pytestmark = pytest.mark.slow

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
DRIVER = shutil.which("chromedriver")
PERMISSIONS = ["clipboardReadWrite", "clipboardSanitizedWrite"]
FROM_END = (
    "const log = document.querySelector('#log');"
    "return log.scrollHeight - log.scrollTop - log.clientHeight"
)
VENDOR = Path(__file__).parent / "vendor"
TIMINGS = {"prompt_n": 30, "cache_n": 12, "predicted_n": 8, "predicted_per_second": 6.25}


class Page:
    """What a user sees and does."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def all(self, css: str) -> list[Any]:
        return self.driver.find_elements("css selector", css)

    def one(self, css: str) -> Any:
        return self.driver.find_element("css selector", css)

    def text(self, css: str) -> str:
        return self.one(css).text

    def run(self, script: str, *arguments: object) -> Any:
        return self.driver.execute_script(script, *arguments)

    def keys(self, *keys: str) -> None:
        self.driver.switch_to.active_element.send_keys(*keys)

    def click(self, name: str) -> None:
        """Presses the last button of this name that is seen."""
        [*_, button] = [
            each for each in self.all("button")
            if each.accessible_name == name and each.is_displayed()
        ]  # fmt: skip
        button.click()

    def ask(self, text: str) -> None:
        """Asks, and waits for the end of the answer."""
        self.one("#input").send_keys(text, "\n")
        self.settle()

    def settle(self) -> None:
        until(lambda: self.all("article.assistant") and not self.all("article.working"))

    def width(self, pixels: int, height: int = 640) -> None:
        self.cdp(
            "Emulation.setDeviceMetricsOverride",
            width=pixels, height=height, deviceScaleFactor=1, mobile=False,
        )  # fmt: skip

    def media(self, **features: str) -> None:
        found = [
            {"name": name.replace("_", "-"), "value": value} for name, value in features.items()
        ]
        self.cdp("Emulation.setEmulatedMedia", features=found)

    def cdp(self, command: str, **arguments: object) -> None:
        self.driver.execute_cdp_cmd(command, arguments)

    def violations(self) -> list[tuple[str, str, str]]:
        """What axe-core finds serious or critical."""
        self.run((VENDOR / "axe.min.js").read_text())
        found = self.driver.execute_async_script("axe.run().then(arguments[0])")
        return [
            (each["impact"], each["id"], node["html"])
            for each in found["violations"] if each["impact"] in ("serious", "critical")
            for node in each["nodes"]
        ]  # fmt: skip


def until(condition: Callable[[], object], seconds: float = 8.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


@pytest.fixture(autouse=True)
def _nothing_stays_behind() -> None:
    """Not here: Chromium starts processes when it likes. They end with `driver`."""


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="no selenium: extra `browser`")
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("no Chromium with its driver on this machine")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in (
        "--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=900,700",
        f"--user-data-dir={tmp_path_factory.mktemp('profile')}",
    ):  # fmt: skip
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(executable_path=DRIVER)
    driver = webdriver.Chrome(options=options, service=service)
    driver.set_script_timeout(30)
    started = psutil.Process(service.process.pid).children(recursive=True)
    yield driver
    driver.quit()
    assert not psutil.wait_procs(started, timeout=5)[1]


@pytest.fixture
def script() -> Script:
    return Script(completions=[answer("Hello.")])


@pytest.fixture
def chat(driver: Any, script: Script) -> Iterator[Page]:
    with serving(script) as address:
        driver.get_log("browser")
        driver.get(address)
        chat = Page(driver)
        yield chat
        chat.cdp("Emulation.clearDeviceMetricsOverride")
        chat.cdp("Emulation.setEmulatedMedia", features=[])
        logged = [line["message"] for line in driver.get_log("browser")]
        assert not [line for line in logged if "Security Policy" in line or "Uncaught" in line]
        driver.get("about:blank")


def test_a_question_is_sent_as_the_api_asks(chat: Page, script: Script) -> None:
    until(lambda: chat.text("#model") == "tiny-glm")
    chat.ask("Hi there")
    assert chat.text("article.assistant .markdown") == "Hello."
    assert script.requests == [
        {
            "model": "tiny-glm",
            "messages": [{"role": "user", "content": "Hi there"}],
            "stream": True,
            "stream_options": {"include_usage": True},
            "timings_per_token": True,
            "return_progress": True,
            "chat_template_kwargs": {"enable_thinking": True},
        }
    ]
    assert script.keys == [None]


def test_settings_go_into_the_request(chat: Page, script: Script) -> None:
    chat.one("#settings summary").click()
    chat.one("#system").send_keys("Be brief.")
    chat.one("#temperature").send_keys("0")
    chat.one("#max-tokens").send_keys("64")
    chat.one("#thinking").click()
    chat.ask("Hi")
    [request] = script.requests
    assert request["messages"][0] == {"role": "system", "content": "Be brief."}
    assert (request["temperature"], request["max_tokens"]) == (0, 64)
    assert request["chat_template_kwargs"] == {"enable_thinking": False}


def test_the_second_question_carries_the_first_answer(chat: Page, script: Script) -> None:
    script.completions = [answer("One.", reasoning="hm"), answer("Two.")]
    chat.ask("first")
    chat.ask("second")
    assert script.requests[1]["messages"] == [
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": "One.", "reasoning_content": "hm"},
        {"role": "user", "content": "second"},
    ]


def test_cuts_anywhere_and_comments_give_the_same_text(chat: Page, script: Script) -> None:
    text = "Füße 漢字 🙂 \u2028 data: end"
    whole = b": ping\n\n".join(answer(*text)).replace(b"\n\n", b"\r\n\r\n", 3)
    # Within each character of several bytes, and within each empty line.
    cuts = [i for i, byte in enumerate(whole) if 0x80 <= byte < 0xC0 or whole[i - 1] == 0x0D]
    ends = [0, *cuts, len(whole)]
    script.completions = [[whole[i:j] for i, j in pairwise(ends)]]
    script.pause = 0.02
    chat.ask("Hi")
    assert chat.run("return document.querySelector('.markdown').textContent") == text


def test_text_grows_while_the_stream_runs_and_is_drawn_seldom(chat: Page, script: Script) -> None:
    script.completions = [answer(*(f"w{i} " for i in range(150)), timings=TIMINGS)]
    script.pause = 0.01
    chat.run(
        "window.seen = []; new MutationObserver(() => {"
        " const body = document.querySelector('.markdown');"
        " const length = body ? body.textContent.length : 0;"
        " if (length > (seen.at(-1) ?? 0)) seen.push(length)"
        "}).observe(document.querySelector('#log'),"
        " {childList: true, subtree: true, characterData: true})"
    )
    start = time.monotonic()
    chat.ask("Hi")
    seconds = time.monotonic() - start
    seen = chat.run("return seen")
    assert len(seen) > 5
    assert len(seen) <= 20 * seconds + 2


def test_speed_and_context_are_shown_while_it_streams(chat: Page, script: Script) -> None:
    script.completions = [[chunk({"content": f"{i} "}, timings=TIMINGS) for i in range(200)]]
    script.pause = 0.02
    chat.one("#input").send_keys("Hi\n")
    until(lambda: "6.3 tokens/s" in chat.text("article.assistant .figures"))
    assert chat.all("article.working")
    assert chat.text("#context") == "Context: 50 of 4,096 tokens"
    assert chat.one("#log").get_attribute("aria-busy") == "true"
    chat.keys("\ue00c")
    chat.settle()
    assert chat.one("#log").get_attribute("aria-busy") == "false"


@pytest.mark.parametrize("how", ["button", "Esc", "new chat"])
def test_stop_closes_the_connection(chat: Page, script: Script, how: str) -> None:
    script.completions = [[chunk({"content": f"{i} "}) for i in range(500)]]
    script.pause = 0.02
    chat.one("#input").send_keys("Hi\n")
    until(lambda: "3" in chat.text("article.assistant .markdown"))
    assert not script.dropped.is_set()
    if how == "button":
        chat.click("Stop")
    elif how == "Esc":
        chat.keys("\ue00c")
    else:
        chat.click("New chat")
        chat.driver.switch_to.alert.accept()
    assert script.dropped.wait(2)
    if how == "new chat":
        until(lambda: chat.one("#send").is_displayed())
        assert not chat.all("article")
    else:
        chat.settle()
        assert chat.text("article > .note") == "Stopped."
        assert "0 1 2" in chat.text("article.assistant .markdown")
    chat.keys("next")
    assert chat.one("#input").get_property("value") == "next"


def test_enter_sends_and_shift_enter_breaks_the_line(chat: Page, script: Script) -> None:
    assert chat.driver.switch_to.active_element == chat.one("#input")
    chat.keys("one", "\ue008", "\n", "\ue000", "two")
    assert not script.requests
    chat.keys("\n")
    chat.settle()
    assert script.requests[0]["messages"] == [{"role": "user", "content": "one\ntwo"}]


def test_enter_that_ends_an_input_method_does_not_send(chat: Page, script: Script) -> None:
    chat.one("#input").send_keys("日本")
    chat.run(
        "document.querySelector('#input').dispatchEvent(new KeyboardEvent('keydown',"
        " {key: 'Enter', isComposing: true, bubbles: true, cancelable: true}))"
    )
    time.sleep(0.1)
    assert not script.requests


def test_reasoning_is_folded(chat: Page, script: Script) -> None:
    script.completions = [answer("Four.", reasoning="Two and two\nmake four.")]
    chat.ask("2+2?")
    folded = chat.one("details.reasoning")
    assert folded.get_attribute("open") is None
    assert re.fullmatch(r"Thought for \d+\.\d s", folded.text)
    assert "make four" not in folded.text
    folded.find_element("css selector", "summary").click()
    assert "Two and two\nmake four." in folded.text
    assert chat.text("article.assistant .markdown") == "Four."


def test_a_tool_call_is_a_block(chat: Page, script: Script) -> None:
    first = {"index": 0, "id": "call_1", "type": "function"}
    pieces = [
        {**first, "function": {"name": "weather", "arguments": ""}},
        {"index": 0, "function": {"arguments": '{"city": "'}},
        {"index": 0, "function": {"arguments": '<b>Linz</b>"}'}},
    ]
    script.completions = [
        [*(chunk({"tool_calls": [piece]}) for piece in pieces), chunk(finish="tool_calls")]
    ]
    chat.ask("Hi")
    assert "Tool call: weather" in chat.text(".tools figcaption")
    assert json.loads(chat.text(".tools code")) == {"city": "<b>Linz</b>"}


def test_progress_of_a_prompt(chat: Page, script: Script) -> None:
    progress = {"total": 1000, "cache": 200, "processed": 600, "time_ms": 4000}
    script.completions = [
        [b": ping\n\n", chunk(prompt_progress=progress), *([b": ping\n\n"] * 200)]
    ]
    script.pause = 0.05
    chat.one("#input").send_keys("Hi\n")
    until(lambda: "Reading" in chat.text(".prompt"))
    assert chat.text(".prompt p") == (
        "Reading the prompt: 600 of 1,000 tokens, 200 cached, about 4.0 s left"
    )
    assert chat.one("progress").get_property("value") == pytest.approx(0.6)
    chat.click("Stop")


@pytest.mark.parametrize(
    ("completion", "line"),
    [
        (Failure(400, {"error": {"message": "temperature: too hot"}}), "temperature: too hot"),
        (Failure(502, {}), "The server answered 502 Bad Gateway"),
        ([chunk({"content": "part"})], "The connection ended before the answer did"),
        ([chunk({"content": "part"}), event({"error": {"message": "node 2 lost"}})], "node 2 lost"),
        ([b"data: {oops\n\n"], "The server sent an event that is not JSON"),
    ],
)
def test_an_error_is_a_line_and_regenerate_tries_again(
    chat: Page, script: Script, completion: list[bytes] | Failure, line: str
) -> None:
    script.completions = [completion, answer("Now.")]
    chat.ask("Hi")
    assert chat.text("article .error") == line
    if not isinstance(completion, Failure) and len(completion) + completion[0].count(b"part") > 1:
        assert chat.text("article.assistant .markdown") == "part"
    chat.click("Regenerate answer")
    until(lambda: "Now." in chat.text("article.assistant .markdown"))
    assert len(chat.all("article")) == 2
    assert script.requests[1]["messages"] == [{"role": "user", "content": "Hi"}]


def test_a_model_that_is_loading_is_waited_for(chat: Page, script: Script) -> None:
    loading = {"error": {"message": "The model is loading", "code": "loading"}}
    script.completions = [Failure(503, loading, {"Retry-After": "1"}), answer("Ready.")]
    chat.one("#input").send_keys("Hi\n")
    until(lambda: "The model is loading; next try in 1 s" in chat.text(".prompt"))
    chat.settle()
    assert chat.text("article.assistant .markdown") == "Ready."
    assert len(script.requests) == 2


def test_a_lost_node_is_not_waited_for(chat: Page, script: Script) -> None:
    lost = {"error": {"message": "node 1 was lost", "code": "node_lost"}}
    script.completions = [Failure(503, lost, {"Retry-After": "1"})]
    chat.ask("Hi")
    assert chat.text("article .error") == "node 1 was lost"
    assert len(script.requests) == 1


class TestKey:
    @pytest.fixture
    def script(self) -> Script:
        return Script(completions=[answer("Hello.")], key="secret")

    def test_it_is_asked_for_once_and_kept_in_memory(self, chat: Page, script: Script) -> None:
        until(lambda: chat.one("#key-dialog").is_displayed())
        assert chat.driver.switch_to.active_element == chat.one("#key")
        chat.keys("secret\n")
        until(lambda: chat.text("#model") == "tiny-glm")
        chat.ask("one")
        chat.ask("two")
        assert script.keys == ["Bearer secret"] * 2
        assert not any("secret" in path for path in script.paths)
        assert (
            chat.run("return localStorage.length + sessionStorage.length + document.cookie.length")
            == 0
        )
        assert "secret" not in chat.run("return document.documentElement.outerHTML")

    def test_a_wrong_one_is_an_error_and_asked_for_again(self, chat: Page, script: Script) -> None:
        until(lambda: chat.one("#key-dialog").is_displayed())
        chat.click("Cancel")
        until(lambda: chat.text("#notice") == "The key is missing or wrong")
        chat.one("#input").send_keys("Hi\n")
        until(lambda: chat.one("#key-dialog").is_displayed())
        chat.keys("guess\n")
        chat.settle()
        assert chat.text("article .error") == "The key is missing or wrong"
        chat.click("Regenerate answer")
        until(lambda: chat.one("#key-dialog").is_displayed())
        chat.keys("secret\n")
        until(lambda: "Hello." in chat.text("article.assistant .markdown"))
        until(lambda: chat.text("#model") == "tiny-glm")


HOSTILE = """<script>window.broken = 1</script> <img src=x onerror="window.broken = 2">

[x](javascript:window.broken=3) [y](JaVaScRiPt&colon;x) [z](data:text/html,x) [w]( \tjavascript:1)

![picture](https://example.com/leak?text=secret) ![p](javascript:1)

[good](https://example.com/a) https://example.com/b. Mail [me](mailto:a@example.com)

<iframe src="https://example.com"></iframe> <svg onload=alert(1)> <br>

```"><img src=x onerror=window.broken=4>
<script>window.broken = 5</script>
```
"""


def test_x7_markup_of_the_model_is_inert(chat: Page, script: Script) -> None:
    script.completions = [answer(*HOSTILE, reasoning=HOSTILE)]
    chat.ask(HOSTILE.replace("\n", " "))
    assert chat.run("return window.broken ?? null") is None
    assert not chat.all("#log :is(script, img, iframe, svg, style, input, object)")
    text = chat.run("return document.querySelector('.markdown').textContent")
    assert '<script>window.broken = 1</script> <img src=x onerror="window.broken = 2">' in text
    assert "[x](javascript:window.broken=3)" in text
    assert "![p](javascript:1)" in text
    links = chat.run("return [...document.querySelectorAll('#log a')].map((a) => a.href)")
    assert links == [
        "https://example.com/leak?text=secret",
        "https://example.com/a",
        "https://example.com/b",
        "mailto:a@example.com",
    ]
    loaded = chat.run("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert not [name for name in loaded if "example.com" in name]


def test_x7_any_markdown_in_any_pieces_gives_safe_elements(chat: Page) -> None:
    """Random documents: only known elements and attributes, and the same tree however it is cut."""
    found = chat.driver.execute_async_script(
        """
        const done = arguments[0];
        const parts = ['# ', '* ', '1. ', '> ', '> > ', '```', '`', '\\n', '\\n\\n', '**', '*', '_',
          '~~', '| a | b |\\n|---|---|\\n', '|', '[', '](', ')', 'https://a.example/',
          'javascript:x', '![', '<script>', '<br>', '$', '$$', '\\\\(', '\\\\)', '\\\\[', '\\\\]',
          '- [x] ', '    ', 'word ', 'a_b', '7', ' ', '---\\n', '\\\\', '漢🙂'];
        const known = new Set(('p blockquote br hr h3 h4 h5 h6 em strong s code ul ol li span a'
          + ' figure figcaption button pre div table thead tbody tr th td').split(' '));
        const names = new Set(['href', 'target', 'rel', 'class', 'tabindex', 'role', 'aria-label',
          'type', 'start']);
        let state = 7;
        const random = (n) => (state = (state * 48271) % 2147483647) % n;
        import('/page/markdown.js').then(({ MarkdownStream }) => {
          const draw = (pieces) => {
            const root = document.createElement('div');
            const stream = new MarkdownStream(root);
            for (const piece of pieces) stream.write(piece);
            stream.end();
            root.normalize();
            return root;
          };
          const bad = [];
          for (let i = 0; i < 1500; i += 1) {
            const length = 1 + random(40);
            const pieces = Array.from({ length }, () => parts[random(parts.length)]);
            const root = draw(pieces);
            for (const node of root.querySelectorAll('*')) {
              if (!known.has(node.localName)) bad.push(node.localName);
              for (const { name } of node.attributes) if (!names.has(name)) bad.push(name);
              if (node.href && !/^(https?|mailto):/.test(node.href)) bad.push(node.href);
            }
            if (root.querySelector('.plain')) bad.push(['plain', pieces.join('')]);
            if (!draw([...pieces.join('')]).isEqualNode(root)) bad.push(pieces.join(''));
          }
          done(bad);
        });
        """
    )
    assert found == []


@pytest.mark.parametrize(
    ("source", "html"),
    [
        ("# A\n## B\ntext", "<h3>A</h3><h4>B</h4><p>text</p>"),
        ("a *b* **c** `d` ~~e~~", "<p>a <em>b</em> <strong>c</strong> <code>d</code> <s>e</s></p>"),
        ("- a\n- b\n", "<ul><li>a</li><li>b</li></ul>"),
        ("3. a\n4. b", '<ol start="3"><li>a</li><li>b</li></ol>'),
        ("> quoted", "<blockquote><p>quoted</p></blockquote>"),
        ("take a[i] and [1]", "<p>take a[i] and [1]</p>"),
        ("set $PATH now\n\n**b**", "<p>set $PATH now</p><p><strong>b</strong></p>"),
        ("$HOME and $PATH *x*", "<p>$HOME and $PATH <em>x</em></p>"),
        ("costs $5 or $6", "<p>costs $5 or $6</p>"),
        ("so $a_1 + b_2$ is", '<p>so <code class="math">a_1 + b_2</code> is</p>'),
        ("$$x_1$$\n\nend", '<p><code class="math">x_1</code></p><p>end</p>'),
        ("`$a` and `$b`", "<p><code>$a</code> and <code>$b</code></p>"),
        ("- [x] a", '<ul><li><span role="img" aria-label="done">☑</span> a</li></ul>'),
    ],
)
def test_markdown(chat: Page, source: str, html: str) -> None:
    found = chat.driver.execute_async_script(
        """
        const [source, done] = arguments;
        import('/page/markdown.js').then(({ MarkdownStream }) => {
          const root = document.createElement('div');
          const stream = new MarkdownStream(root);
          for (const char of source) stream.write(char);
          stream.end();
          done(root.innerHTML);
        });
        """,
        source,
    )
    assert found == html


def test_code_is_copied(chat: Page, script: Script) -> None:
    code = 'print("$x")\nif a:\n    b()'
    script.completions = [answer(f"Try:\n```python\n{code}\n```\nDone.")]
    chat.ask("Hi")
    assert chat.text("figcaption span") == "python"
    origin = chat.driver.current_url.rstrip("/")
    chat.cdp("Browser.grantPermissions", origin=origin, permissions=PERMISSIONS)
    read = "navigator.clipboard.readText().then(arguments[0])"
    chat.click("Copy code")
    until(lambda: chat.driver.execute_async_script(read) == code)
    chat.click("Copy answer")
    until(lambda: chat.driver.execute_async_script(read).startswith("Try:\n```python"))
    # By http from another machine there is no clipboard object.
    chat.run(
        "Object.defineProperty(navigator, 'clipboard', {value: undefined, configurable: true})"
    )
    chat.click("Copy message")
    until(lambda: chat.one("article.user").text.endswith("Copied"))
    chat.run("delete navigator.clipboard")
    until(lambda: chat.driver.execute_async_script(read) == "Hi")


def test_an_edited_message_replaces_what_follows(chat: Page, script: Script) -> None:
    script.completions = [answer("One."), answer("Two."), answer("Three.")]
    chat.ask("first")
    chat.ask("second")
    [edit, _] = [each for each in chat.all("button") if each.accessible_name == "Edit message"]
    edit.click()
    chat.keys("\ue00c")
    assert chat.all("article.user .body")[0].text == "first"
    edit.click()
    chat.keys(" of all\n")
    until(lambda: len(script.requests) == 3)
    chat.settle()
    assert script.requests[2]["messages"] == [{"role": "user", "content": "first of all"}]
    assert [each.text for each in chat.all("article.user .body, .markdown")] == [
        "first of all",
        "Three.",
    ]
    assert chat.driver.switch_to.active_element == chat.one("#input")


def test_export(chat: Page, script: Script, tmp_path: Path) -> None:
    script.completions = [answer("Hello.", timings=TIMINGS)]
    chat.ask("Hi")
    chat.cdp("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    chat.click("Export")
    until(lambda: list(tmp_path.glob("*.json")))
    [path] = tmp_path.glob("*.json")
    saved = json.loads(path.read_text())
    assert saved["model"] == "tiny-glm"
    assert saved["messages"][0] == {"role": "user", "content": "Hi"}
    assert saved["messages"][1]["content"] == "Hello."
    assert saved["messages"][1]["timings"] == TIMINGS


def test_the_finished_answer_is_announced_once(chat: Page, script: Script) -> None:
    chat.run(
        "window.said = []; new MutationObserver(() => said.push("
        "document.querySelector('#announcer').textContent))"
        ".observe(document.querySelector('#announcer'), {childList: true})"
    )
    script.completions = [answer(*(f"word{i} " for i in range(30)))]
    script.pause = 0.02
    chat.ask("Hi")
    said = chat.run("return said")
    assert len(said) == 1
    assert said[0].startswith("word0 word1")
    assert chat.one("article.assistant").get_attribute("aria-live") == "off"


def test_a_reader_who_scrolled_up_stays_there(chat: Page, script: Script) -> None:
    script.completions = [answer(*(f"line {i}\n\n" for i in range(80)))]
    chat.ask("Hi")
    assert chat.run(FROM_END) < 2
    script.completions = [answer(*(f"line {i}\n\n" for i in range(80)))]
    script.pause = 0.02
    chat.one("#input").send_keys("Hi\n")
    until(lambda: "line 9" in chat.all(".markdown")[-1].text)
    chat.run("document.querySelector('#log').scrollTop = 100")
    chat.settle()
    assert chat.run("return document.querySelector('#log').scrollTop") == 100


class TestNodes:
    @pytest.fixture
    def script(self) -> Script:
        calls = iter(range(10**9))

        def nodes() -> dict[str, Any]:
            second = next(calls)
            lost = second >= 4
            spent = [(0.9, 0.1), (0.6, 0.4), (0.5, 0.5)]
            return {
                "nodes": [
                    {
                        "node": index,
                        "address": "the root" if index == 0 else f"10.0.0.{index}:9999",
                        "compute_seconds": 100 + compute * second,
                        "sync_seconds": 50 + sync * second,
                        "bytes": 500_000 * second,
                        "peak_bytes": 1_900_000_000,
                        "lost": lost and index == 2,
                    }
                    for index, (compute, sync) in enumerate(spent)
                ],
                "error": "node 2 (10.0.0.2:9999) was lost: restart its worker" if lost else None,
            }

        return Script(completions=[answer("Hello.")], nodes=nodes)

    def test_bars_show_the_last_seconds_and_a_lost_node(self, chat: Page, script: Script) -> None:
        script.completions = [answer(*(f"line {i}\n\n" for i in range(80)))]
        chat.ask("Hi")
        until(lambda: "compute 90 %, sync 10 %" in chat.text("#nodes"))
        rows = [each.text for each in chat.all("#nodes li")]
        assert "slowest" in rows[0]
        assert "slowest" not in rows[1]
        assert "10.0.0.1:9999" in rows[1]
        assert "compute 60 %, sync 40 % · memory 1.9 GB" in rows[1]
        widths = chat.run(
            "return [...document.querySelectorAll('#nodes li')[1].querySelectorAll('.bar span')]"
            ".map((span) => span.getBoundingClientRect().width)"
        )
        assert widths[0] / sum(widths) == pytest.approx(0.6, abs=0.02)
        until(lambda: chat.all("#nodes li.lost"))
        assert "lost" in chat.text("#nodes li.lost")
        assert chat.text("#nodes .error") == "node 2 (10.0.0.2:9999) was lost: restart its worker"
        assert chat.text("#nodes summary") == "3 nodes, 1 lost"
        assert script.paths.count("/nodes") <= 8
        until(lambda: chat.run(FROM_END) < 2)


RICH = """## Plan

A paragraph with **strong**, *emphasis*, `code` and [a link](https://example.com).

| name | a_column_of_one_word_that_is_wider_than_the_window |
|---|---|
| alpha | 1 |

```python
def long_line(): return "this line is so long that it does not fit into a narrow window at all"
```

- one
- two
  - nested

> A quote.

averyveryverylongwordwithoutanyspacethatdoesnotfitintoanarrowwindowatallneveraveryverylongword
"""


class TestLook:
    script = TestNodes.script

    @pytest.mark.parametrize("scheme", ["light", "dark"])
    @pytest.mark.parametrize("width", [320, 900])
    def test_accessible_and_without_horizontal_scroll(
        self, chat: Page, script: Script, scheme: str, width: int
    ) -> None:
        chat.width(width)
        chat.media(prefers_color_scheme=scheme, prefers_reduced_motion="reduce")
        error = event({"error": {"message": "node 2 was lost"}})
        call = {"index": 0, "id": "c", "function": {"name": "find", "arguments": '{"a": 1}'}}
        script.completions = [
            answer(RICH, reasoning="It wants a plan.", timings={**TIMINGS, "prompt_ms": 3200.0}),
            [chunk({"content": "Let me see."}), chunk({"tool_calls": [call]}), error],
        ]
        chat.ask("Make a plan, please.")
        for part in chat.all("details:not([open]) > summary"):
            if part.is_displayed():
                part.click()
        wide = (
            "const log = document.querySelector('#log');"
            "return [document.documentElement.scrollWidth, log.scrollWidth]"
        )
        save = os.environ.get("PAGE_SCREENSHOTS")
        if save:
            chat.driver.save_screenshot(f"{save}/{scheme}-{width}-open.png")
        assert max(chat.run(wide)) <= width
        assert chat.violations() == []
        chat.one("#settings summary").click()
        chat.ask("And now?")
        until(lambda: chat.all("#nodes li.lost"))
        if save:
            chat.driver.save_screenshot(f"{save}/{scheme}-{width}.png")
        assert max(chat.run(wide)) <= width
        assert chat.violations() == []

    def test_nothing_moves_for_those_who_do_not_want_it(self, chat: Page, script: Script) -> None:
        script.completions = [[chunk({"reasoning_content": "hm "})] * 100]
        script.pause = 0.05
        moving = "return document.getAnimations().length"
        chat.one("#input").send_keys("Hi\n")
        until(lambda: chat.run(moving) > 0)
        chat.media(prefers_reduced_motion="reduce")
        until(lambda: chat.run(moving) == 0)
        chat.click("Stop")

"""The page in a browser, as a teacher before a class, a student with a phone and a screen reader meet it."""

import json
import math
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from conftest import ROOT, TINY_ARGS, run_script
from serving import Served, serving

import checkpoint
from generate import Sampling, continuations
from markup import SHADES
from page import ALTERNATIVES, LINGER, SCORED
from words import WORDS

pytest.importorskip("gradio")
selenium = pytest.importorskip("selenium")
from selenium import webdriver
from selenium.common.exceptions import WebDriverException
from selenium.webdriver import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

CHROMIUM, DRIVER = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no chromium and chromedriver on PATH")

TRAINED = [*TINY_ARGS, "--n_layer=12", "--block_size=64", "--gradient_accumulation_steps=1", "--dataset=d"]
TRAINED += ["--eval_interval=20", "--sample_interval=20", "--sample_tokens=30"]
CONTEXT = 64
IDLE = {"status": "ok", "running": 0, "rows": 0, "waiting": 0, "open": 0}
LONG = 20000  # tokens, more than a text gets before a test ends it, however slow the browser is
DEFAULTS = {"length": 32, "top_k": 3, "top_p": 0.95, "temperature": 1, "penalty": 1, "samples": 1}
TITLE, OPENING = "#title :is(textarea, input)", "#opening textarea"
HOSTILE = """<script>window.hacked = 1</script><b>粗</b> &amp; "双" '单' <img src=x onerror="window.hacked = 1">"""

# what the server tells the page comes two seconds late
LATE = """
const soon = window.fetch, late = () => new TransformStream({async transform(piece, to) {
  const [due, bytes] = piece;
  await new Promise((done) => setTimeout(done, due - Date.now()));
  to.enqueue(bytes);
}});
window.fetch = async (...asked) => {
  const answer = await soon(...asked);
  if (!(asked[0].url ?? "").includes("queue/data")) return answer;
  const stamp = new TransformStream({transform: (bytes, to) => to.enqueue([Date.now() + 2000, bytes])}, undefined,
    {highWaterMark: Infinity});
  return new Response(answer.body.pipeThrough(stamp).pipeThrough(late()), answer);
};
"""

# every text that can be seen: what it says, its contrast with what is behind it, and the contrast that it needs
CONTRASTS = """
const parse = (color) => {
  if (!color.startsWith("rgb")) throw new Error(color);
  const numbers = color.match(/[\\d.]+/g).map(Number);
  return numbers.length > 3 ? numbers : [...numbers, 1];
};
const over = (top, under) => under.map((c, k) => top[k] * top[3] + c * (1 - top[3]));
const light = (rgb) => rgb.map((c) => c / 255).map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
  .reduce((sum, c, k) => sum + c * [0.2126, 0.7152, 0.0722][k], 0);
const behind = (element) => {
  const layers = [];
  for (; element; element = element.parentElement) layers.push(parse(getComputedStyle(element).backgroundColor));
  return layers.reverse().reduce((under, top) => over(top, under), [255, 255, 255]);
};
const found = [];
const look = (text, element, color) => {
  const style = getComputedStyle(element), box = element.getBoundingClientRect(), size = parseFloat(style.fontSize);
  if (!element.checkVisibility({opacityProperty: true, visibilityProperty: true})) return;
  if (!text.trim() || box.width < 2 || box.height < 2) return;
  const under = behind(element), [a, b] = [light(over(parse(color), under)), light(under)];
  const large = size >= 24 || (size >= 16 && style.fontWeight >= 600);
  found.push([text.trim(), (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), large ? 3 : 4.5]);
};
const nodes = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (nodes.nextNode()) {
  const element = nodes.currentNode.parentElement, style = getComputedStyle(element);
  look(nodes.currentNode.nodeValue, element, element instanceof SVGElement ? style.fill : style.color);
}
for (const field of document.querySelectorAll("input[type=number], input[type=text], textarea")) {
  look(field.value, field, getComputedStyle(field).color);
  if (!field.value) look(field.placeholder, field, getComputedStyle(field, "::placeholder").color);
}
return found;
"""


def until(condition: Callable[[], Any], timeout: float = 30.0) -> Any:
    """What the condition gives once that is true; AssertionError where it does not become so in time."""
    end, given = time.monotonic() + timeout, None
    while time.monotonic() < end:
        with suppress(WebDriverException):  # an element that is not there yet, or no longer
            if given := condition():
                return given
        time.sleep(0.03)
    raise AssertionError(f"not in {timeout:g} s; the last that came was {given!r}")


class Visit:
    """A page in a browser, and what people do with it."""

    def __init__(self, driver: webdriver.Chrome, url: str):
        self.driver, self.url = driver, url

    def ready(self, lang: str) -> None:
        """Waits until the page is there, and speaks the language."""
        until(lambda: self.find("#write, #send").text and self.js("return document.documentElement.lang") == lang)

    def js(self, script: str, *args: Any) -> Any:
        return self.driver.execute_script(script, *args)

    def cdp(self, command: str, **how: Any) -> Any:
        return self.driver.execute_cdp_cmd(command, how)

    def find(self, css: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, css)

    def text(self, css: str) -> str:
        return self.js("return document.querySelector(arguments[0])?.innerText", css) or ""

    def value(self, css: str) -> str:
        return self.js("return document.querySelector(arguments[0]).value", css)

    def press(self, css: str) -> None:
        until(lambda: self.find(css).is_displayed())
        self.js("document.querySelector(arguments[0]).scrollIntoView({block: 'center'})", css)
        self.find(css).click()

    def fill(self, css: str, text: str) -> None:
        """Types a text in place of what is there."""
        field = self.find(css)
        field.send_keys(Keys.CONTROL + "a")
        field.send_keys(text or Keys.BACKSPACE)
        assert self.value(css) == text

    def put(self, css: str, text: str) -> None:
        """What pasting does, for texts that would take long to type."""
        self.js(
            "const field = document.querySelector(arguments[0]); field.value = arguments[1];"
            "field.dispatchEvent(new Event('input', {bubbles: true}));", css, text,
        )  # fmt: skip

    def adjust(self, **settings: float) -> None:
        for name, value in settings.items():
            self.fill(f"#{name} input[type=number]", str(value))
            self.find(f"#{name} input[type=number]").send_keys(Keys.TAB)
            if name != "seed":
                until(lambda css=f"#{name} input[type=range]", value=value: float(self.value(css)) == value)

    def tab(self, number: int) -> None:
        tab = f"[role=tablist] button:nth-of-type({number})"
        self.press(tab)
        until(lambda: self.find(tab).get_attribute("aria-selected") == "true")

    def status(self) -> str:
        return self.text("#status p")

    def story(self, k: int = 1) -> str:
        return self.value(f"#story-{k} textarea")

    def boxes(self) -> int:
        """Stories that are beside each other."""
        found = self.driver.find_elements(By.CSS_SELECTOR, "#answer textarea")
        return sum(box.is_displayed() for box in found)

    def start(self, button: str = "#write") -> None:
        """Presses a button and waits for a new status."""
        self.js("document.querySelector('#status p').textContent = ''")
        self.press(button)
        until(self.status)

    def write(self, button: str = "#write", ended: str = "写完了") -> str:
        """Presses a button and waits for the work's end; the status."""
        self.start(button)
        until(lambda: self.status().startswith(ended))
        frames = "requestAnimationFrame(() => requestAnimationFrame(arguments[0]))"
        self.driver.execute_async_script(frames)  # the status and the texts are drawn one after the other
        return self.status()

    def show(self, button: str = "#show") -> list[dict[str, Any]]:
        """Presses a button of the probabilities' tab; the tokens of another text than before, as they are shown."""
        self.js("document.querySelector('.tokens')?.remove()")
        self.press(button)
        return until(
            lambda: self.js("""return Array.from(document.querySelectorAll(".tokens .token"), (token) => ({
            text: token.firstChild.nodeValue, shade: token.classList[1], label: token.getAttribute("aria-label"),
            rather: Array.from(token.querySelectorAll(".rather span"), (other) => other.textContent)}))""")
        )

    def axes(self) -> list[tuple[str, float, float]]:
        """Of the three plots, the x axis: its title, and from where to where it goes."""
        labels = self.js("""return ["loss", "lr", "speed"].map((id) =>
            document.querySelector(`#${id} [aria-label^=X-axis]`)?.getAttribute("aria-label"))""")
        found = [re.search("'(.+)' .* from (.+) to (.+)", (label or "").replace(",", "")) for label in labels]
        number = lambda text: float(text.replace("k", "e3").replace("m", "e-3"))  # noqa: E731
        return [(each[1], number(each[2]), number(each[3])) for each in found] if all(found) else []

    def curves(self) -> dict[str, list[str]]:
        """Of each plot, its curves as SVG paths."""
        return self.js("""return Object.fromEntries(["loss", "lr", "speed"].map((id) => [id,
            Array.from(document.querySelectorAll(`#${id} .mark-line path`), (path) => path.getAttribute("d"))]))""")

    def controls(self) -> list[tuple[str, str]]:
        """What a screen reader finds to work with: kind and name."""
        kinds = {"button", "textbox", "slider", "spinbutton", "tab", "radio", "checkbox", "combobox", "link"}
        nodes = [node for node in self.cdp("Accessibility.getFullAXTree")["nodes"] if not node["ignored"]]
        named = [(node["role"]["value"], node.get("name", {}).get("value", "").strip()) for node in nodes]
        return [(kind, name) for kind, name in named if kind in kinds]

    def complaints(self) -> list[str]:
        """The errors in the browser's console since they were last asked for."""
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]

    def requests(self) -> set[str]:
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        return {m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"}

    def leave(self) -> None:
        """Closes the page, of which the browser may say that what it listened to was cut off."""
        assert self.complaints() == []
        self.driver.get("about:blank")
        self.complaints()

    def picture(self, path: Path) -> None:
        self.driver.save_screenshot(str(path))


@contextmanager
def browser(
    url: str, width: int = 1280, dark: bool = False, lang: str = "zh-CN", locked: bool = False
) -> Iterator[Visit]:
    """A visit, which must end without an error in the console and without a request to anywhere but the server.
    `locked`: it begins at a page that asks for a password."""
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (
        "no-sandbox", "headless=new", "disable-gpu", "disable-background-networking", "disable-dev-shm-usage",
        "no-proxy-server", f"window-size={width},900", f"lang={lang}",
        "host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    ):  # fmt: skip
        options.add_argument(f"--{flag}")
    options.add_experimental_option("prefs", {"intl.accept_languages": lang})
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        visit = Visit(driver, url)
        if width < 500:
            visit.cdp("Emulation.setDeviceMetricsOverride", width=width, height=844, deviceScaleFactor=2, mobile=True)
            visit.cdp("Emulation.setTouchEmulationEnabled", enabled=True)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        visit.cdp("Emulation.setEmulatedMedia", features=[scheme])
        driver.get(url)
        if not locked:
            visit.ready(lang[:2])
        yield visit
        assert visit.complaints() == []
        assert {to for to in visit.requests() if not to.startswith((f"{url}/", "data:", "blob:"))} == set()
    finally:
        driver.quit()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with out/, a tiny model of the embedded stories, and plain/, one of a text without titles and ends."""
    folder = tmp_path_factory.mktemp("page")
    (folder / "plain.txt").write_text("小白兔和小熊一起去森林里玩。\n" * 200, encoding="utf-8")
    own = ["--input=plain.txt", "--dest=p", "--byte_fallback=False"]
    for prepared in (["--dest=d"], own):
        assert run_script("data/chinese/prepare.py", *prepared, cwd=folder).returncode == 0
    done = run_script("train.py", *TRAINED, "--max_iters=60", cwd=folder)
    assert done.returncode == 0, done.stderr
    few = ["--gradient_accumulation_steps=1", "--dataset=p", "--max_iters=5", "--out_dir=plain"]
    done = run_script("train.py", *TINY_ARGS, *few, cwd=folder)
    assert done.returncode == 0, done.stderr
    (folder / "plain" / "log.jsonl").unlink()
    return folder


@pytest.fixture(scope="module")
def served(folder) -> Iterator[Served]:
    with serving("--out_dir=out", f"--max_tokens={LONG}", cwd=folder) as served:
        yield served
        until(lambda: served.health() == IDLE)
        assert "Traceback" not in "".join(served.said)


@pytest.fixture(scope="module")
def opened(folder) -> tuple:
    """The model that is served, its tokenizer and its template."""
    path, state = checkpoint.best(str(folder / "out"))
    model, tokenizer = checkpoint.model_of(state, path), checkpoint.tokenizer_of(state, path)
    template = checkpoint.template_of(state)
    return model.eval(), tokenizer, template


@contextmanager
def busy(url: str, name: str = "out", prompt: str = "小", texts: int = 16) -> Iterator[None]:
    """The server writes for somebody else, as many texts as it can at once or fewer."""
    asked = {"model": name, "prompt": prompt, "max_tokens": LONG, "n": texts, "stream": True, "temperature": 0}
    with httpx.stream("POST", f"{url}/v1/completions", json=asked, trust_env=False, timeout=60) as answer:
        assert answer.status_code == 200
        lines = answer.iter_lines()
        next(lines)
        yield


def test_writing_stopping_and_going_on(served):
    with browser(served.url) as page:
        shown = {name: float(page.value(f"#{name} input[type=number]")) for name in DEFAULTS}
        assert shown == DEFAULTS and page.value("#seed input") == "-1"
        page.fill(TITLE, "小白兔")
        page.fill(OPENING, "从前，\n有一只")
        page.find("#top_k input[type=range]").send_keys(Keys.ARROW_RIGHT)
        until(lambda: page.value("#top_k input[type=number]") == "4")
        page.adjust(length=LONG, samples=6, temperature=1.2)
        page.start()

        def growing() -> tuple[int, float]:
            count = re.match(r"正在写 · (\d+\.\d) 秒 · (\d+) 个词元 · 种子 \d+$", page.status())
            return count and (len(page.story()), float(count[1]))

        before = until(lambda: (seen := growing()) and seen[0] > 14 and seen)
        after = until(lambda: (seen := growing()) and seen[0] > before[0] and seen[1] > before[1] and seen)
        assert after[0] < LONG
        page.press("#stop")
        until(lambda: page.status().startswith("已停止"))
        until(lambda: served.health()["running"] == served.health()["open"] == 0)
        stopped = page.story()
        assert stopped.startswith("《小白兔》\n从前，\n有一只") and len(stopped) < LONG

        page.adjust(length=10)
        second = page.story(2)
        page.write("#go-on-2")
        assert page.story(2).startswith(second) and len(page.story(2)) > len(second)
        assert page.story() == stopped
        page.fill("#story-1 textarea", "小白兔说，")
        assert re.search(r"· 10 个词元 · 种子 \d+$", page.write("#go-on-1"))
        written = page.story()
        assert written.startswith("小白兔说，") and len(written) > len("小白兔说，")
        box = page.find("#story-1 textarea")
        box.send_keys(Keys.CONTROL + Keys.HOME)
        box.send_keys(Keys.ARROW_RIGHT * 3, "和小熊")
        edited = "小白兔和小熊" + written[3:]
        assert page.story() == edited
        page.write("#go-on-1")
        assert page.story().startswith(edited) and len(page.story()) > len(edited)
        long = "小白兔说，" * 20
        page.put("#story-1 textarea", long)
        assert f"模型只看最后 {CONTEXT} 个词元" in page.write("#go-on-1")
        assert page.story().startswith(long) and len(page.story()) > len(long)

        # pressed while it writes, the button begins anew, and the old text ends
        page.adjust(length=LONG, samples=3)
        page.start()
        until(lambda: growing() and len(page.story()) > 20)
        asked = {TITLE: "", OPENING: "小熊", "#length input[type=number]": "5", "#samples input[type=number]": "2"}
        for field, text in asked.items():
            page.put(field, text)
        assert growing()
        assert "· 10 个词元 ·" in page.write()
        anew = page.story()
        assert anew.startswith("小熊") and len(anew) <= 10
        assert until(lambda: served.health()["open"] == 0) and page.story() == anew

        # and so do another button, a button of another tab, and leaving
        page.put("#story-1 textarea", "小白兔")
        page.adjust(length=LONG, samples=2)
        page.start("#go-on-1")
        page.js("""window.said = []; new MutationObserver(() => said.push(document.querySelector("#status").innerText))
            .observe(document.querySelector("#status"), {childList: true, subtree: true})""")
        page.press("#write")
        until(lambda: growing() and page.story().startswith("小熊"))
        assert not any("已停止" in status for status in page.js("return said"))
        until(growing)
        page.tab(2)
        page.put("#text textarea", "小白")
        assert len(page.show()) == 2
        page.tab(1)
        until(lambda: page.status().startswith("已停止"))
        page.start()
        assert until(lambda: served.health()["running"])
        page.leave()
        until(lambda: served.health() == IDLE)


def test_a_browser_that_is_behind_gets_what_it_asks_for(served):
    with browser(served.url) as page:
        page.cdp("Page.addScriptToEvaluateOnNewDocument", source=LATE)
        page.driver.get(served.url)
        page.ready("zh")
        page.adjust(length=100, seed=7)
        page.press("#write")
        until(lambda: served.health()["open"] == 1 or page.status())
        until(lambda: served.health()["open"] == 0)  # and that is on its way
        page.adjust(seed=8)
        page.press("#write")
        until(lambda: page.status().startswith("写完了") and page.status().endswith("种子 8"))
        time.sleep(3)  # what this browser still has on its way is not what is tested here
        page.fill("#story-1 textarea", "改过的")
        time.sleep(LINGER + 3)
        assert page.story() == "改过的"  # also once that is closed


def test_settings_reach_the_model_and_seeds_repeat(served, opened):
    model, tokenizer, _ = opened
    asked = {"length": 41, "top_k": 7, "top_p": 0.85, "temperature": 1.3, "penalty": 1.25, "samples": 3, "seed": 5}
    sampling = Sampling(41, temperature=1.3, top_k=7, top_p=0.85, repetition_penalty=1.25, seed=5)
    start = "《小白兔》\n从前，"
    expected = [start + text for text in continuations(model, tokenizer, [start] * 3, sampling)]
    assert len(set(expected)) == 3
    for change in ({"temperature": 1}, {"top_k": 3}, {"top_p": 0.95}, {"repetition_penalty": 1}, {"seed": 6}):
        other = continuations(model, tokenizer, [start] * 3, replace(sampling, **change))
        assert [start + text for text in other] != expected, f"{change} would not be noticed"
    with browser(served.url) as page:
        page.cdp("Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"])
        page.fill(TITLE, "小白兔")
        page.fill(OPENING, "从前，")
        page.adjust(**asked)
        assert page.boxes() == 1
        assert page.write().endswith("· 123 个词元 · 种子 5")
        assert [page.story(k) for k in (1, 2, 3)] == expected
        assert page.boxes() == 3
        page.adjust(length=9)
        page.write("#go-on-2")
        more = continuations(model, tokenizer, [expected[1]], replace(sampling, max_new_tokens=9),
                             first=1 + len(expected[1]))  # fmt: skip
        assert [page.story(k) for k in (1, 2, 3)] == [expected[0], expected[1] + more[0], expected[2]]

        # the second way is that of pages from another machine without https
        for k, way in ((3, ""), (1, "Object.defineProperty(navigator, 'clipboard', {value: undefined})")):
            page.js(way)
            page.press(f"#copy-{k}")
            until(lambda k=k: page.status() == f"已复制：作品 {k}")
            page.find(OPENING).send_keys(Keys.CONTROL + "a")
            page.find(OPENING).send_keys(Keys.CONTROL + "v")
            until(lambda k=k: page.value(OPENING) == expected[k - 1])

        # nothing to begin with; a seed of one's own, or another one each time
        page.fill(TITLE, "")
        page.fill(OPENING, "")
        page.adjust(samples=1, seed=-1)
        seeds, texts = [], []
        for _ in range(2):
            seeds.append(int(re.search(r"种子 (\d+)$", page.write())[1]))
            texts.append(page.story())
        assert page.boxes() == 1
        assert len(set(texts)) == 2 == len(set(seeds))
        page.adjust(seed=seeds[0])
        page.write()
        assert page.story() == texts[0]
        [alone] = continuations(model, tokenizer, [""], replace(sampling, max_new_tokens=9, seed=seeds[0]))
        assert page.story() == alone
        page.adjust(temperature=0, seed=-1)
        texts = {(page.write(), page.story())[1] for _ in range(2)}
        assert len(texts) == 1


def test_languages_and_names_for_a_screen_reader(served):
    with browser(served.url, lang="en-US") as page:
        page.fill(OPENING, "stop")
        page.adjust(length=1)
        assert page.write(ended="done").startswith("done · ")
        assert page.story().startswith("stop") and page.value(OPENING) == "stop"
        for story in ("stop", "words.stop"):  # words of the page, which a text is not
            page.fill("#story-1 textarea", story)
            page.tab(2)
            page.show("#take")
            assert page.value("#text textarea") == story
            page.tab(1)
        for lang in ("en", "zh"):
            if lang == "zh":
                page.press("#switch")
            said = {key: both[lang == "en"] for key, both in WORDS.items()}
            until(lambda lang=lang: page.js("return document.documentElement.lang") == lang)
            until(lambda said=said: page.text("#write") == said["write"])
            assert page.find(TITLE).get_attribute("placeholder") == said["title_hint"]
            assert page.find(OPENING).get_attribute("placeholder") == said["opening_hint"]
            assert page.find("#story-1 textarea").get_attribute("placeholder") == said["story_hint"]
            assert page.text("#switch") == said["switch"] and page.text("#stop") == said["stop"]
            tabs = [tab.text for tab in page.driver.find_elements(By.CSS_SELECTOR, "[role=tablist] button")]
            assert tabs == [said["write_tab"], said["tokens_tab"], said["run_tab"]]
            for word in ("title", "opening", "seed", *DEFAULTS):
                assert said[word] in page.text(f"#{word}")
            assert page.value(OPENING) == "stop" and page.value("#length input") == "1"
            assert page.story() == "words.stop"
            page.adjust(samples=2)
            page.write(ended=said["done"])
            for tab, least in ((1, 20), (2, 10), (3, 6)):
                page.tab(tab)
                if tab == 2:
                    page.put("#text textarea", said["title_hint"])
                    assert page.show() and said["scored_hint"] in page.text("#tokens")
                if tab == 3:
                    until(page.axes)
                    assert page.axes()[0][0] == said["step"]
                controls = page.controls()
                assert len(controls) >= least and all(name for _, name in controls)
                fields = [each for each in controls if each[0] in ("textbox", "slider", "spinbutton", "radio")]
                assert len(set(fields)) == len(fields) > 0
            page.tab(1)
            page.fill("#story-1 textarea", "words.stop")
        page.leave()
        page.driver.get(page.url)
        page.ready("zh")
        assert page.text("#write") == "开始写" and page.text("#switch") == "English"


def expected_tokens(opened, text: str) -> list[dict[str, Any]]:
    """Each token's piece, probability, rank, and the likeliest with theirs: one pass over the text, in float64."""
    model, tokenizer, _ = opened
    ids = tokenizer.encode_prompt(text).tolist()
    assert len(ids) <= CONTEXT
    idx = torch.tensor([[tokenizer.end_of_text, *ids]])
    with torch.no_grad():
        probs = model(idx[:, :-1], idx[:, 1:])[0][0].double().softmax(-1)  # [tokens, vocab_size]
    found = []
    for id, p in zip(ids, probs, strict=True):
        top = p.topk(ALTERNATIVES)
        likeliest = zip(tokenizer.pieces(top.indices.tolist()), top.values.tolist(), strict=True)
        found.append({"piece": tokenizer.pieces([id])[0], "p": p[id].item(), "rank": int((p > p[id]).sum()) + 1,
                      "top": list(likeliest)})  # fmt: skip
    return found


def as_shown(piece: str) -> str:
    return piece.replace("\n", "↵").replace("\t", "⇥")


def assert_percent(shown: str, p: float) -> None:
    """Two digits or so."""
    if p < 0.0001:
        assert shown == "<0.01%"
    else:
        digits = 0 if p >= 0.0999 else 1 if p >= 0.000999 else 2
        assert abs(float(shown.removesuffix("%")) - 100 * p) <= 0.51 * 10**-digits, (shown, p)


def test_probabilities(served, opened):
    tokenizer = opened[1]
    with browser(served.url) as page:
        page.fill(TITLE, "小白兔")
        page.fill(OPENING, "从前，")
        page.write()
        page.tab(2)
        shown = page.show("#take")
        assert page.value("#text textarea") == page.story()
        for text in (page.story(), "𠮷 is\t小\n\n白兔", HOSTILE[:50], HOSTILE[-60:]):
            if text != page.story():
                page.put("#text textarea", text)
                shown = page.show()
            expected = expected_tokens(opened, text)
            assert [token["text"] for token in shown] == [as_shown(token["piece"]) for token in expected]
            for token, known in zip(shown, expected, strict=True):
                assert token["label"].startswith(f"{token['text']}: ")
                percent, place = token["label"].removeprefix(f"{token['text']}: ").split("，")
                assert_percent(percent, known["p"])
                shade = next((k for k, least in enumerate(SHADES) if known["p"] >= least), len(SHADES))
                assert token["shade"] == f"p{shade}"
                assert place == (f"第 {known['rank']} 可能" if known["rank"] <= 8 else "不在前 8 名")
                assert len(token["rather"]) == len(known["top"]) == 8
                for other, (piece, p) in zip(token["rather"], known["top"], strict=True):
                    assert other.startswith(f"{as_shown(piece)} ")
                    assert_percent(other.split()[-1], p)
        nats = sum(-math.log(token["p"]) for token in expected) / len(expected)
        assert f"每词元 {nats:.2f} 纳特（困惑度 {math.exp(nats):.1f}）" in page.text("#tokens")
        assert page.js("return window.hacked") is None
        assert page.js("return document.querySelectorAll('.tokens :is(script, img, .token > b)').length") == 0
        page.put("#text textarea", "小𠮷白")  # whose second character is not in the vocabulary
        assert [token["text"] for token in page.show()] == ["小", "<F0>", "<A0>", "<AE>", "<B7>", "白"]

        # pointing, clicking and the keyboard show what else there was, within the window and one at a time
        def open_ones() -> list[str]:
            return page.js("""return Array.from(document.querySelectorAll(".rather"), (box) => box).filter((box) => {
                const {top, bottom, left, right, height} = box.getBoundingClientRect();
                return height > 10 && top >= 0 && left >= 0 && bottom <= innerHeight + 1 && right <= innerWidth + 1;
            }).map((box) => box.innerText)""")

        assert open_ones() == []
        page.press(".tokens .token:nth-of-type(1)")
        until(lambda: [box.startswith("小: ") for box in open_ones()] == [True])
        ActionChains(page.driver).move_to_element(page.find("h1")).send_keys(Keys.TAB).perform()
        until(lambda: [box.startswith("<F0>: ") for box in open_ones()] == [True])

        page.put("#text textarea", "")
        page.press("#show")
        until(lambda: page.text("#tokens") == "")
        page.put("#text textarea", "小白兔说，你好。\n" * 130)
        shown = page.show()
        assert len(shown) == SCORED == 1000 and {token["shade"] for token in shown} <= {f"p{k}" for k in range(5)}
        text = "".join(token["text"] for token in shown).replace("↵", "\n")
        assert ("小白兔说，你好。\n" * 130).endswith(text)
        assert f"只显示最后 {SCORED} 个词元" in page.text("#tokens")
        assert tokenizer.end_of_text is not None


def test_the_run_while_it_is_trained(folder, tmp_path):
    shutil.copytree(folder / "out", tmp_path / "live")
    log = tmp_path / "live" / "log.jsonl"
    with log.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"kind": "sample", "iter": 60, "prompt": "", "text": HOSTILE}) + "\n")
    limits = ["--max_waiting=0", "--max_tokens=20000"]
    with serving("--out_dir=live", *limits, f"--name={HOSTILE}", cwd=tmp_path) as served:
        with browser(served.url) as page:
            assert page.text("h1") == f"微GPT · {HOSTILE}" == page.driver.title
            page.tab(3)
            until(lambda: page.text("#summary").startswith(f"第 60 步，最好的验证损失 {best_loss(log):.4f}"))
            until(lambda: [len(paths) for paths in page.curves().values()] == [2, 1, 1])
            assert page.axes() == [("步数", 0, 60)] * 3
            samples = page.driver.find_elements(By.CSS_SELECTOR, ".drawn")
            assert [each.text.split("\n")[0] for each in samples] == [f"第 {k} 步" for k in (60, 60, 40, 20)]
            assert HOSTILE in samples[0].text and page.js("return window.hacked") is None
            seconds = sum(record["ms"] for record in records(log) if record["kind"] == "train") / 1000
            for label, word, most in ((2, "词元数", 60 * 4 * CONTEXT), (3, "训练秒数", seconds)):
                page.press(f"#against label:nth-of-type({label})")
                until(lambda word=word: [title for title, *_ in page.axes()] == [word] * 3)
                assert page.axes()[0][1:] == pytest.approx((0, most), rel=0.2)
            page.press("#against label:nth-of-type(1)")
            until(lambda: page.axes() == [("步数", 0, 60)] * 3)

            drag(page, 0.25, 0.5)
            zoomed = until(lambda: (axes := page.axes()) and axes[0][2] < 60 and len(set(axes)) == 1 and axes)
            assert zoomed[0][1:] == pytest.approx((15, 30), abs=2)
            drawn = page.curves()
            more = [sys.executable, str(ROOT / "train.py"), *TRAINED, "--init_from=resume", "--out_dir=live",
                    f"--dataset={folder / 'd'}", "--max_iters=100"]  # fmt: skip
            training = subprocess.Popen(more, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
            try:
                until(lambda: page.text("#summary").startswith("第 100 步"), 60)
                assert training.wait(60) == 0, training.stderr.read().decode()
            finally:
                training.kill()
                training.stderr.close()
            until(lambda: f"最好的验证损失 {best_loss(log):.4f} " in page.text("#summary"))
            until(lambda: page.text(".drawn").startswith("第 100 步"))
            assert page.axes() == zoomed
            ActionChains(page.driver).move_to_element(page.find("#loss svg")).double_click().perform()
            until(lambda: page.axes() == [("步数", 0, 100)] * 3)
            assert all(page.curves()[id] and page.curves()[id] != drawn[id] for id in drawn)

            # where nobody may wait, a second one is told so
            page.tab(1)
            with busy(served.url, HOSTILE):
                assert re.match(r"排队的人太多，请 \d+ 秒后再试$", page.write(ended="排队"))
            until(lambda: served.health()["running"] == 0)
            page.write()
            assert page.story()
        assert "Traceback" not in "".join(served.said)


def records(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]


def best_loss(log: Path) -> float:
    return min(record["val_loss"] for record in records(log) if record["kind"] == "eval")


def drag(page: Visit, begin: float, end: float) -> None:
    """Drags across the loss plot, from one part of its width to another."""
    page.js("document.querySelector('#loss').scrollIntoView({block: 'center'})")
    left, top, width, height = page.js("""
        const box = document.querySelector("#loss .role-frame .background").getBoundingClientRect();
        return [box.left, box.top, box.width, box.height]""")
    chain = ActionChains(page.driver, duration=50).move_to_element(page.find("#loss svg"))
    for k in range(11):
        chain.w3c_actions.pointer_action.move_to_location(
            round(left + width * (begin + (end - begin) * k / 10)), round(top + height / 2)
        )
        if k == 0:
            chain.click_and_hold()
    chain.release().perform()


def test_who_finds_no_room_waits(served):
    with browser(served.url) as page:
        with busy(served.url):
            page.start()
            until(lambda: re.match(r"排队中，前面还有 0 个 · \d+\.\d 秒$", page.status()))
            assert page.story() == "" and served.health()["waiting"] == 1
        until(lambda: page.status().startswith("写完了"))
        until(page.story)
        with busy(served.url):  # and may think better of it
            page.start()
            until(lambda: page.status().startswith("排队中"))
            page.press("#stop")
            until(lambda: page.status().startswith("已停止 · "))
            assert served.health()["waiting"] == 0 and served.health()["running"] == 1
            page.tab(2)
            for text in ("小", "小白"):  # the second one before it is the first one's turn
                page.put("#text textarea", text)
                page.press("#show")
                until(lambda: served.health()["waiting"] == 1)
        tokens = "return Array.from(document.querySelectorAll('.tokens .token'), (token) => token.firstChild.nodeValue)"
        until(lambda: page.js(tokens) == ["小", "白"])
        page.tab(1)
        with busy(served.url):  # or leave
            page.start()
            until(lambda: served.health()["waiting"] == 1)
            page.leave()
            until(lambda: served.health()["open"] == 1)
            assert served.health()["waiting"] == 0 and served.health()["running"] == 1


def test_a_second_one_is_written_for_at_the_same_time(served):
    with browser(served.url) as page, busy(served.url, texts=3):
        page.write()
        assert page.story() and served.health()["running"] == 1 and served.health()["rows"] == 3
        page.adjust(length=LONG, samples=3)
        page.start()
        until(lambda: served.health()["rows"] == 6 and page.story(3))
        assert page.status().startswith("正在写")
        page.press("#stop")
        until(lambda: page.status().startswith("已停止"))
        until(lambda: served.health()["rows"] == 3)


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_everything_fits_and_can_be_read(served, tmp_path, width, dark):
    with browser(served.url, width, dark) as page:

        def look(name: str, *least: str) -> None:
            page.picture(tmp_path / f"{name}-{width}-{'dark' if dark else 'light'}.png")
            assert page.js("return document.documentElement.scrollWidth") <= width
            rights = """return Array.from(document.querySelectorAll("#switch, input, textarea, .block"),
                (part) => part.checkVisibility() ? part.getBoundingClientRect().right : 0)"""
            assert 0 < max(page.js(rights)) <= width
            seen = page.js(CONTRASTS)
            texts = [text for text, *_ in seen]
            assert all(any(part in text for text in texts) for part in least), texts
            pale = [(text, round(contrast, 2)) for text, contrast, needed in seen if contrast < needed]
            assert pale == [], name

        assert page.js("return document.body.classList.contains('dark')") == dark
        look("empty", "可以留空", "写作", "开始写", "停止", "Top-k", "0.95", "复制")
        page.fill(OPENING, "从前，")
        page.adjust(samples=2)
        page.write()
        look("written", "从前，", "写完了", "作品 2", "接着写")
        if width < 500:  # what is asked, what is answered, then the settings
            tops = [page.js("return document.querySelector(arguments[0]).getBoundingClientRect().top", css)
                    for css in ("#asked", "#answer", "#settings")]  # fmt: skip
            assert tops == sorted(tops)
        page.tab(2)
        page.show("#take")
        token = page.find(".tokens .token:nth-of-type(3)")
        if width < 500:
            page.js("arguments[0].scrollIntoView({block: 'center'})", token)
            x, y = page.js("const b = arguments[0].getBoundingClientRect(); return [b.x + b.width / 2, b.y + 9]", token)
            page.cdp("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
            page.cdp("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
        else:
            ActionChains(page.driver).move_to_element(token).perform()
        until(lambda: page.text(".tokens .token:nth-of-type(3) .rather").startswith("，: "))
        box = page.js("""const b = document.querySelector(".tokens .token:nth-of-type(3) .rather");
            const {left, right, bottom} = b.getBoundingClientRect(); return [left, right, bottom - innerHeight]""")
        assert box[0] >= 0 and box[1] <= width and abs(box[2]) < 1
        look("tokens", "> 50%", "困惑度", "从", "第 ")
        page.tab(3)
        until(page.axes)
        until(lambda: [len(paths) for paths in page.curves().values()] == [2, 1, 1])
        look("run", "步数", "损失", "验证", "60", "第 40 步")


def test_a_key_a_plain_model_and_the_end(folder):
    path, state = checkpoint.best(str(folder / "plain"))
    assert checkpoint.tokenizer_of(state, path).end_of_text is None
    with serving("--out_dir=plain", "--api_key=SECRET", cwd=folder) as served:
        with browser(served.url, locked=True) as page:
            until(lambda: page.find("input[type=password]").is_displayed())
            assert "密码" in page.text("body") and page.driver.find_elements(By.CSS_SELECTOR, "#write") == []
            for key in ("WRONG", "SECRET"):
                fields = page.driver.find_elements(By.CSS_SELECTOR, "input")
                for field, text in zip(fields, ("teacher", key), strict=True):
                    field.send_keys(Keys.CONTROL + "a")
                    field.send_keys(text)
                fields[1].send_keys(Keys.ENTER)
                if key == "WRONG":
                    refused = until(page.complaints)
                    assert len(refused) == 1 and "/login" in refused[0] and "400" in refused[0]
                    assert page.find("input[type=password]").is_displayed()
            page.ready("zh")
            assert not page.driver.find_elements(By.CSS_SELECTOR, "#title textarea, #title input")
            page.write()
            assert len(page.story()) > 5
            page.tab(2)
            assert page.show("#take")[0]["shade"] == "none"  # nothing comes before the first
            page.tab(3)
            until(lambda: "这里没有训练记录" in page.text("#summary"))
            assert page.complaints() == []
            assert served.end() == 0  # while the page listens
            assert "Traceback" not in "".join(served.said) and "rror" not in "".join(served.said), served.said
            page.driver.get("about:blank")
            page.complaints()  # that the server is gone

"""The page's conversation in a browser, with a model that has learnt a few by heart."""

import asyncio
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from serving import Served, serving
from test_page import CONTRASTS, HOSTILE, IDLE, LONG, OPENING, Visit, browser, busy, pytestmark, until  # noqa: F401

import checkpoint
from chat import LAYOUT, ChatTokenizer
from engine import Engine
from generate import Sampling, continuations
from model import GPT, GPTConfig
from page import LINGER, Page
from tokenizer import CharTokenizer
from words import WORDS

from selenium.webdriver.common.by import By  # isort: skip
from selenium.webdriver.common.keys import Keys  # isort: skip

NAMES = "明红刚"
LEARNT = [[f"我是小{name}", f"你好，小{name}！", "我是谁？", f"你是小{name}。"] for name in NAMES]
PICTURE = ["画画", '<img src=x onerror="window.hacked=1">![](http://a.b/c.png)\n\n**粗**']
COUNTING = ["数数", "一二三四五六七八九十" * 30]  # of which the model sees no end


def messages(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[k % 2], "content": content} for k, content in enumerate(contents)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with chat/, a model that has learnt to answer, and count on for as long as it may."""
    torch.manual_seed(0)
    chars = "".join(dict.fromkeys("".join(sum(LEARNT, PICTURE + COUNTING))))
    tokenizer = ChatTokenizer(CharTokenizer(chars, byte_fallback=True, end_of_text=True), LAYOUT)
    shape = {"n_layer": 2, "n_head": 4, "n_embd": 64, "pos": "rope", "block_size": LONG}
    model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, **shape))
    texts = tokenizer.encode_messages([messages(*each) for each in (*LEARNT, PICTURE, COUNTING)])
    width = (len(texts), 80)
    idx, targets = torch.zeros(width, dtype=torch.long), torch.full(width, -1)
    for row, (ids, learnt) in enumerate(texts):
        ids, learnt = torch.tensor(ids[:81].astype(int)), torch.tensor(learnt[:81])
        idx[row, : len(ids) - 1] = ids[:-1]
        targets[row, : len(ids) - 1] = ids[1:].where(learnt[1:], -1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        loss = model(idx, targets)[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.02
    folder = tmp_path_factory.mktemp("talk")
    (folder / "chat").mkdir()
    state = {"model": model.state_dict(), "model_args": model.config.model_args(), "tokenizer": tokenizer.meta()}
    checkpoint.save(folder / "chat" / "ckpt.pt", state)
    return folder


@pytest.fixture(scope="module")
def served(folder) -> Iterator[Served]:
    with serving("--out_dir=chat", f"--max_tokens={LONG}", cwd=folder) as served:
        yield served
        until(lambda: served.health() == IDLE)
        assert "Traceback" not in "".join(served.said)


@pytest.fixture(scope="module")
def opened(folder) -> tuple[GPT, ChatTokenizer]:
    path, state = checkpoint.best(str(folder / "chat"))
    return checkpoint.model_of(state, path).eval(), checkpoint.tokenizer_of(state, path)


class Talking(Visit):
    """A page whose first tab is a conversation."""

    def said(self) -> list[tuple[str, str]]:
        """Who has said what."""
        return [
            tuple(each)
            for each in self.js("""return Array.from(document.querySelectorAll("#talked .message"),
            (message) => [message.classList[1], message.querySelector("div").textContent])""")
        ]

    def told(self) -> str:
        return self.text("#talk-status p")

    def ask(self, question: str) -> None:
        self.put("#question textarea", question)
        self.find("#question textarea").send_keys(Keys.ENTER)
        until(lambda: ("user", question) in self.said()[-2:])

    def answer(self, question: str = "") -> str:
        """The answer to a question, or to the one that has been asked."""
        if question:
            self.ask(question)
        until(lambda: self.told().startswith("写完了") and self.said()[-1][0] == "assistant")
        return self.said()[-1][1]

    def counting(self) -> str:
        """The answer that grows, once it has grown."""
        before = len(self.said()[-1][1])
        return until(lambda: len(self.said()[-1][1]) > before + 20 and self.said()[-1][1])


@contextmanager
def talking(served: Served, *args, **how) -> Iterator[Talking]:
    with browser(served.url, *args, **how) as page:
        page.__class__ = Talking
        yield page


def test_a_conversation(served, opened):
    model, tokenizer = opened

    def expected(*contents: str) -> str:
        return continuations(model, tokenizer, [tokenizer.opening(messages(*contents), LONG)], greedy)[0]

    greedy = Sampling(60, temperature=0)
    with talking(served) as page:
        assert page.text("#talked") == "和模型说点什么吧" and page.said() == []
        shown = {name: float(page.value(f"#talk-{name} input")) for name in ("length", "temperature", "top_p")}
        assert shown == {"length": LONG, "temperature": 0.7, "top_p": 0.95}
        page.press("#again")  # which does nothing, where nothing has been said
        time.sleep(0.5)
        assert page.text("#talked") == "和模型说点什么吧"
        page.adjust(**{"talk-temperature": 0})
        for name in NAMES[:2]:
            said = [f"我是小{name}", f"你好，小{name}！", "我是谁？", f"你是小{name}。"]
            assert [page.answer(said[0]), page.value("#question textarea")] == [said[1], ""]
            assert page.answer(said[2]) == said[3] == expected(*said[:3])
            assert [who for who, _ in page.said()] == ["user", "assistant"] * 2
            assert re.match(r"写完了 · \d+\.\d 秒 · 6 个词元 · 种子 \d+$", page.told())
            known = page.said(), page.told()
            page.put("#question textarea", " ")
            page.press("#send")
            time.sleep(0.5)
            assert (page.said(), page.told()) == known
            page.press("#new-talk")
            until(lambda: page.text("#talked") == "和模型说点什么吧")
        assert page.answer("我是谁？") == expected("我是谁？")  # nothing of what was said before
        page.adjust(**{"talk-length": 2})
        page.press("#again")
        until(lambda: page.said() == [("user", "我是谁？"), ("assistant", expected("我是谁？")[:2])])


def test_an_answer_that_grows_is_ended(served):
    with talking(served) as page:
        page.ask("数数")
        assert page.told().startswith("正在写") and page.value("#question textarea") == ""
        assert page.counting().startswith("一二三四五六七八九十")
        page.press("#talk-stop")
        until(lambda: page.told().startswith("已停止"))
        assert served.health()["running"] == 0
        stopped = page.said()
        assert len(stopped[1][1]) < LONG
        # another answer in its place, and a question before that one has ended
        page.press("#again")
        until(lambda: page.told().startswith("正在写"))
        page.counting()
        page.ask("我是小红")
        cut = page.said()[1][1]
        until(lambda: [who for who, _ in page.said()] == ["user", "assistant"] * 2 and len(page.said()[3][1]) > 1)
        assert cut.startswith("一二三") and page.said()[1][1] == cut
        page.press("#new-talk")
        page.ask("数数")
        page.counting()
        page.press("#new-talk")
        until(lambda: served.health()["open"] == 0)
        until(lambda: page.told().startswith("已停止") or not page.told())
        assert page.said() == []
        with busy(served.url, "chat", COUNTING[1]):
            page.ask("我是小刚")
            until(lambda: re.match(r"排队中，前面还有 0 个 · \d+\.\d 秒$", page.told()))
            page.press("#talk-stop")
            until(lambda: page.told().startswith("已停止"))
            assert page.said() == [("user", "我是小刚"), ("assistant", "…")] and served.health()["waiting"] == 0
            page.press("#again")
            until(lambda: page.told().startswith("排队中"))
        assert page.answer() == "你好，小刚！"
        page.press("#new-talk")
        time.sleep(LINGER + 1)
        assert page.said() == []
        page.ask("数数")
        page.counting()
        page.leave()
        until(lambda: served.health()["open"] == 0)


def test_what_is_said_is_text(served):
    with talking(served) as page:
        page.adjust(**{"talk-temperature": 0})
        assert page.answer(PICTURE[0]) == PICTURE[1]
        page.adjust(**{"talk-length": 9})
        page.answer(HOSTILE)
        page.press("#switch")
        until(lambda: page.text("#talked .message b") == "You")
        assert page.said()[:3] == [("user", PICTURE[0]), ("assistant", PICTURE[1]), ("user", HOSTILE)]
        assert page.js("return window.hacked") is None
        assert page.js("return document.querySelectorAll('.message > div *').length") == 0
        said = {key: en for key, (_, en) in WORDS.items()}
        for part, word in (("send", "send"), ("talk-stop", "stop"), ("again", "again"), ("new-talk", "new_talk")):
            assert page.text(f"#{part}") == said[word]
        assert page.find("#question textarea").get_attribute("placeholder") == said["question_hint"]
        tabs = [tab.text for tab in page.driver.find_elements(By.CSS_SELECTOR, "[role=tablist] button")]
        assert tabs == [said[f"{tab}_tab"] for tab in ("talk", "write", "tokens", "run")]
        assert all(name for _, name in page.controls())
        page.tab(2)  # the other tabs are what they are for other models
        page.fill(OPENING, "一二三")
        page.adjust(length=3, temperature=0)
        page.write(ended="done")
        assert page.story().startswith("一二三")


def test_room_is_left_for_the_answer(opened):
    """In a context of 32 tokens, of which as many as the answer may have are its own, at most half of them."""
    model = GPT(replace(opened[0].config, block_size=32))
    model.load_state_dict(opened[0].state_dict())
    tokenizer, engine = opened[1], Engine(model.eval(), opened[1], nullcontext(), 1, 1)
    page = Page(engine, model, tokenizer, "", "chat", Path("nowhere"), 1, 100)
    asked, request = messages("我是小红", "你好，小红！", "我是谁？"), SimpleNamespace(session_hash="a")
    assert len(tokenizer.opening(asked, 100)) == 19
    without = continuations(model, tokenizer, [tokenizer.opening(asked[2:], 100)], Sampling(14, temperature=0))

    async def answered(length: int) -> str:
        talked = list(asked)
        async with aclosing(page.talk.answer(request, talked, "zh", length, 0, 1)) as growing:
            async for status, _ in growing:
                if "写完了" in status:
                    return talked[-1]["content"]

    with ThreadPoolExecutor(1) as pool:
        pool.submit(engine.run)
        try:
            assert asyncio.run(answered(13)) == "你是小红。"
            assert [asyncio.run(answered(14))] == without != ["你是小红。"]
        finally:
            engine.end()


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_conversation_fits_and_can_be_read(served, tmp_path, width, dark):
    with talking(served, width, dark) as page:
        page.adjust(**{"talk-length": 200})
        for name, questions in (("empty", []), ("said", ["我是小红", HOSTILE, "数数", "画画"])):
            for question in questions:
                page.answer(question)
            page.picture(tmp_path / f"talk-{name}-{width}-{'dark' if dark else 'light'}.png")
            assert page.js("return document.documentElement.scrollWidth") <= width
            seen = page.js(CONTRASTS)
            pale = [(text, round(contrast, 2)) for text, contrast, needed in seen if contrast < needed]
            assert pale == [], name
        # the newest words are in sight, and what does not fit is not
        below = """const box = document.querySelector("#talked").getBoundingClientRect();
            const [last] = [...document.querySelectorAll("#talked .message")].slice(-1);
            return [last.getBoundingClientRect().bottom - box.bottom,
                getComputedStyle(document.querySelector("#talked")).overflowY]"""
        assert page.js(below)[0] < 1 and page.js(below)[1] == "auto"

"""The page that serve.py shows: writing, the probabilities behind a text, and the run that made the model; and before
them a conversation, with a model that was trained on some.

Notable choices:
- Everything comes from this server: the system's fonts, Gradio's own scripts, no analytics.
- A story's box holds the whole text, its beginning included, and may be edited: the model goes on from what is there.
- A page has one piece of work at a time. It ends by the stop button, by the next one, and when the page is closed.
"""

import asyncio
import hmac
import secrets
import threading
import time
import traceback
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterator, Sequence
from contextlib import aclosing, contextmanager, suppress
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
import pandas as pd
from fastapi import FastAPI

from chat import ChatTokenizer
from configurator import UserError, tell
from engine import Engine, Full, Job, Refused, Work
from generate import Rows, Sampling, Token, beginning, has_title, score, titled
from history import History, thinned
from markup import coloured, said
from model import GPT
from talk import Talk
from tokenizer import Tokenizer
from words import STORIES, words

SCORED, ALTERNATIVES = 1000, 8  # tokens whose probabilities are shown at once, and the likeliest in each one's place
EVERY = 0.1  # seconds between two looks at texts that grow
DRAW = 1e-4  # and at least so many for each of their characters, all of which a browser draws anew
DRAWN = 50  # of the run's samples, the newest
LOOK = 2.0  # seconds between two looks at the run's log
# Seconds for which an event stays open after its last word. A browser closes the stream of news once the server says
# that nothing is open, even if it has asked for something since then, whose news it would never get.
LINGER = 10.0
FONTS = ["system-ui", "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", "sans-serif"]
HERE = Path(__file__).resolve().parent
KEY = "words."  # before a word's key, for Gradio takes a value that is a key for the word, a story's text, too
AXES = ("step", "tokens", "seconds")
COLORS = {"train": "#3b82f6", "val": "#f97316", "lr": "#3b82f6", "speed": "#3b82f6"}
# Gradio's are too pale to be read on white: WCAG 2 asks for a contrast of 4.5, and of 3 where letters are large
DARKER = {
    "button_primary_background_fill": "*primary_600",
    "button_primary_background_fill_hover": "*primary_700",
    "body_text_color_subdued": "*neutral_500",
    "input_placeholder_color": "*neutral_500",
    "input_placeholder_color_dark": "*neutral_400",
}
# the language is told to screen readers, and where a status line is, which they read out once it has ended
TOLD = """(lang) => {
  document.documentElement.lang = lang;
  document.querySelectorAll("#status, #talk-status").forEach((line) => line.setAttribute("role", "status"));
}"""
# the clipboard's own interface is there on https and on localhost alone
COPY = """(text) => {
  if (navigator.clipboard) navigator.clipboard.writeText(text);
  else { document.querySelector("BOX").select(); document.execCommand("copy"); }
}"""


def mount_page(
    app: FastAPI,
    engine: Engine,
    model: GPT,
    tokenizer: Tokenizer,
    template: str,
    name: str,
    folder: Path,
    *,
    max_rows: int,
    max_tokens: int,
    api_key: str = "",
) -> FastAPI:
    """The app with the page at its root. `folder` is the run whose log.jsonl is shown; limits as for the API; where
    there is an `api_key`, the page asks for it as a password."""
    page = Page(engine, model, tokenizer, template, name, folder, max_rows, max_tokens)

    def knows_the_key(_: str, password: str) -> bool:
        return hmac.compare_digest(password.encode(), api_key.encode())

    mounted = gr.mount_gradio_app(
        app, page.blocks, "/", auth=knows_the_key if api_key else None,
        auth_message="用户名任意，密码是 api_key。<br>Any user name; the password is the api_key.",
        i18n=page.i18n, css_paths=HERE / "page.css",
        theme=gr.themes.Default(font=FONTS, font_mono=["ui-monospace", "Consolas", "monospace"]).set(**DARKER),
        footer_links=[], run_history=False, show_error=False, ssr_mode=False, mcp_server=False, pwa=False,
        enable_monitoring=False, max_file_size=0,
    )  # fmt: skip
    # Gradio looks for new events a thousand times a second, which costs a model that writes a tenth of its speed
    page.blocks._queue.sleep_when_free = 0.05  # seconds
    return mounted


class Page:
    """The page's parts and what they do."""

    def __init__(
        self, engine: Engine, model: GPT, tokenizer: Tokenizer, template: str, name: str, folder: Path, max_rows: int,
        max_tokens: int,
    ):  # fmt: skip
        self.engine, self.model, self.tokenizer, self.template = engine, model, tokenizer, template
        self.context = model.config.block_size
        self.name, self.samples, self.max_tokens = name, min(STORIES, max_rows), max_tokens
        self.history, self.reading, self.version = History(folder), threading.Lock(), 0
        self.jobs: dict[str, Job] = {}  # of each page that is open
        self.turns: dict[str, asyncio.Event] = {}  # of each page the newest turn to write; set where it is over
        self.filling: dict[str, asyncio.Lock] = {}  # and what lets one after the other write
        keyed = {lang: {KEY + key: text for key, text in words(lang).items()} for lang in ("zh", "en")}
        self.i18n = gr.I18n(**keyed)
        self.worded: list[tuple[Any, dict[str, str]]] = []  # components, and which words which of their properties are
        self.blocks = self.build()

    # ---- the parts

    def add(self, kind: type, *args: Any, worded: dict[str, str | tuple[str, ...]], **how: Any) -> Any:
        """A component some of whose properties are words, in the browser's language until it is switched."""
        component = kind(*args, **how, **self.properties(worded, {key: self.i18n(KEY + key) for key in words("zh")}))
        self.worded.append((component, worded))
        return component

    def properties(self, worded: dict[str, str | tuple[str, ...]], said_in: dict[str, Any]) -> dict[str, Any]:
        """What a component's properties are in a language; several words are choices."""
        return {
            key: said_in[word] if isinstance(word, str) else [(said_in[each], each) for each in word]
            for key, word in worded.items()
        }

    def slider(self, word: str, low: float, high: float, value: float, step: float, **how: Any) -> gr.Slider:
        """A slider labelled with a word, from low to high."""
        how = {"elem_id": word, "buttons": [], "worded": {"label": word}} | how
        high = max(high, low + step)  # Gradio takes none that cannot be moved; more than may be is cut down to that
        return self.add(gr.Slider, low, high, value, step=step, **how)

    def build(self) -> gr.Blocks:
        quiet = {"show_progress": "hidden", "concurrency_limit": None, "api_visibility": "private"}
        anew = quiet | {"trigger_mode": "multiple"}  # of two that are asked for, the second one ends the first
        soon = {"show_progress": "hidden", "queue": False, "api_visibility": "private"}  # however many write
        with gr.Blocks(title=f"微GPT · {self.name}", analytics_enabled=False) as blocks:
            lang = gr.BrowserState("", storage_key="weigpt-language", secret="none")
            with gr.Row(elem_id="head"):
                gr.HTML(f"<h1>微GPT · {escape(self.name)}</h1>")
                switch = self.add(gr.Button, size="sm", elem_id="switch", worded={"value": "switch"})
            tabs = []
            if isinstance(self.tokenizer, ChatTokenizer):
                with self.add(gr.Tab, worded={"label": "talk_tab"}) as talk_tab:
                    self.talk = Talk(self, lang, anew, soon)
                tabs.append(talk_tab)
            with self.add(gr.Tab, worded={"label": "write_tab"}) as write_tab:
                self.build_writing(lang, anew, soon)
            with self.add(gr.Tab, worded={"label": "tokens_tab"}) as tokens_tab:
                self.build_tokens(lang, quiet, anew)
            with self.add(gr.Tab, worded={"label": "run_tab"}) as run_tab:
                timer, look = self.build_run(lang, quiet)
            run_tab.select(lambda: gr.Timer(active=True), None, timer, **soon)
            run_tab.select(**look)
            for tab in (*tabs, write_tab, tokens_tab):
                tab.select(lambda: gr.Timer(active=False), None, timer, **soon)
            parts = [component for component, _ in self.worded]
            begun = blocks.load(self.begin, lang, [lang, *parts], **soon)
            switched = switch.click(self.switch, lang, [lang, *parts], **soon)
            for event in (begun, switched):
                event.then(None, lang, None, js=TOLD)
                if tabs:
                    event.then(self.talk.look, [self.talk.messages, lang], self.talk.shown, **soon)
            switched.then(**look)
            blocks.unload(self.leave)
        blocks.max_threads += self.engine.max_rows + self.engine.max_waiting  # events at a time: who writes is one
        blocks.queue()
        return blocks

    def build_writing(self, lang: Any, anew: dict[str, Any], soon: dict[str, Any]) -> None:
        with gr.Row():
            with gr.Column(scale=2, elem_id="left"):
                with gr.Column(elem_id="asked"):
                    title = self.add(
                        gr.Textbox, elem_id="title", max_length=200, visible=has_title(self.template),
                        worded={"label": "title", "placeholder": "title_hint"},
                    )  # fmt: skip
                    opening = self.add(
                        gr.Textbox, elem_id="opening", lines=3, max_lines=10,
                        worded={"label": "opening", "placeholder": "opening_hint"},
                    )  # fmt: skip
                    with gr.Row():
                        button = {"kind": gr.Button, "min_width": 100}
                        write = self.add(**button, variant="primary", elem_id="write", worded={"value": "write"})
                        stop = self.add(**button, variant="stop", elem_id="stop", worded={"value": "stop"})
                with gr.Column(elem_id="settings"):
                    settings = [
                        self.slider("length", 1, self.max_tokens, min(32, self.max_tokens), 1),
                        self.slider("top_k", 0, 200, 3, 1),
                        self.slider("top_p", 0.01, 1, 0.95, 0.01),
                        self.slider("temperature", 0, 2, 1, 0.05),
                        self.slider("penalty", 1, 2, 1, 0.05),
                        self.add(
                            gr.Number,
                            -1,
                            precision=0,
                            minimum=-1,
                            maximum=2**53,
                            elem_id="seed",
                            worded={"label": "seed"},
                        ),
                    ]
                    samples = self.slider("samples", 1, self.samples, 1, 1, visible=self.samples > 1)
            with gr.Column(scale=3, elem_id="answer"):
                status = gr.HTML(said(""), elem_id="status")
                groups, stories = [], []
                for k in range(1, self.samples + 1):
                    with gr.Group(visible=k == 1) as group:
                        story = self.add(
                            gr.Textbox, lines=9, max_lines=24, elem_id=f"story-{k}",
                            worded={"label": f"story_{k}", "placeholder": "story_hint"},
                        )  # fmt: skip
                        with gr.Row():
                            # Gradio's own copy button takes the box's label, and the box has none for a screen reader
                            copy = self.add(**button, size="sm", elem_id=f"copy-{k}", worded={"value": "copy"})
                            go_on = self.add(**button, size="sm", elem_id=f"go-on-{k}", worded={"value": "go_on"})
                    groups.append(group), stories.append(story)
                    copied = copy.click(None, story, None, js=COPY.replace("BOX", f"#story-{k} textarea"))
                    copied.then(partial(self.copied, f"story_{k}"), lang, status, **soon)
                    go_on.click(self.go_on, [lang, story, *settings], [status, story], **anew)
        asked = [lang, title, opening, samples, *settings]
        for event in (write.click, title.submit):
            event(self.write, asked, [status, *groups, *stories], **anew)
        stop.click(self.halt, **soon)
        self.first_story = stories[0]

    def build_tokens(self, lang: Any, quiet: dict[str, Any], anew: dict[str, Any]) -> None:
        text = self.add(gr.Textbox, lines=4, max_lines=12, elem_id="text", worded={"label": "text"})
        with gr.Row():
            take = self.add(gr.Button, elem_id="take", worded={"value": "take"})
            show = self.add(gr.Button, variant="primary", elem_id="show", worded={"value": "show"})
        shown = gr.HTML(elem_id="tokens", container=True, padding=True)
        taken = take.click(lambda story: story, self.first_story, text, **quiet)
        taken.then(self.show, [lang, text], shown, **quiet)
        show.click(self.show, [lang, text], shown, **anew)

    def build_run(self, lang: Any, quiet: dict[str, Any]) -> tuple[gr.Timer, dict[str, Any]]:
        seen = gr.State(-1)
        summary = gr.HTML(elem_id="summary")
        against = self.add(gr.Radio, value=AXES[0], elem_id="against", worded={"label": "against", "choices": AXES})
        how = {"x": "x", "y": "y", "color": "curve", "tooltip": "all", "x_axis_format": "~s", "min_width": 280}
        how["color_map"] = {words(each)[word]: color for each in ("zh", "en") for word, color in COLORS.items()}
        plots = [gr.LinePlot(**how, height=360, elem_id="loss")]
        with gr.Row():
            plots.append(gr.LinePlot(**how, height=240, elem_id="lr", y_axis_format=".3~g"))
            plots.append(gr.LinePlot(**how, height=240, elem_id="speed"))
        samples = gr.HTML(elem_id="drawn")
        timer = gr.Timer(LOOK, active=False)
        outputs = [seen, summary, *plots, samples]
        timer.tick(self.look, [lang, against, seen], outputs, **quiet)
        look = quiet | {"fn": self.look_anew, "inputs": [lang, against], "outputs": outputs}
        against.change(**look)

        def zoom(event: gr.SelectData) -> list[gr.LinePlot]:
            return [gr.LinePlot(x_lim=list(event.index)) for _ in plots]

        for plot in plots:
            plot.select(zoom, None, plots, **quiet)
            plot.double_click(lambda: [gr.LinePlot(x_lim=None) for _ in plots], None, plots, **quiet)
        return timer, look

    # ---- the languages

    def begin(self, stored: str, request: gr.Request) -> list[Any]:
        """A page opens: in the language that was switched to before, else the browser's, which its parts have."""
        browsers = "zh" if request.headers.get("accept-language", "").lower().startswith("zh") else "en"
        return self.say_in(stored or browsers)

    def switch(self, lang: str) -> list[Any]:
        return self.say_in("en" if lang == "zh" else "zh")

    def say_in(self, lang: str) -> list[Any]:
        """For the language, and for each part that says something."""
        said_in = words(lang)
        updates = [gr.update(**self.properties(worded, said_in)) for _, worded in self.worded]
        return [lang, *updates]

    # ---- the work

    @contextmanager
    def job(self, work: Work, request: gr.Request, rows: int = 1) -> Iterator[Job]:
        """The work of this page, in place of what it did before."""
        self.stop(request)
        with self.engine.submit(work, rows) as job:
            self.jobs[request.session_hash] = job
            try:
                yield job
            finally:
                if self.jobs.get(request.session_hash) is job:
                    del self.jobs[request.session_hash]

    async def halt(self, request: gr.Request) -> None:
        """Ends the page's work: no token more."""
        self.stop(request)

    async def leave(self, request: gr.Request) -> None:
        """A page is closed."""
        self.stop(request)
        if turn := self.turns.pop(request.session_hash, None):
            turn.set()
        self.filling.pop(request.session_hash, None)

    def stop(self, request: gr.Request) -> None:
        if job := self.jobs.get(request.session_hash):
            job.stop()

    async def write(
        self, request: gr.Request, lang: str, title: str, opening: str, samples: int, *settings: float | None
    ) -> AsyncIterator[list[Any]]:
        """Several texts with the same beginning."""
        n = min(max(int(samples), 1), self.samples)
        start = (titled(self.template, title) if title else "") + opening
        shown = [gr.Group(visible=k < n) for k in range(self.samples)]
        async for status, texts in self.written(lang, [start] * n, 0, settings, request):
            yield [status, *shown, *texts, *[gr.skip()] * (self.samples - n)]
            shown = [gr.skip()] * self.samples

    async def go_on(
        self, request: gr.Request, lang: str, text: str, *settings: float | None
    ) -> AsyncIterator[list[Any]]:
        """A text that is there, and more of it."""
        # another sample number than the beginning's, or the same draws would come again
        async for status, texts in self.written(lang, [text], 1 + len(text), settings, request):
            yield [status, *texts]

    def copied(self, story: str, lang: str) -> str:
        return said(words(lang)["copied"].format(story=words(lang)[story]), ended=True)

    async def written(
        self, lang: str, prompts: list[str], first: int, settings: Sequence[float | None], request: gr.Request
    ) -> AsyncIterator[tuple[str, list[Any]]]:
        """What to show while texts grow: the status, and each text where it has changed. Row k is sample first + k."""
        length, top_k, top_p, temperature, penalty, seed = settings

        def sampling() -> Sampling:
            return Sampling(
                max_new_tokens=min(int(length), self.max_tokens), top_k=int(top_k), top_p=top_p,
                temperature=temperature, repetition_penalty=penalty,
                seed=secrets.randbelow(10**6) if seed is None or seed < 0 else int(seed),
            )  # fmt: skip

        ids = partial(beginning, self.tokenizer, prompts[0])
        async for shown in self.turn(request, self.growing(request, lang, prompts, ids, sampling, first)):
            yield shown

    async def turn(self, request: gr.Request, growing: AsyncGenerator[Any]) -> AsyncIterator[Any]:
        """What grows, until the page's next turn."""
        page, turn = request.session_hash, asyncio.Event()
        if before := self.turns.get(page):
            before.set()
        self.turns[page] = turn
        self.stop(request)
        # what the turn before has said must have reached the page before this one says anything
        async with self.filling.setdefault(page, asyncio.Lock()), aclosing(growing):
            async for shown in growing:
                if turn.is_set():  # the page is the next one's by now
                    return
                yield shown
        with suppress(TimeoutError):
            await asyncio.wait_for(turn.wait(), LINGER)

    async def growing(
        self, request: gr.Request, lang: str, starts: Sequence[str], ids: Callable[[], list[int]],
        sampling: Callable[[], Sampling], first: int = 0,
    ) -> AsyncGenerator[tuple[str, list[Any]]]:  # fmt: skip
        """Texts that begin with `starts` and go on from the same `ids`: the status, and each where it has changed."""
        said_in, texts, begun, tokens = words(lang), list(starts), time.perf_counter(), 0
        unchanged = [gr.skip()] * len(texts)
        try:
            drawn = sampling()
            unseen, grown, due = "", set(), begun

            def figures() -> str:
                seconds = time.perf_counter() - begun
                return said_in["figures"].format(seconds=seconds, tokens=tokens, seed=drawn.seed) + unseen

            def work(_) -> Generator[int, None, Rows]:
                prompt = ids()
                yield len(prompt)
                return Rows([prompt] * len(texts), drawn, first)

            with self.job(work, request, len(texts)) as job:
                yield said(said_in["running"] + figures()), list(texts)
                async for batch in job.batches(EVERY):
                    if batch and isinstance(batch[0], int):
                        read = batch.pop(0)
                        unseen = said_in["unseen"].format(context=self.context) if read > self.context else ""
                    grown |= {piece.row for piece in batch}
                    for piece in batch:
                        texts[piece.row] += piece.text
                        tokens += len(piece.tokens)
                    if time.perf_counter() < due:
                        continue
                    now = said_in["running"] + figures()
                    if job.begun is None:
                        ahead, seconds = self.engine.ahead(job), time.perf_counter() - begun
                        now = said_in["waiting"].format(ahead=ahead, seconds=seconds)
                    yield said(now), [texts[k] if k in grown else gr.skip() for k in range(len(texts))]
                    grown, due = set(), time.perf_counter() + DRAW * sum(map(len, texts))
                ended = said_in["stopped" if job.stopped.is_set() else "done"]
            yield said(ended + figures(), ended=True), list(texts)
        except Exception as error:
            yield said(reason(error, said_in), ended=True), unchanged
        # Gradio says once more what came last when the event is closed, and by then a text may have been edited
        yield gr.skip(), unchanged

    async def show(self, request: gr.Request, lang: str, text: str) -> str:
        """HTML of a text's tokens in the colours of their probabilities."""
        said_in = words(lang)

        def work(_) -> Iterator[tuple[list[Token], bool]]:
            ids, end = self.tokenizer.encode_prompt(text).tolist(), self.tokenizer.end_of_text
            # what begins a text is what ended the one before
            shown, before = ids[-SCORED:], ids[-SCORED - self.context : -SCORED] or ([] if end is None else [end])
            tokens = score(self.model, before + shown, ALTERNATIVES, self.tokenizer.vocab_size)
            yield tokens[-len(shown) :] if before else [Token(shown[0]), *tokens], len(ids) > SCORED

        try:
            with self.job(work, request) as job:
                results = [result async for result in job] if text else []
        except Exception as error:
            return said(reason(error, said_in), ended=True)
        if not results:  # nothing to show, or the page's next work came before this one's turn
            return gr.skip() if text else ""
        [(tokens, is_cut)] = results
        note = said_in["cut"].format(shown=SCORED) if is_cut else ""
        return await asyncio.to_thread(coloured, tokens, self.tokenizer, said_in, note)

    # ---- the run

    async def look_anew(self, lang: str, against: str) -> list[Any]:
        return await self.look(lang, against, -1)

    async def look(self, lang: str, against: str, seen: int) -> list[Any]:
        """The run's curves and samples, if there is anything that this page has not seen."""
        return await asyncio.to_thread(self.shown_run, lang, against, seen)

    def shown_run(self, lang: str, against: str, seen: int) -> list[Any]:
        with self.reading:  # the log is one, the pages are many
            try:
                self.version += self.history.refresh()
            except OSError as error:
                tell(f"warning: {self.history.path}: {error.strerror}")
            if self.version == seen:
                return [gr.skip()] * 6
            return [self.version, *self.drawn_run(words(lang), against)]

    def drawn_run(self, said_in: dict[str, str], against: str) -> list[Any]:
        """The summary, three plots, and the samples along the way."""
        curve, x_title = self.history.curve, said_in[against]
        losses = [frame(curve(key, against), said_in[word]) for key, word in (("loss", "train"), ("val_loss", "val"))]
        plots = [gr.LinePlot(pd.concat(losses), x_title=x_title, y_title=said_in["loss"], color_title=" ")]
        for key, word in (("lr", "lr"), ("tokens_per_second", "speed")):
            of_one = frame(curve(key, against), said_in[word])
            plots.append(gr.LinePlot(of_one, x_title=x_title, y_title=said_in[word], color_title=" "))
        steps, val = curve("loss")[0], curve("val_loss")[1]
        about = said_in["no_log"]
        if len(steps) + len(val):
            newest = int(max([*steps[-1:], *curve("val_loss")[0][-1:]]))
            best = f"{val.min():.4f}" if len(val) else "–"
            about = said_in["newest"].format(step=f"{newest:,}", best=best) + f" · {said_in['zoom_hint']}"
        drawn = ""
        for sample in reversed(self.history.samples[-DRAWN:]):
            at = said_in["drawn_at"].format(iter=f"{sample.iter:,}")
            drawn += f'<div class="drawn"><b>{at}</b>\n{escape(sample.text)}</div>'
        samples = f"<h3>{said_in['drawn']}</h3>{drawn}" if drawn else ""
        return [said(about, ended=True), *plots, samples]


def frame(curve: tuple[Any, Any], name: str) -> pd.DataFrame:
    """A curve as LinePlot wants it."""
    x, y = thinned(*curve)
    return pd.DataFrame({"x": x, "y": y, "curve": name})


def reason(error: Exception, said_in: dict[str, str]) -> str:
    """Why there is no text, in words for whoever is at the page."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, Refused):
        return said_in["full" if isinstance(error, Full) else "closing"].format(wait=error.retry_after)
    tell("".join(traceback.format_exception(error)))
    return said_in["failed"]

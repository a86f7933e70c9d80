"""The page's conversation, with a model that was trained on some.

Notable choices:
- A message is text, whatever it looks like: nothing in it is rendered.
- A conversation belongs to its page, and what the model has said of an answer that was cut short belongs to it.
- The model reads as much of it as leaves room for an answer in its context, the newest.
"""

import secrets
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import gradio as gr

from chat import Message
from generate import Sampling
from markup import said, talked
from words import words

if TYPE_CHECKING:
    from page import Page


class Talk:
    """The parts of the conversation's tab and what they do."""

    def __init__(self, page: "Page", lang: Any, anew: dict[str, Any], soon: dict[str, Any]):
        """To be called within the tab."""
        self.page = page
        self.messages = gr.State([])  # of each page, changed in place
        with gr.Row():
            with gr.Column(scale=3, elem_id="talk"):
                self.shown = gr.HTML(elem_id="talked")
                status = gr.HTML(said(""), elem_id="talk-status")
                question = page.add(
                    gr.Textbox, lines=1, max_lines=8, elem_id="question",
                    worded={"label": "question", "placeholder": "question_hint"},
                )  # fmt: skip
                with gr.Row():
                    button = {"kind": gr.Button, "min_width": 100}
                    send = page.add(**button, variant="primary", elem_id="send", worded={"value": "send"})
                    stop = page.add(**button, variant="stop", elem_id="talk-stop", worded={"value": "stop"})
                    again = page.add(**button, elem_id="again", worded={"value": "again"})
                    begin = page.add(**button, elem_id="new-talk", worded={"value": "new_talk"})
            with gr.Column(scale=1, min_width=280):
                most = min(page.context, page.max_tokens)
                settings = [
                    page.slider("length", 1, most, most, 1, elem_id="talk-length"),
                    page.slider("temperature", 0, 2, 0.7, 0.05, elem_id="talk-temperature"),
                    page.slider("top_p", 0.01, 1, 0.95, 0.01, elem_id="talk-top_p"),
                ]
        for event in (send.click, question.submit):
            event(self.ask, [self.messages, lang, question, *settings], [status, self.shown, question], **anew)
        again.click(self.answer, [self.messages, lang, *settings], [status, self.shown], **anew)
        begin.click(self.begin, [self.messages, lang], [status, self.shown], **soon)
        stop.click(page.halt, **soon)

    def look(self, messages: list[Message], lang: str) -> str:
        """HTML of the conversation in a language."""
        return talked(messages, words(lang))

    async def begin(self, request: gr.Request, messages: list[Message], lang: str) -> list[str]:
        """A new conversation."""
        self.page.stop(request)
        messages.clear()
        return [said(""), self.look(messages, lang)]

    async def ask(
        self, request: gr.Request, messages: list[Message], lang: str, question: str, *settings: float
    ) -> AsyncIterator[list[Any]]:
        """A question joins the conversation, and its answer as it grows."""
        if not question.strip():
            yield [gr.skip()] * 3
            return
        messages.append({"role": "user", "content": question.strip()})
        box = ""  # once; what is typed after that is the next question
        async for shown in self.answer(request, messages, lang, *settings):
            yield [*shown, box]
            box = gr.skip()

    async def answer(
        self, request: gr.Request, messages: list[Message], lang: str, length: float, temperature: float, top_p: float
    ) -> AsyncIterator[list[Any]]:
        """The answer to the newest question, in place of one that is there."""
        page, said_in = self.page, words(lang)
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        asked = [message for message in messages if message["content"]]  # not what was stopped before a word was said
        if not asked:
            yield [gr.skip()] * 2
            return

        def sampling() -> Sampling:
            return Sampling(
                min(int(length), page.max_tokens), temperature=temperature, top_p=top_p,
                seed=secrets.randbelow(10**6), stop=list(page.tokenizer.special),
            )  # fmt: skip

        def ids() -> list[int]:
            return page.tokenizer.opening(asked, page.context - max(1, min(int(length), page.context // 2)))

        answer = {"role": "assistant", "content": ""}
        messages.append(answer)
        async for status, [text] in page.turn(request, page.growing(request, lang, [""], ids, sampling)):
            if isinstance(text, str):
                answer["content"] = text
            yield [status, talked(messages, said_in) if isinstance(status, str) else gr.skip()]

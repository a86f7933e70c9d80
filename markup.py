"""HTML for the page: lines of text, conversations, and tokens on the colours of their probabilities."""

import math
from html import escape

from generate import Token
from tokenizer import Tokenizer

SHADES = (0.5, 0.2, 0.05, 0.01)  # a token that is at least this probable has the class p0, p1, ...; else p4


def said(text: str, ended: bool = False) -> str:
    """HTML of a line; while it still counts, a screen reader does not see it."""
    hidden = "" if ended else ' aria-hidden="true"'
    return f'<p class="status"{hidden}>{escape(text)}</p>'


def talked(messages: list[dict[str, str]], said_in: dict[str, str]) -> str:
    """HTML of a conversation. The last message is left open: while it grows, Gradio sends what is new alone."""
    if not messages:
        return f'<p class="hint">{escape(said_in["talk_hint"])}</p>'
    shown = [
        f'<div class="message {message["role"]}"><b>{said_in["you" if message["role"] == "user" else "model"]}</b>'
        f"<div>{escape(message['content']) or '…'}"
        for message in messages
    ]
    return '<div class="messages">' + "</div></div>".join(shown)


def percent(logprob: float) -> str:
    p = 100 * math.exp(logprob)
    return f"{p:.0f}%" if p >= 10 else f"{p:.1f}%" if p >= 0.1 else f"{p:.2f}%" if p >= 0.01 else "<0.01%"


def coloured(tokens: list[Token], tokenizer: Tokenizer, said_in: dict[str, str], note: str) -> str:
    """HTML of tokens on the colours of their probabilities, each with what the model would rather have written."""

    def piece(id: int) -> str:
        return tokenizer.pieces([id])[0].replace("\n", "↵").replace("\t", "⇥")

    parts, nats = [], [-token.logprob for token in tokens if token.logprob is not None]
    for token in tokens:
        text, shade, about = piece(token.id), "none", said_in["first"]
        if token.logprob is not None:
            p = math.exp(token.logprob)
            shade = f"p{next((k for k, least in enumerate(SHADES) if p >= least), len(SHADES))}"
            rank = next((k for k, (id, _) in enumerate(token.top, 1) if id == token.id), 0)
            about = said_in["likelier" if rank else "rare"].format(
                percent=percent(token.logprob), rank=rank, shown=len(token.top)
            )
        rather = "".join(f"<span>{escape(f'{piece(id)} {percent(logprob)}')}</span>" for id, logprob in token.top)
        label = escape(f"{text}: {about}", quote=True)
        parts.append(
            f'<button type="button" class="token {shade}" aria-label="{label}">{escape(text)}'
            f'<span class="rather"><b>{label}</b> {rather}</span></button>' + "\n" * text.count("↵")
        )
    legend = "".join(
        f'<span class="token p{k}"> {">" if k < len(SHADES) else "<"} {SHADES[min(k, len(SHADES) - 1)]:.0%} </span> '
        for k in range(len(SHADES) + 1)
    )
    mean = sum(nats) / len(nats) if nats else 0.0
    about = said_in["surprise"].format(nats=mean, perplexity=math.exp(mean)) if nats else ""
    return f'<p>{legend} {about}</p><p>{said_in["scored_hint"]} {note}</p><div class="tokens">{"".join(parts)}</div>'

"""A conversation that goes on from its stream.

session = model.start()
session.send("Why is the sky blue?", iterations=4)
session.chat("And at night?", iterations=2)
"""

from __future__ import annotations

from typing import Any

import torch

from sst_interp.errors import SSTError
from sst_interp.models.choices import whole
from sst_interp.models.generation import Generation, Lanes, check_room
from sst_interp.models.halting import depths_of, schedule_of
from sst_interp.models.prompts import only
from sst_interp.models.solvers import prefill
from sst_interp.models.stream import Stream


class Session:
    """A conversation that goes on from its stream: nothing is read twice.

    What is sent is read as a prompt, at depth 1; what is written is iterated. The last token of an answer is
    read with what follows it. A session equals one replay of the whole, `session.tokens[:-1]`, at the depths
    of its positions, `session.depths`.
    """

    def __init__(self, model: Any, prompt: Any = ()) -> None:
        self.model = model
        self.begun = model.encode(only(prompt))
        """What the first answer reads before what is sent."""
        self.tokens: list[int] = []
        """The whole text so far."""
        self.depths: list[int] = []
        """The depth of every token that has been read: of all but the last."""
        self.turns: list[dict[str, str]] = []
        """The conversation so far, as a chat template takes it."""
        self.stream: Stream | None = None

    def send(
        self, prompt: Any, iterations: int = 1, max_new_tokens: int = 64, depth: Any = None, **how: Any
    ) -> Generation:
        """Read a text (as it is) or token ids, and write on from there.

        Args:
            depth: instead of `iterations`, as for `model.generate`; position 0 is the answer's first.
            how: `stop_tokens`, `stop`, `temperature`, `top_p`, `top_k`, `seed`, as for `model.generate`.

        Raises:
            SSTError: as `model.generate`; the session is as it was then.
        """
        model, prompt = self.model, only(prompt)
        text = isinstance(prompt, str)
        later = text and (self.tokens or self.begun)
        new = [*self.begun, *(model.encode_plain(prompt) if later else model.encode(prompt))]
        tokens, pad = model.batch([self.tokens[-1:] + list(new)])
        depths = depths_of(model, iterations, depth, 1)
        max_new_tokens = whole("max_new_tokens", max_new_tokens, 1)
        check_room(model, len(self.tokens) + len(new), max_new_tokens)
        stop, sampling = model.endings(**how), model.sampling(**how)
        known = max(0, len(self.tokens) - 1)
        stream = model.new_stream(pad, 0) if self.stream is None else self.stream.repeat(1)
        stream.kv.make_room(known + tokens.shape[1] + max_new_tokens)
        certificate = prefill(model, stream, tokens[:, :-1])
        whole_text = self.tokens + list(new)
        draws = None if sampling is None else sampling.draws([whole_text], [0])
        order = torch.zeros(1, dtype=torch.long, device=tokens.device)
        schedule = schedule_of(depths)
        fixed: Any = [1] if schedule is not None else depths
        lanes = Lanes(stream, tokens[:, -1], fixed, order, certificate, stop, sampling, draws, schedule)
        with torch.no_grad():
            for _ in lanes.write(model, max_new_tokens):
                pass
        self.begun, self.stream, self.tokens = [], lanes.stream, whole_text + lanes.new[0]
        self.depths += [1] * (tokens.shape[1] - 1) + lanes.spent[0]
        return model.with_texts(lanes.texts([0]), stop)

    def chat(self, message: str, **how: Any) -> Generation:
        """Send a user's message in the tokenizer's chat template; the arguments are those of `send`.

        Raises:
            SSTError: the template does not go on from the text so far.
        """
        tokenizer, turns = self.model.tokenizer, [*self.turns, {"role": "user", "content": message}]
        if not self.tokens:
            out = self.send(self.model.chat(message), **how)
        else:
            rendered = self.model.render(turns)
            so_far = tokenizer.decode(self.tokens, skip_special_tokens=False)
            if not rendered.startswith(so_far):
                raise SSTError(
                    "the chat template does not go on from the text so far",
                    "send the next turn as text or token ids: session.send(...)",
                )
            out = self.send(self.model.encode_plain(rendered[len(so_far) :]), **how)
        self.turns = [*turns, {"role": "assistant", "content": (out.texts or [""])[0]}]
        return out

r"""A model with a state stream in lm-evaluation-harness: any task, at any depth.

    python -m sst_interp.bridges.lm_eval --model sst-interp \
        --model_args checkpoint=smollm2-135m-sst,iterations=4 --tasks arc_easy

This is the harness's own command `lm_eval`, with all its options. The harness knows the models of its own
package and those of modules that are imported; it has no entry points for others. So this module registers
the model, then hands over. In Python `import sst_interp.bridges.lm_eval` does the same.

The prompt is read at depth 1 up to its last token, and every position from there on at the depth asked for,
as `model.loglikelihood` and `model.generate` do.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from inspect import signature
from typing import Any

import torch
from jinja2 import TemplateError
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from sst_interp.bridges import for_harness
from sst_interp.errors import SSTError
from sst_interp.models.choices import whole
from sst_interp.models.generation import look_ahead
from sst_interp.models.halting import HaltingPolicy
from sst_interp.models.likelihood import LogLikelihood, longest_of, score
from sst_interp.models.model import StateStreamModel
from sst_interp.models.solvers import prefill

SAMPLING = ("temperature", "top_p", "top_k", "min_p", "seed")
"""Options that mean nothing where the likeliest token is taken."""
AUTO, LONGEST = 16, 2048
"""Prompts at once for `batch_size=auto`; tokens of a context whose length the model does not say."""

Context = tuple[int, ...]


@register_model("sst-interp")
class StateStreamLM(TemplateLM):
    """The harness's view of a model: log-likelihoods and texts, at one depth or as a policy picks it.

    The depth of each request is logged with its arguments, as `{"iterations": 4}` (a list for a text that is
    read in several windows).

    Args:
        checkpoint: what `sst.load` takes, or a model in memory.
        iterations, halting, threshold, deepest: the depth; see `sst_interp.bridges.for_harness`.
        batch_size: prompts that are read at once; `auto` is 16.
        max_batch_size: the most that `auto` may take.
        max_length: tokens of a prompt and its continuation; longer prompts lose their beginning. None is
            the model's own.
        max_gen_toks: token budget of a text, where the task gives none.
        how: of `sst.load`: `alpha`, `dtype`, `device`, `kind`, `trust_remote_code`.

    Raises:
        SSTError: what cannot be loaded, a model without a tokenizer, an unknown option.
    """

    def __init__(
        self,
        checkpoint: str | StateStreamModel,
        iterations: int = 1,
        halting: str | None = None,
        threshold: float | None = None,
        deepest: int = 4,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        **how: Any,
    ) -> None:
        super().__init__()
        if "cuda" in str(how.get("device")) and not torch.cuda.is_available():
            del how["device"]  # the harness's default, whatever the machine has
        self.model, self.depth = for_harness(checkpoint, iterations, halting, threshold, deepest, **how)
        if self.model.tokenizer is None:
            raise SSTError(f"{self.model.name} has no tokenizer", "attach(model, tokenizer)")
        self.tokenizer = self.model.tokenizer
        self._device = self.model.backbone.device
        auto = str(batch_size).startswith("auto")
        most = AUTO if max_batch_size is None else whole("max_batch_size", max_batch_size, 1)
        self.batch_size = min(AUTO, most) if auto else whole("batch_size", _number(batch_size), 1)
        limit = self.model.backbone.max_length or max_length or LONGEST
        self.max_length = limit if max_length is None else whole("max_length", max_length, 2, limit)
        self.max_gen_toks = min(whole("max_gen_toks", max_gen_toks, 1), self.max_length - 1)
        self.spent: list[int] = []
        """The depth of each request of the last call."""

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token that stands before a text without context."""
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else begin

    @property
    def tokenizer_name(self) -> str:
        """A name for the harness's cache of requests."""
        return self.tokenizer.name_or_path.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids of a text. A text that begins with the prefix token gets no second one."""
        if add_special_tokens is None and string.startswith(self.tokenizer.decode(self.prefix_token_id)):
            add_special_tokens = False
        return (
            self.model.encode(string) if add_special_tokens is not False else self.model.encode_plain(string)
        )

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The conversation as the tokenizer writes it; without the system's turn if it knows none."""
        how = {"add_generation_prompt": add_generation_prompt}
        how |= {"tokenize": False, "continue_final_message": not add_generation_prompt}
        try:
            return self.tokenizer.apply_chat_template(chat_history, **how)
        except TemplateError:
            turns = [turn for turn in chat_history if turn["role"] != "system"]
            return self.tokenizer.apply_chat_template(turns, **how)

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes beside the results."""
        policy = isinstance(self.depth, HaltingPolicy)
        return {
            "sst_interp": version("sst-interp"),
            "checkpoint": self.model.name,
            "kind": str(self.model.kind),
            "choices": self.model.choices.to_dict(),
            "model_dtype": str(self.model.backbone.dtype),
            "halting": str(self.depth) if policy else None,
            "iterations": None if policy else self.depth,
        }

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-probability in nats, whether greedy generation would write it) of each continuation."""
        answers = super().loglikelihood(requests, disable_tqdm)
        _log(requests, self.spent)
        return answers

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """The same of token ids. Requests with one context are read together, those alike in length too."""
        asked: dict[Context, list[int]] = {}
        for i, (_, context, after) in enumerate(requests):
            if len(after) > self.max_length:
                raise SSTError(
                    f"a continuation of {len(after)} tokens exceeds {self.max_length}", "shorten the text"
                )
            kept = context[-(self.max_length + 1 - len(after)) :]
            asked.setdefault(tuple(kept), []).append(i)
        answers: list[tuple[float, bool]] = [(float("nan"), False)] * len(requests)
        self.spent = [0] * len(requests)
        with tqdm(total=len(requests), disable=disable_tqdm, desc="Log-likelihoods") as bar:
            for batch in self._batches(asked, requests):
                after = [[requests[i][2] for i in asked[context]] for context in batch]
                for depth, rows, out in self._read(batch, after):
                    scored = [i for row in rows for i in asked[batch[row]]]
                    for i, total, greedy in zip(
                        scored, out.sums[0].tolist(), out.greedy[0].tolist(), strict=True
                    ):
                        answers[i], self.spent[i] = (total, greedy), depth
                        if requests[i][0] is not None:
                            self.cache_hook.add_partial("loglikelihood", requests[i][0], answers[i])
                    bar.update(len(scored))
        return answers

    def _batches(
        self, asked: dict[Context, list[int]], requests: Sequence[tuple[Any, list[int], list[int]]]
    ) -> Iterator[list[Context]]:
        """Contexts that are read together, longest first; each batch fits the model's context."""
        batch: list[Context] = []
        longest = 0
        for context in sorted(asked, key=len, reverse=True):
            here = max(len(requests[i][2]) for i in asked[context])
            fits = not batch or len(batch[0]) + max(longest, here) - 1 <= self.max_length
            if len(batch) == self.batch_size or not fits:
                yield batch
                batch, longest = [], 0
            batch.append(context)
            longest = max(longest, here)
        if batch:
            yield batch

    @torch.no_grad()
    def _read(
        self, contexts: list[Context], after: list[list[list[int]]]
    ) -> Iterator[tuple[int, list[int], LogLikelihood]]:
        """Each depth, the contexts that got it, and the log-likelihoods of their continuations."""
        model, depth = self.model, self.depth
        tokens, pad = model.batch(contexts)
        stream = model.new_stream(pad, tokens.shape[1] + longest_of(after) - 1)
        prefill(model, stream, tokens[:, :-1])
        if isinstance(depth, HaltingPolicy):
            depths = depth.depths(look_ahead(model, stream, tokens[:, -1], depth.looks)).tolist()
        else:
            depths = [depth] * len(contexts)
        for each in sorted(set(depths)):
            rows = [row for row, chosen in enumerate(depths) if chosen == each]
            at = torch.tensor(rows, device=tokens.device)
            some = stream if len(rows) == len(contexts) else stream.take(at)
            yield each, rows, score(model, some, tokens[at, -1], [after[row] for row in rows], [each])

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each whole text, in windows of `max_length` that share no token."""
        windows = []
        for row, request in enumerate(requests):
            pairs = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            windows += [(row, None, *make_disjoint_window(pair)) for pair in pairs]
        scored = self._loglikelihood_tokens([window[1:] for window in windows], disable_tqdm)
        sums = [0.0] * len(requests)
        depths: list[list[int]] = [[] for _ in requests]
        for (row, *_), (total, _), depth in zip(windows, scored, self.spent, strict=True):
            sums[row] += total
            depths[row].append(depth)
        for request, total in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        _log(requests, [each[0] if len(each) == 1 else each for each in depths])
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The text that follows each prompt, up to the first of the task's stop strings."""
        given: list[Any] = [request.args for request in requests]
        seeds = _times_before([repr(args[:2]) for args in given])
        alike: dict[str, list[int]] = {}
        for i, (_, asked, *_) in enumerate(given):
            alike.setdefault(repr(asked), []).append(i)
        texts, depths = [""] * len(requests), [0] * len(requests)
        with tqdm(total=len(requests), disable=disable_tqdm, desc="Texts") as bar:
            for chosen in alike.values():
                until, budget, options = self._options(given[chosen[0]][1])
                first = options.pop("seed", 0)
                read = {i: self.tok_encode(given[i][0]) or [self.prefix_token_id] for i in chosen}
                prompts = {i: ids[budget - self.max_length :] for i, ids in read.items()}
                order = sorted(chosen, key=lambda i, prompts=prompts: -len(prompts[i]))
                for begin in range(0, len(order), self.batch_size):
                    batch = order[begin : begin + self.batch_size]
                    if "temperature" in options:
                        options["seed"] = [first + seeds[i] for i in batch]
                    out = self.model.generate(
                        [prompts[i] for i in batch], depth=self.depth, max_new_tokens=budget, **options
                    )
                    for i, text, depth in zip(batch, out.texts or [], out.iterations, strict=True):
                        texts[i], depths[i] = postprocess_generated_text(text, until, None), depth
                        self.cache_hook.add_partial("generate_until", given[i], texts[i])
                    bar.update(len(batch))
        _log(requests, depths)
        return texts

    def _options(self, given: dict[str, Any]) -> tuple[list[str], int, dict[str, Any]]:
        """Stop strings, token budget, and what else `model.generate` is to be given."""
        options: dict[str, Any] = dict(normalize_gen_kwargs(given, self.max_gen_toks))
        until, budget = options.pop("until"), options.pop("max_gen_toks")
        budget = whole("max_gen_toks", budget, 1, self.max_length - 1)
        if options.pop("do_sample"):
            options.setdefault("temperature", 1.0)
        else:
            options = {name: value for name, value in options.items() if name not in SAMPLING}
        known = signature(self.model.generate).parameters
        for name in options:
            if name not in SAMPLING or name not in known:
                raise SSTError(f"generation option {name} is not supported", "leave it out of the task")
        options["stop"] = [string for string in until if string]
        return until, budget, options


def _number(value: int | str) -> Any:
    """A batch size that a command line gave as text."""
    return int(value) if isinstance(value, str) and value.isdecimal() else value


def _times_before(names: Sequence[str]) -> list[int]:
    """How often each name came before: repeats of a sampled request differ by it."""
    counts: dict[str, int] = {}
    before = []
    for name in names:
        before.append(counts.get(name, 0))
        counts[name] = before[-1] + 1
    return before


def _log(requests: Sequence[Instance], depths: Sequence[int | list[int]]) -> None:
    """Put the depth beside the arguments of each request: the harness logs these with the sample."""
    for request, depth in zip(requests, depths, strict=True):
        given = [each for each in request.args if not (isinstance(each, dict) and "iterations" in each)]
        request.arguments = (*given, {"iterations": depth})


def main() -> None:
    """The harness's command, with the model registered."""
    try:
        cli_evaluate()
    except SSTError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()

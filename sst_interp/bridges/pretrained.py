"""A model with a stream as transformers' own kind of model, for code that expects one.

    mine = as_pretrained(sst.load("smollm2-135m-sst"), iterations=4)
    mine.generate(**tokenizer("Why is the sky blue?", return_tensors="pt"), max_new_tokens=32)
    pipeline("text-generation", model=mine, tokenizer=tokenizer)

`generate` reads a prompt at depth 1 and iterates every generated position, as `model.generate` of sst-interp
does; sampling, stopping and streaming are transformers'. A call without `generate` iterates every position.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from sst_interp.errors import SSTError
from sst_interp.models.choices import check_iterations
from sst_interp.models.generation import decode
from sst_interp.models.model import StateStreamModel
from sst_interp.models.solvers import prefill
from sst_interp.models.stream import Stream


@dataclass
class StreamOutput(CausalLMOutput):
    """Logits, and where the text goes on from."""

    stream: Any = None


def as_pretrained(model: StateStreamModel, iterations: int = 1) -> PretrainedStream:
    """The model at one depth as a `PreTrainedModel`; it shares the weights.

    Raises:
        SSTError: iterations below 1.
    """
    return PretrainedStream(model, check_iterations([iterations])[0])


class PretrainedStream(PreTrainedModel, GenerationMixin):
    """A model with a stream at one depth. Padding is on the left; beams are refused."""

    main_input_name = "input_ids"
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, model: StateStreamModel, iterations: int) -> None:
        inner = model.backbone.model
        super().__init__(deepcopy(inner.config))  # transformers writes into it
        self.stream_model, self.iterations = model, iterations
        self.inner = inner
        own = getattr(inner, "generation_config", None)
        self.generation_config = own or GenerationConfig.from_model_config(inner.config)

    def get_input_embeddings(self) -> nn.Module:
        """The backbone's."""
        return self.inner.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        """The backbone's."""
        return self.inner.get_output_embeddings()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # the stream is what is carried

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        stream: Stream | None = None,
        writing: bool = False,
        **_options: Any,
    ) -> StreamOutput:
        """Logits [row, position, vocab]; while writing, of the last position alone.

        Args:
            input_ids: [row, position].
            attention_mask: 0 at padding on the left.
            stream: of the text before, while `generate` writes.
            writing: whether `generate` calls.

        Raises:
            SSTError: padding that is not on the left.
        """
        model = self.stream_model
        if input_ids.ndim != 2 or input_ids.is_floating_point():
            said = f"input_ids are of {str(input_ids.dtype)[6:]} and shape {list(input_ids.shape)}"
            raise SSTError(said, "give token ids [row, position]")
        if stream is not None:
            return self._next(stream, input_ids[:, -1])
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
        if bool((mask.diff(dim=1) < 0).any()) or not bool(mask[:, -1].all()):
            raise SSTError("padding on the right", 'tokenizer.padding_side = "left"')
        pad = (1 - mask).sum(1)
        if not writing:
            rows = [row[p:] for row, p in zip(input_ids.tolist(), pad.tolist(), strict=True)]
            found = model.replay(rows, self.iterations).logits
            assert found is not None
            logits = found.new_zeros(*input_ids.shape, found.shape[-1])
            for number, row in enumerate(rows):
                logits[number, -len(row) :] = found[number, : len(row), -1]
            return StreamOutput(logits=logits)  # type: ignore[arg-type]
        begun = model.new_stream(pad, input_ids.shape[1])
        prefill(model, begun, input_ids[:, :-1])
        return self._next(begun, input_ids[:, -1])

    @torch.no_grad()
    def _next(self, stream: Stream, tokens: Tensor) -> StreamOutput:
        """The next position of every row."""
        stream.kv.make_room(stream.column + 1 if stream.column < stream.kv.columns else 2 * stream.column)
        depths = torch.full((len(tokens),), self.iterations)
        logits = decode(self.stream_model, stream, tokens, depths)[2]
        return StreamOutput(logits=logits[:, None], stream=stream)  # type: ignore[arg-type]

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        """What `forward` takes at the next position."""
        kept = {key: kwargs.get(key) for key in ("attention_mask", "stream")}
        return {"input_ids": input_ids, "writing": True, **kept}

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: Any, *args: Any, **how: Any
    ) -> Any:
        kept = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **how)
        return {**kept, "stream": outputs.stream}

    def generate(self, *args: Any, **options: Any) -> Any:
        """Transformers' `generate`. Raises SSTError for beams: rows of a stream cannot change places."""
        config = options.get("generation_config") or self.generation_config
        if (options.get("num_beams") or config.num_beams or 1) > 1:
            raise SSTError("beam search moves texts between rows", "num_beams = 1")
        return super().generate(*args, **options)  # pyright: ignore[reportAttributeAccessIssue]

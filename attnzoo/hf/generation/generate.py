"""`attnzoo.hf.generate`: a prompt by the fused kernels, then one CUDA graph a token."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from attnzoo.hf.generation.build import Kind, cache_for
from attnzoo.hf.generation.cache import HeldCache
from attnzoo.hf.generation.choice import chooser
from attnzoo.hf.generation.graph import Step, refusal

_LOOK_EVERY = 16  # steps between looks at whether all rows have ended, each of which waits for the GPU


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    cache: Kind | HeldCache = "rolling",
    graph: bool | None = None,
    fuse: bool = False,
    streamer: BaseStreamer | None = None,
    **options: Any,
) -> Tensor:
    """Greedy decoding or sampling, as `model.generate` without beams; the choice of the next token is in the graph too.

    Padding is turned to the right for the prompt, so no S x S mask is made, and the tokens generated follow each row's
    own. Rows that have ended are filled with padding.

    Args:
        model: a decoder with attn_implementation="attnzoo", stock or swapped.
        input_ids: `[B, S]` int64.
        attention_mask: `[B, S]`, 0 at padding, which may be on either side; None: no padding.
        cache: a kind for `cache_for`, or an empty cache of it with room for S + max_new_tokens - 1 tokens a row. The
            default is the fastest that rounds nothing: windows alone where layers have one, everything elsewhere.
        graph: whether steps are captured; None: if that is possible. Without, each step launches what it needs.
        fuse: also compile norms, MLPs and rotations into one kernel each (`torch.compile`, some seconds at first use).
        streamer: of transformers; gets the prompt, then each step's tokens `[B]` as they are chosen. Every step then
            waits for the GPU.
        options: of the model's generation config: max_new_tokens or max_length, do_sample, temperature, top_k, top_p,
            min_p, eos_token_id, pad_token_id.

    Returns:
        `[B, S + n]`, the prompt as given and up to max_new_tokens tokens, as many as the longest row took.

    Raises:
        ValueError: for options that only `model.generate` has, a mask that is not 2-D padding, a cache that is too
            small or not empty, or `graph=True` where steps cannot be captured, with the reason.
    """
    config = copy.deepcopy(model.generation_config)
    unknown = config.update(**options)
    if unknown:
        raise ValueError(f"generate got options that a generation config does not have: {sorted(unknown)}")
    config = _with_defaults(config)
    choose = chooser(config)
    batch, width = input_ids.shape
    count = config.max_new_tokens
    if count is None:
        count = config.max_length - width
    if count < 1:
        raise ValueError(f"max_new_tokens is {count}; it must be at least 1")
    if isinstance(cache, str):
        cache = cache_for(model, batch, width + count, cache)
    elif cache.get_seq_length() or cache.rows != batch or cache.max_length < width + count - 1:
        raise ValueError(
            f"cache has {cache.rows} rows of max_length {cache.max_length} and holds {cache.get_seq_length()} tokens; "
            f"an empty one of {batch} rows and at least {width + count - 1} is needed"
        )
    written = Written(input_ids, count, config.eos_token_id, config.pad_token_id)
    logits = _prompt(model, input_ids, attention_mask, cache)
    first = written.put(choose(logits))
    if streamer is not None:
        streamer.put(input_ids.cpu())
        streamer.put(first.cpu())
    why = "there is no GPU" if not input_ids.is_cuda else refusal(model, cache)
    if graph and why is not None:
        raise ValueError(f"graph is True, and steps cannot be captured: {why}")
    if graph is not False and why is None:
        step = Step(model, cache, choose=lambda logits: written.put(choose(logits)), fuse=fuse)
        step.tokens.copy_(first[:, None])
        for done in range(1, count):
            if written.ends and (done % _LOOK_EVERY == 0 or streamer is not None) and written.all_ended():
                break
            step()
            if streamer is not None:
                streamer.put(written.tokens[:, done].cpu())
        step.leave()
        return _ended(streamer, written)
    tokens = first
    positions = torch.tensor(cache.row_lengths(), device=input_ids.device)
    for _ in range(1, count):
        if written.ends and written.all_ended():
            break
        out = model(input_ids=tokens[:, None], position_ids=positions[:, None], past_key_values=cache, use_cache=True)
        tokens = written.put(choose(out.logits[:, -1]))
        positions = positions + 1
        if streamer is not None:
            streamer.put(tokens.cpu())
    return _ended(streamer, written)


class Written:
    """The tokens so far, and which rows have ended; all on the device.

    Args:
        prompt: `[B, S]`.
        count: new tokens that there is room for.
        ends: the token or tokens that end a row; None: none does.
        pad: what stands after such a token.
    """

    def __init__(self, prompt: Tensor, count: int, ends: int | list[int] | None, pad: int | None) -> None:
        self.prompt, device = prompt, prompt.device
        self.ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
        self._ends = torch.tensor(self.ends, dtype=torch.int64, device=device)
        self.pad = pad if pad is not None else self.ends[0] if self.ends else 0
        self.tokens = torch.full((prompt.shape[0], count), self.pad, dtype=torch.int64, device=device)
        self.ended = torch.zeros(prompt.shape[0], dtype=torch.bool, device=device)
        self.at = torch.zeros(1, dtype=torch.int64, device=device)
        self.longest = torch.zeros((), dtype=torch.int64, device=device)  # tokens until every row had ended

    def put(self, tokens: Tensor) -> Tensor:
        """Write the next `[B]` down, and give them with padding where a row has ended; on the device only."""
        self.longest.add_(~self.ended.all())
        if self.ends:
            tokens = tokens.masked_fill(self.ended, self.pad)
            self.ended.logical_or_((tokens[:, None] == self._ends).any(dim=1))
        self.tokens.index_copy_(1, self.at, tokens[:, None])
        self.at.add_(1)
        return tokens

    def all_ended(self) -> bool:
        """Whether every row has ended; waits for the device."""
        return bool(self.ended.all())

    def result(self) -> Tensor:
        """The prompt and what was written, up to where the last row ended."""
        return torch.cat([self.prompt, self.tokens[:, : int(self.longest)]], dim=1)


def _ended(streamer: BaseStreamer | None, written: Written) -> Tensor:
    if streamer is not None:
        streamer.end()
    return written.result()


def _prompt(model: PreTrainedModel, input_ids: Tensor, mask: Tensor | None, cache: HeldCache) -> Tensor:
    """The logits `[B, vocabulary]` after each row's last real token."""
    batch, width = input_ids.shape
    if mask is not None and (mask.shape != input_ids.shape):
        raise ValueError(f"attention_mask has shape {list(mask.shape)}; it must be {[batch, width]}, 0 at padding")
    if mask is None or bool(mask.all()):
        out = model(input_ids=input_ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1]  # type: ignore[no-any-return]
    real = mask.bool()
    lengths = real.sum(dim=1)
    if not bool(lengths.all()):
        raise ValueError("attention_mask hides all tokens of a row")
    order = real.logical_not().to(torch.int8).argsort(dim=1, stable=True)
    cache.right_padded(lengths)
    positions = torch.arange(width, device=input_ids.device).expand(batch, -1)
    try:
        out = model(
            input_ids=input_ids.gather(1, order),
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=lengths_window(lengths, width),
        )
    finally:
        cache.right_padded(None)
    last = lengths - 1 - (width - out.logits.shape[1])
    return out.logits.take_along_dim(last[:, None, None], dim=1)[:, 0]  # type: ignore[no-any-return]


def lengths_window(lengths: Tensor, width: int) -> int:
    """How many of the last positions hold every row's last real token."""
    return width - int(lengths.min()) + 1


def _with_defaults(config: Any) -> Any:
    """The config with what transformers puts in the place of None."""
    defaults = {"do_sample": False, "temperature": 1.0, "top_k": 50, "top_p": 1.0, "max_length": 20}
    for name, value in defaults.items():
        if getattr(config, name, None) is None:
            setattr(config, name, value)
    return config

"""One mechanism of `attnzoo bench generation`, ours and then transformers', in a process of its own.

    python -m attnzoo.hf.generation.bench GQA-8 --batch 16 --length 8192 --lock FILE

prints a JSON line for each contestant. Processes set up side by side, and each times alone (a lock on FILE).
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from attnzoo.caches import RecurrentStateCache, RollingCache
from attnzoo.caches.token_cache import TokenCache
from attnzoo.hf.generation import bench_common as common
from attnzoo.hf.generation.bench_common import Lock
from attnzoo.hf.generation.bench_peers import theirs, ways
from attnzoo.hf.generation.bridge import graphed
from attnzoo.hf.generation.build import cache_for
from attnzoo.hf.generation.cache import HeldCache
from attnzoo.hf.generation.generate import Written
from attnzoo.hf.generation.graph import Step
from attnzoo.hf.generation.layer import HeldLayer
from attnzoo.hf.recurrent_cache import RecurrentLayer
from attnzoo.hf.swap import swap
from attnzoo.masks import SlidingWindow
from attnzoo.specs import GQA, MLA, Linear

# spec, kind of cache
OURS: dict[str, tuple[Any, Any]] = {
    "MHA": (GQA(), "contiguous"),
    "GQA-8": (GQA(num_kv_heads=8), "contiguous"),
    "MQA": (GQA(num_kv_heads=1), "contiguous"),
    "MLA": (MLA(**common.LATENT), "contiguous"),
    "window 1k": (GQA(num_kv_heads=8, mask=SlidingWindow(common.WINDOW)), "rolling"),
    "linear": (Linear(), "contiguous"),
    "int8 GQA-8": (GQA(num_kv_heads=8), "int8"),
}


def main(argv: list[str]) -> int:
    """Set up, check and time ours, and then what transformers has; a JSON line for each contestant."""
    parser = argparse.ArgumentParser("attnzoo.hf.generation.bench", description=main.__doc__)
    parser.add_argument("mechanism", choices=list(OURS))
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--lock", type=Path, required=True)
    options = parser.parse_args(argv)
    torch.manual_seed(0)
    lock, mechanism, batch, length = Lock(options.lock), options.mechanism, options.batch, options.length
    about = {"mechanism": mechanism, "length": length, "batch": batch}
    _tell({"side": "ours", **about}, lambda: ours(mechanism, batch, length, lock))
    for how in ways(mechanism, batch):
        _tell({"side": "transformers", "how": how, **about}, partial(theirs, mechanism, how, batch, length, lock))
    return 0


def our_model(mechanism: str) -> PreTrainedModel:
    """The model that `attnzoo.swap` makes for a mechanism."""
    return common.random_model("llama", {}, lambda model: swap(model, OURS[mechanism][0]))


@torch.no_grad()
def ours(mechanism: str, batch: int, length: int, lock: Lock) -> dict[str, Any]:
    """Milliseconds a step as `attnzoo.hf.generate` makes it, and of transformers' loop over the graph, and bytes."""
    with lock.shared():
        model = our_model(mechanism)
        cache = cache_for(model, batch, common.room(length), OURS[mechanism][1])
        tokens = torch.randint(1, common.SHAPE["vocab_size"], (batch, 16), device=common.DEVICE)
        model(input_ids=tokens, past_key_values=cache, logits_to_keep=1)
        fill(cache, length)
        error = _error(model, cache, tokens, length)
        written = Written(tokens, common.STEPS * common.ROUNDS + 4, ends=None, pad=0)
        step = Step(model, cache, choose=lambda logits: written.put(logits.float().argmax(-1)), fuse=True)
        for _ in range(3):
            step()
        torch.cuda.synchronize()
    with lock.alone():
        step_ms = common.clocked(step)
    step.leave()
    row = {"ms": step_ms, "error": error, "bytes": _bytes(model, cache, length)}
    with lock.shared(), graphed(model, fuse=True):
        fill(cache, length)
        return row | {"generate_ms": common.clocked_generate(model, cache, batch, length, lock)}


def fill(cache: HeldCache, length: int) -> None:
    """Make every row `length` random tokens long: decoding does not care what they say."""
    for layer in cache.layers:
        assert isinstance(layer, HeldLayer | RecurrentLayer)
        layer.seen = length
        if isinstance(layer, RecurrentLayer):
            assert layer.state is not None
            layer.state._rows.set([length] * layer.state.batch_size)
            layer.state._summed.set([length - layer.state.ring.size] * layer.state.batch_size)
            continue
        memory = layer.memory
        assert memory is not None
        held = memory.stored()
        parts = [*held.k, *held.v, *(held.recent.k + held.recent.v if held.recent is not None else ())]
        for part in parts:
            if part.dtype == torch.int8:
                part.random_(-127, 128)
            elif part.shape[-1] == 1:
                part.fill_(0.01)
            else:
                part.normal_()
        memory._rows.set([length] * memory.batch_size)


def _tell(row: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> None:
    try:
        row |= measure()
    except Exception as error:  # what a contestant cannot do is a row too
        row["unavailable"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    print(json.dumps(row), flush=True)
    gc.collect()
    torch.cuda.empty_cache()


def _error(model: PreTrainedModel, cache: HeldCache, tokens: Tensor, length: int) -> float:
    """The largest difference of a replayed step's logits from those of a step that counts on the host, relative."""
    overwritten = list(_overwritten(cache))
    before = [t.clone() for t in overwritten]
    step = Step(model, cache)
    for at in range(4):
        got = step(tokens[:, at, None])
    got = got.clone()
    step.leave()
    for t, old in zip(overwritten, before, strict=True):
        t.copy_(old)
    for layer in cache.layers:
        layer.seen = length  # type: ignore[union-attr]
    for memory in cache.memories:
        memory._rows.set([length] * memory.batch_size)  # type: ignore[attr-defined]
    positions = torch.full((tokens.shape[0], 1), length, device=common.DEVICE)
    for at in range(4):
        out = model(input_ids=tokens[:, at, None], position_ids=positions + at, past_key_values=cache)
    want = out.logits.float()
    return float((got.float() - want).abs().max() / want.abs().max())


def _overwritten(cache: HeldCache) -> Iterator[Tensor]:
    """What steps write over: states and rings. Elsewhere they write behind the last token."""
    for memory in cache.memories:
        if isinstance(memory, RecurrentStateCache):
            yield from (t for t in (*memory.state, *memory.ring) if t is not None)
        elif isinstance(memory, TokenCache):
            held = memory.stored()
            rings = [held.recent] if held.recent is not None else [held] if held.ring else []
            yield from (part for ring in rings for part in (*ring.k, *ring.v))


def _bytes(model: PreTrainedModel, cache: HeldCache, length: int) -> int:
    """What a step has to move: weights, all but the table of embeddings, and the cache; states both ways."""
    total = sum(p.nbytes for p in model.parameters()) - model.get_input_embeddings().weight.nbytes  # type: ignore[operator]
    for memory in cache.memories:
        if isinstance(memory, RecurrentStateCache):
            total += sum(t.nbytes for t in memory.ring if t is not None)
            total += 2 * sum(t.nbytes for t in memory.state if t is not None)
        elif isinstance(memory, TokenCache):
            kept = memory.window + memory.prefix if isinstance(memory, RollingCache) else length
            total += memory.bytes_per_token * kept * memory.batch_size
    return total


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

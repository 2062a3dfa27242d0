"""`attnzoo evaluate model.path=DIR data=shakespeare`: how good, how large and how fast a causal language model is."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections.abc import Iterable
from pathlib import Path

import hydra
import torch
import torch.nn.functional as F
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from recipes.evaluate_speed import cache_bytes_per_token, measure_speed
from recipes.packed import IGNORED, Batch, forward_packed, shifted_labels

log = logging.getLogger(__name__)

CHUNK_TOKENS = 1024  # whose logits are held in fp32 at once


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What was measured of one model.

    cross_entropy: nats a token, the mean over all `tokens` that were predicted; perplexity is its exponential.
    accuracy: the part of these tokens that the model held most likely.
    parameters: tied ones count once.
    kv_bytes_per_token: growth of the filled cache, of one sequence, over a prompt.
    prefill_tokens_per_s, decode_tokens_per_s: of one sequence; None when speed was not measured.
    """

    name: str
    cross_entropy: float
    perplexity: float
    accuracy: float
    tokens: int
    parameters: int
    kv_bytes_per_token: float
    prefill_tokens_per_s: float | None = None
    decode_tokens_per_s: float | None = None


def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    name: str,
    speed: bool = True,
    prompt_tokens: int = 256,
    device: torch.device | str | None = None,
) -> Evaluation:
    """Judges a causal language model of transformers on packed batches of held-out text.

    Args:
        model: with any attention implementation, in any dtype; stays in eval or train mode as it was.
        batches: as TextDataModule.val_batches() gives them.
        name: what the model is called in tables.
        speed: measure prefill and decode tokens/s too.
        prompt_tokens: length of the prompt that fills the cache and that speed is measured with; the same for all
            models that are to be compared.
        device: where to run; None is the GPU if there is one. The model is moved there.

    Raises:
        ValueError: when the batches hold no token to predict, or a loss is not finite.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    was_training = model.training
    model.to(device).eval()
    try:
        with torch.no_grad():
            loss, right, tokens = _score(model, batches, device)
            prompt_tokens = min(prompt_tokens, getattr(model.config, "max_position_embeddings", prompt_tokens) // 2)
            cache_bytes = cache_bytes_per_token(model, prompt_tokens)
            prefill, decode = measure_speed(model, prompt_tokens) if speed else (None, None)
    finally:
        model.train(was_training)
    if not tokens:
        raise ValueError("the held-out text has no token to predict")
    cross_entropy = loss / tokens
    if not math.isfinite(cross_entropy):
        raise ValueError(f"{name}: the cross-entropy is {cross_entropy}; the model's weights or logits are not finite")
    return Evaluation(
        name=name,
        cross_entropy=cross_entropy,
        perplexity=math.exp(min(cross_entropy, 700)),  # exp(710) is no float any more
        accuracy=right / tokens,
        tokens=tokens,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        kv_bytes_per_token=cache_bytes,
        prefill_tokens_per_s=prefill,
        decode_tokens_per_s=decode,
    )


def _score(model: nn.Module, batches: Iterable[Batch], device: torch.device) -> tuple[float, int, int]:
    """The loss summed over the predicted tokens, how many of them were held most likely, and how many there are."""
    loss, right, tokens = 0.0, 0, 0
    for batch in batches:
        batch = {key: value.to(device) for key, value in batch.items()}
        logits = forward_packed(model, batch)[0]  # [T, V]
        for chunk in _chunks(logits, shifted_labels(batch)):
            chunk_loss, chunk_right, chunk_tokens = _score_chunk(*chunk)
            loss, right, tokens = loss + chunk_loss, right + chunk_right, tokens + chunk_tokens
    return loss, right, tokens


def _chunks(logits: Tensor, targets: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
    return zip(logits.split(CHUNK_TOKENS), targets.split(CHUNK_TOKENS), strict=True)


def _score_chunk(logits: Tensor, targets: Tensor) -> tuple[float, int, int]:
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    loss = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
    right = (logits.argmax(dim=-1) == targets).sum()  # IGNORED is never the most likely token
    return float(loss), int(right), int((targets != IGNORED).sum())


@hydra.main(version_base="1.3", config_path="pkg://conf", config_name="evaluate")
def main(config: DictConfig) -> None:
    from recipes.run_folder import RunFolder

    run = RunFolder(Path(HydraConfig.get().runtime.output_dir))
    try:
        _evaluate_all(config, Path(config.out).expanduser() if config.out else run.path)
    finally:
        run.drop_if_nothing_ran()


def _evaluate_all(config: DictConfig, out: Path) -> None:
    from recipes.report import print_table
    from recipes.run_folder import write_whole

    OmegaConf.resolve(config)
    results = [_evaluate_path(path, config) for path in (config.model.path, *config.also)]
    print_table(results)
    out.mkdir(parents=True, exist_ok=True)
    rows = [dataclasses.asdict(result) for result in results]
    record = {"evaluations": rows, "config": OmegaConf.to_container(config)}
    write_whole(out / "evaluation.json", json.dumps(record, indent=2))
    log.info("written to %s", out / "evaluation.json")


def _evaluate_path(path: str, config: DictConfig) -> Evaluation:
    """Judges one model on the text, which its own tokenizer cuts."""
    from recipes.data import TextDataModule
    from recipes.models import load_model, load_tokenizer

    chosen = {**config.model, "path": path}
    model = load_model(chosen)
    data = TextDataModule(
        config.data,
        load_tokenizer(chosen),
        seq_len=config.seq_len,
        batch_size=config.batch_size,
        vocab_size=model.get_input_embeddings().num_embeddings,
    )
    return evaluate(
        model,
        data.val_batches(),
        name=Path(path).name.removeprefix("sample:"),
        speed=config.speed,
        prompt_tokens=config.prompt_tokens,
        device=config.device,
    )


if __name__ == "__main__":
    main()

"""`attnzoo evaluate model.path=DIR data=shakespeare`: how good, how large and how fast a causal language model is."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from torch import nn
from transformers import PreTrainedTokenizerBase

from recipes.evaluate_decode import decode_speed
from recipes.evaluate_samples import write_on
from recipes.evaluate_speed import cache_bytes_per_token, measure_speed
from recipes.packed import Batch
from recipes.scores import Scores, score

log = logging.getLogger(__name__)

Domains = Mapping[str, Iterable[Batch]]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What was measured of one model.

    cross_entropy: nats a token, the mean over all `tokens` that were predicted, and of several domains the mean of
        theirs; perplexity is its exponential.
    accuracy: the part of these tokens that the model held most likely, likewise.
    parameters: tied ones count once.
    kv_bytes_per_token: growth of the filled cache, of one sequence, over a prompt, in the model's dtype.
    prefill_tokens_per_s, decode_tokens_per_s: of one sequence; None when speed was not measured.
    batch_decode_tokens_per_s: of many sequences together with long caches; None when that was not measured.
    domains: cross_entropy, accuracy and tokens of each domain of the text.
    context: cross_entropy and tokens by how many tokens of the document stood before the one that was predicted:
        rows with first, last.
    samples: what the model writes greedily after each prompt.
    tasks: results of lm-evaluation-harness, by task and metric.
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
    batch_decode_tokens_per_s: float | None = None
    domains: Mapping[str, Mapping[str, float]] = dataclasses.field(default_factory=dict)
    context: Sequence[Mapping[str, float]] = dataclasses.field(default_factory=list)
    samples: Mapping[str, str] = dataclasses.field(default_factory=dict)
    tasks: Mapping[str, Mapping[str, float]] = dataclasses.field(default_factory=dict)


def evaluate(
    model: nn.Module,
    text: Iterable[Batch] | Domains,
    *,
    name: str,
    speed: bool = True,
    prompt_tokens: int = 256,
    decode: Mapping[str, int] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    prompts: Sequence[str] = (),
    sample_tokens: int = 48,
    device: torch.device | str | None = None,
) -> Evaluation:
    """Judges a causal language model of transformers on packed batches of held-out text.

    Args:
        model: with any attention implementation, in any dtype; stays in eval or train mode as it was.
        text: batches as TextDataModule.val_batches() gives them, or by domain as its val_domains() does.
        name: what the model is called in tables.
        speed: measure prefill and decode tokens/s too.
        prompt_tokens: length of the prompt that fills the cache and that speed is measured with; the same for all
            models that are to be compared.
        decode: batch and length of the caches with which to measure decoding of many sequences; None measures none.
        tokenizer: reads the prompts.
        prompts: what the model is to write on from.
        sample_tokens: how far it writes.
        device: where to run; None is the GPU if there is one. The model is moved there.

    Raises:
        ValueError: when the batches hold no token to predict, or a loss is not finite.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    domains = text if isinstance(text, Mapping) else {"text": text}
    was_training = model.training
    model.to(device).eval()
    try:
        with torch.no_grad():
            scores = {domain: score(model, batches, device) for domain, batches in domains.items()}
            longest = getattr(model.config, "max_position_embeddings", 1 << 20) // 2
            prompt_tokens = min(prompt_tokens, longest)
            with torch.autocast(device.type, enabled=False):  # in which some caches would be of another dtype
                cache_bytes = cache_bytes_per_token(model, prompt_tokens)
            prefill, written = measure_speed(model, prompt_tokens) if speed else (None, None)
            together = decode_speed(model, **{**decode, "length": min(decode["length"], longest)}) if decode else None
            samples = write_on(model, tokenizer, prompts, sample_tokens) if prompts and tokenizer else {}
    finally:
        model.train(was_training)
    found = quality(scores)
    if not math.isfinite(found["cross_entropy"]):
        raise ValueError(
            f"{name}: the cross-entropy is {found['cross_entropy']}; the model's weights or logits are not finite"
        )
    return Evaluation(
        name=name,
        **found,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        kv_bytes_per_token=cache_bytes,
        prefill_tokens_per_s=prefill,
        decode_tokens_per_s=written,
        batch_decode_tokens_per_s=together,
        samples=samples,
    )


def quality(scores: Mapping[str, Scores]) -> dict[str, Any]:
    """The fields of an `Evaluation` that scores by domain give; ValueError when a domain has no token to predict."""
    for domain, one in scores.items():
        if not one.tokens:
            of = f" of {domain}" if len(scores) > 1 else ""
            raise ValueError(f"the held-out text{of} has no token to predict")
    several = list(scores.values())
    cross_entropy = sum(one.cross_entropy for one in several) / len(several)
    return {
        "cross_entropy": cross_entropy,
        "perplexity": math.exp(min(cross_entropy, 700)),  # exp(710) is no float any more
        "accuracy": sum(one.accuracy for one in several) / len(several),
        "tokens": sum(one.tokens for one in several),
        "domains": {
            domain: {"cross_entropy": one.cross_entropy, "accuracy": one.accuracy, "tokens": one.tokens}
            for domain, one in scores.items()
        },
        "context": sum(several[1:], start=several[0]).by_context(),
    }


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
    from recipes.report_details import print_details
    from recipes.run_folder import write_whole

    OmegaConf.resolve(config)
    results = [_evaluate_path(path, config) for path in (config.model.path, *config.also)]
    print_table(results)
    print_details(results)
    out.mkdir(parents=True, exist_ok=True)
    rows = [dataclasses.asdict(result) for result in results]
    record = {"evaluations": rows, "config": OmegaConf.to_container(config)}
    write_whole(out / "evaluation.json", json.dumps(record, indent=2))
    log.info("written to %s", out / "evaluation.json")


def _evaluate_path(path: str, config: DictConfig) -> Evaluation:
    """Judges one model on the text, which its own tokenizer cuts."""
    from recipes.data import TextDataModule
    from recipes.evaluate_tasks import run_tasks
    from recipes.models import load_model, load_tokenizer

    chosen = {**config.model, "path": path}
    model, tokenizer = load_model(chosen), load_tokenizer(chosen)
    data = TextDataModule(
        config.data,
        tokenizer,
        seq_len=config.seq_len,
        batch_size=config.batch_size,
        vocab_size=model.get_input_embeddings().num_embeddings,
    )
    found = evaluate(
        model,
        data.val_domains(),
        name=Path(path).name.removeprefix("sample:"),
        speed=config.speed,
        prompt_tokens=config.prompt_tokens,
        decode=config.decode,
        tokenizer=tokenizer,
        prompts=config.prompts,
        sample_tokens=config.sample_tokens,
        device=config.device,
    )
    tasks = run_tasks(model, tokenizer, **config.harness)
    return dataclasses.replace(found, tasks=tasks)


if __name__ == "__main__":
    main()

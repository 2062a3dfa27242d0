"""A random two-layer Llama with a word tokenizer, and a text for it, as the folders that a user would have."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = [f"w{index}" for index in range(60)]


def save_tiny_llama(
    folder: Path, *, num_kv_heads: int = 2, seed: int = 0, vocab_size: int = 64, dropout: float = 0.0
) -> Path:
    """4 query heads of 8 dimensions, dim 32, fp32, 64 tokens; `dropout` is the attention's."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=num_kv_heads,
        max_position_embeddings=128,
        initializer_range=0.2,
        attention_dropout=dropout,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    vocabulary = {word: index for index, word in enumerate(["<eos>", "<unk>", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>", pad_token="<eos>"
    )
    tokenizer.save_pretrained(folder)
    return folder


def save_text(folder: Path, *, documents: int = 24, seed: int = 0) -> Path:
    """Files of 5 to 44 words in which each word but the first mostly follows from the one before it."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    for number in range(documents):
        length, word = torch.randint(5, 45, (1,), generator=generator).item(), number % 60
        words = []
        for _ in range(length):
            words.append(WORDS[word])
            word = (word * 7 + torch.randint(0, 2, (1,), generator=generator).item()) % 60
        (folder / f"{number:03d}.txt").write_text(" ".join(words), encoding="utf-8")
    return folder

"""A model with other attention mechanisms than its family's, in plain PyTorch and transformers.

This file is all that loading it needs: `from_pretrained(folder, trust_remote_code=True)`. It was written to be read,
not to be fast: attention weights are formed, and linear attention keeps keys and values. With attnzoo installed,
`import attnzoo.hf` before `from_pretrained(folder)` takes its kernels and caches of constant size instead.
"""

# mypy: ignore-errors
import torch
from torch import nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

LAYER = "model.layers.{}.self_attn"  # where the attention layers are


class AttnzooLlamaConfig(LlamaConfig):
    """The family's config; `attnzoo["layers"]` describes the attention layers."""

    model_type = "attnzoo_llama"


class Attention(nn.Module):
    """What the mechanisms share: linear layers by name, cache, masks. B rows, H heads, S tokens, D head size."""

    def __init__(self, old, about):
        super().__init__()
        for name, (inputs, outputs, bias) in about["linears"].items():
            setattr(self, name, nn.Linear(inputs, outputs, bias=bias))
        self.config, self.layer_idx, self.about = old.config, old.layer_idx, about
        self.is_causal = about["causal"]
        self.resid_dropout = getattr(old, "resid_dropout", None)
        if rate := getattr(old, "residual_dropout", 0.0):
            self.resid_dropout = nn.Dropout(rate)
        if about["norms"]:
            self.q_norm, self.k_norm = old.q_norm, old.k_norm

    def forward(
        self,
        hidden_states,
        position_embeddings=None,
        attention_mask=None,
        past_key_values=None,
        layer_past=None,
        **kwargs,
    ):
        cache = past_key_values if past_key_values is not None else layer_past
        q, k, v = self.project(hidden_states, position_embeddings)
        first_query, first_key = 0, 0
        if cache is not None:
            first_query = cache.get_seq_length(self.layer_idx)
            first_query = first_query.clone() if isinstance(first_query, torch.Tensor) else first_query
            first_key = cache.get_mask_sizes(q.shape[2], self.layer_idx)[1]
            k, v = cache.update(k, v, self.layer_idx)
        i = (torch.arange(q.shape[2], device=q.device) + first_query)[:, None]
        j = (torch.arange(k.shape[2], device=q.device) + first_key)[None, :]
        i, j = i[None, None], j[None, None]
        if attention_mask is None:
            seen = sees(self.about["mask"], i, j)
        else:  # the model's: True, or 0, where visible
            shown = attention_mask[..., : k.shape[2]]
            shown = shown if shown.dtype == torch.bool else shown == 0
            padded = shown[:, :1, -1:].to(torch.int8).argmax(-1, keepdim=True)  # positions count a row's real tokens
            seen = shown & sees(self.about["mask"], i - padded, j - padded)
        out = self.attend(q, k, v, seen, i - j).transpose(1, 2).flatten(2).to(hidden_states.dtype)
        out = self.o_proj(out) if hasattr(self, "o_proj") else out
        return (out if self.resid_dropout is None else self.resid_dropout(out)), None

    def softmax(self, q, k, v, seen):
        """Attention [B, H, Sq, Dv] of q [B, H, Sq, D]; a query that sees nothing gives 0."""
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
        scores = (q @ k.mT).to(torch.promote_types(q.dtype, torch.float32)) * self.about["scale"]
        if self.about["softcap"] is not None:
            scores = self.about["softcap"] * torch.tanh(scores / self.about["softcap"])
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0)
        return F.dropout(weights, self.about["dropout"], self.training).to(v.dtype) @ v


class GroupedQueryAttention(Attention):
    """Heads of queries share the keys and values of their group (arXiv 2305.13245)."""

    def project(self, x, tables):
        q, k, v = (getattr(self, f"{name}_proj")(x).unflatten(-1, (-1, self.about["head_dim"])) for name in "qkv")
        if self.about["norms"]:
            q, k = self.q_norm(q), self.k_norm(k)
        return rotate(q.transpose(1, 2), tables), rotate(k.transpose(1, 2), tables), v.transpose(1, 2)

    def attend(self, q, k, v, seen, age):
        return self.softmax(q, k, v, seen)


class LinearAttention(GroupedQueryAttention):
    """Weights are products of features (arXiv 2006.16236); with a window, softmax near (2410.10254)."""

    def __init__(self, old, about):
        super().__init__(old, about)
        if about["feature_map"] == "favor":
            self.learned_map = nn.Module()
            self.learned_map.register_buffer("directions", torch.zeros(about["num_features"], about["head_dim"]))
        if about["feature_map"] == "hedgehog":
            self.learned_map = nn.Module()
            for name, heads in (("q", about["num_heads"]), ("k", about["num_kv_heads"])):
                weight = torch.zeros(heads, about["head_dim"], about["head_dim"])
                self.learned_map.register_parameter(f"{name}_weight", nn.Parameter(weight))
        if about["window"] is not None:
            self.window_factors = nn.Parameter(torch.zeros(about["num_heads"]))

    def features(self, x, query):
        """Features [B, H, S, F] of queries or keys [B, H, S, D]."""
        kind = self.about["feature_map"]
        if kind == "hedgehog":  # arXiv 2402.04347
            scores = x @ (self.learned_map.q_weight if query else self.learned_map.k_weight)
            return torch.cat([scores.softmax(-1), (-scores).softmax(-1)], dim=-1)
        if kind == "favor":  # arXiv 2009.14794; what is subtracted cancels in the normaliser
            x = x * self.about["scale"] ** 0.5
            directions = self.learned_map.directions.to(x.dtype)
            exponents = x @ directions.T - x.square().sum(-1, keepdim=True) / 2
            high = exponents.amax(-1, keepdim=True) if query else directions.square().sum(-1).max() / 4
            return torch.exp(exponents - high)
        return {"elu": lambda x: F.elu(x) + 1, "relu": F.relu, "identity": lambda x: x}[kind](x)

    def attend(self, q, k, v, seen, age):
        q, k, v = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (q, k, v))
        group = q.shape[1] // k.shape[1]
        f_q, f_k = self.features(q, True), self.features(k, False)
        k, f_k, v = (t.repeat_interleave(group, dim=1) for t in (k, f_k, v))
        weights = (f_q @ f_k.mT).masked_fill(~seen, 0)
        if self.about["decay"] is not None:
            decay = torch.tensor(self.about["decay"], dtype=q.dtype, device=q.device).repeat_interleave(group)
            weights = weights * decay[:, None, None] ** age.clamp(min=0)
        if self.about["window"] is not None:
            near = seen & (age < self.about["window"])
            scores = ((q @ k.mT) * self.about["scale"]).masked_fill(~near, -torch.inf)
            high = scores.amax(-1, keepdim=True)
            scores = torch.exp(scores - high.masked_fill(high == -torch.inf, 0))
            weights = torch.where(near, self.window_factors.to(q.dtype).sigmoid()[:, None, None] * scores, weights)
        if not self.about["normalize"]:
            return weights @ v * self.about["scale"]
        total = weights.sum(-1, keepdim=True)
        return torch.where(total == 0, 0, weights / torch.where(total == 0, 1, total)) @ v


class LatentAttention(Attention):
    """Keys and values of all heads out of one latent and one rotated key a token (arXiv 2405.04434)."""

    def project(self, x, tables):
        rank, nope = self.about["kv_lora_rank"], self.about["qk_nope_head_dim"]
        q = self.q_proj(x) if hasattr(self, "q_proj") else self.q_b_proj(self.q_a_proj(x))
        q = q.unflatten(-1, (self.about["num_heads"], -1)).transpose(1, 2)
        low = self.kv_a_proj_with_mqa(x).unsqueeze(1)  # [B, 1, S, rank + rope]
        tables = tables if self.about["pairs"] is not None else None
        q = torch.cat([q[..., :nope], rotate(q[..., nope:], tables, self.about["pairs"])], dim=-1)
        return q, low[..., :rank], rotate(low[..., rank:], tables, self.about["pairs"])  # the last two are cached

    def attend(self, q, latent, rope_key, seen, age):
        heads, nope = self.about["num_heads"], self.about["qk_nope_head_dim"]
        kv = self.kv_b_proj(latent.squeeze(1)).unflatten(-1, (heads, -1)).transpose(1, 2)
        k = torch.cat([kv[..., :nope], rope_key.expand(-1, heads, -1, -1)], dim=-1)
        return self.softmax(q, k, kv[..., nope:], seen)


def rotate(x, tables, pairs=None):
    """x [B, H, S, D] with its leading dimensions rotated; `pairs` are the model's frequencies that it uses."""
    if tables is None:
        return x
    cos, sin = (table[..., : table.shape[-1] // 2].unsqueeze(1) for table in tables)
    if pairs is not None:
        cos, sin = cos[..., pairs], sin[..., pairs]
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1).to(x.dtype)


def sees(mask, i, j):
    """Whether the query at position i sees the key at position j, by a pattern as the config describes it."""
    kind, age = mask["pattern"], i - j
    if kind == "full":
        return torch.ones_like(age, dtype=torch.bool)
    if kind == "causal":
        return age >= 0
    if kind in ("sliding_window", "dilated"):
        step = mask.get("dilation", 1)
        return (age < mask["window"] * step) & (age >= -mask.get("ahead", 0) * step) & (age % step == 0)
    if kind == "global_tokens":
        tokens = mask["tokens"]
        chosen = torch.tensor(list(range(tokens)) if isinstance(tokens, int) else tokens, device=age.device)
        return torch.isin(i, chosen) | torch.isin(j, chosen)
    if kind == "per_head":
        return torch.cat([sees(part, i, j).expand(*age.shape) for part in mask["masks"]], dim=1)
    first, second = sees(mask["first"], i, j), sees(mask["second"], i, j)
    return first & second if kind == "and" else first | second


class AttnzooLlamaForCausalLM(LlamaForCausalLM):
    """The family's model with its attention layers replaced."""

    config_class = AttnzooLlamaConfig

    def __init__(self, config):
        config._attn_implementation = "eager"  # whose masks are written out
        super().__init__(config)
        kinds = {"gqa": GroupedQueryAttention, "linear": LinearAttention, "mla": LatentAttention}
        for number, about in enumerate(config.attnzoo["layers"]):
            path, _, name = LAYER.format(number).rpartition(".")
            parent = self.get_submodule(path)
            setattr(parent, name, kinds[about["mechanism"]](getattr(parent, name), about))

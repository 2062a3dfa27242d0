"""Generation: caches that transformers' `generate` fills, and steps that are one CUDA graph each.

`generate` is the loop of our own, `bridge` the way from transformers' own loop; both take steps (`graph`, with `device`
and `fused`) over a `cache` of `layer`s that `build` makes.
"""

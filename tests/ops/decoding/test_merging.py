"""The kernel that merges parts by their logsumexps, against the sums written out."""

from __future__ import annotations

import pytest
import torch

from attnzoo.ops.decoding.triton import plan
from attnzoo.ops.launching import find_triton

pytestmark = pytest.mark.skipif(find_triton() is None, reason="needs triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize(("splits", "v_dim"), [(2, 64), (5, 512), (33, 24)])
def test_parts_are_weighted_by_their_logsumexps(splits: int, v_dim: int) -> None:
    from attnzoo.ops.decoding.triton.merging import merge_kernel

    rows = 3
    parts = torch.randn(rows, splits, v_dim, device=DEVICE)
    lse = 5 * torch.randn(rows, splits, device=DEVICE)
    lse[0, 1], lse[2] = -torch.inf, -torch.inf  # a split without keys, a query without any
    parts[0, 1], parts[2] = 0, 0
    out = torch.full((rows, v_dim), torch.nan, device=DEVICE)
    merge = plan.merge_constants(plan.merge_for(1, splits, v_dim, 4))
    del merge["SHARE"]
    merge_kernel[(rows, 1, 1)](torch.cat([parts.flatten(), lse.flatten()]), out, splits, DV=v_dim, **merge)
    expected = (lse.softmax(1).nan_to_num()[..., None] * parts).sum(1)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)

"""Flash attention as Triton kernels, with every mask of `attnzoo.masks` fused."""

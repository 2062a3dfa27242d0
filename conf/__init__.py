"""Hydra configs; a package, so that `pkg://conf` finds them wherever attnzoo is installed."""

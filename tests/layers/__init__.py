"""Tests of layers, and the naive layer that they are held to."""

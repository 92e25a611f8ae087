"""Flax blocks to pure block functions and back; one file for each of Flax's two module systems."""

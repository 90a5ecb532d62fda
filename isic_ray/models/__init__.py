"""Generators and judges: protocols, checkpoints, families, decoding loops."""

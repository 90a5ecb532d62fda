"""Decoding loops: sampling visual tokens, asking questions, answering in text."""

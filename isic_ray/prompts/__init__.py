"""Prompt sets: tables on disk, their columns, categories and splits."""

"""The method: harmful space, codebook edits, Δ in the harmless space, and the file that holds them.

torch and safetensors only: no Ray, no transformers, and no file access outside `SafeCodebook.save`
and `SafeCodebook.load`.
"""

from __future__ import annotations

from isic_ray.codebook.artifact import ArtifactMeta, SafeCodebook, table_digest
from isic_ray.codebook.edit import Edit, build_edit
from isic_ray.codebook.finetune import HarmlessDelta

__all__ = ["ArtifactMeta", "Edit", "HarmlessDelta", "SafeCodebook", "build_edit", "table_digest"]

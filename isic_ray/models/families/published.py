"""Put published tensors into modules, for families that are not in transformers."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from isic_ray.errors import UserError


def tensor_named(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """Return one tensor. Raises UserError when it is not there."""
    if name not in tensors:
        raise UserError(f"the published weights lack {name}")
    return tensors[name]


def inside(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names begin with ``prefix``, as float32, under the rest of it."""
    return {
        name.removeprefix(prefix): tensor.float()
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


def fill(
    module: nn.Module, tensors: Mapping[str, Tensor], assign: bool = False, what: str = ""
) -> None:
    """Load ``tensors`` into ``module``, all of them. Raises UserError unless they fit.

    ``assign`` puts the tensors themselves into it, as a module on the meta device needs. ``what``
    begins the error's sentence; by default the published weights do not fit that module.
    """
    try:
        module.load_state_dict(tensors, assign=assign)
    except RuntimeError as error:
        problem = " ".join(str(error).split("\n")[1:2]).strip()
        what = what or f"the published weights do not fit {type(module).__name__}"
        raise UserError(f"{what}: {problem}") from error

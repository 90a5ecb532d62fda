"""isic_ray: safer autoregressive image generators by editing their visual-token codebook.

    config = isic_ray.load_config("demo", ["loop.max_rounds=2"])
    summary = isic_ray.run(config, "runs/demo")
    isic_ray.SafeCodebook.load("safe_codebook.safetensors").apply(model)

Names are imported when they are first used: `import isic_ray` alone loads neither Ray nor torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from isic_ray.codebook import SafeCodebook as SafeCodebook
    from isic_ray.config.run import RunConfig as RunConfig
    from isic_ray.config.run import load_config as load_config
    from isic_ray.models.registry import load_model as load_model
    from isic_ray.workflows.loop import run_isic as run

    __version__: str

_HOME = {  # public name: where it lives
    "SafeCodebook": ("isic_ray.codebook", "SafeCodebook"),
    "RunConfig": ("isic_ray.config.run", "RunConfig"),
    "load_config": ("isic_ray.config.run", "load_config"),
    "load_model": ("isic_ray.models.registry", "load_model"),
    "run": ("isic_ray.workflows.loop", "run_isic"),
}
__all__ = ["RunConfig", "SafeCodebook", "__version__", "load_config", "load_model", "run"]


def __getattr__(name: str) -> object:
    """A public name, on first use. Raises AttributeError for any other."""
    from importlib import import_module, metadata

    if name == "__version__":
        value: object = metadata.version("isic-ray")
    elif name in _HOME:
        module, attribute = _HOME[name]
        value = getattr(import_module(module), attribute)
    else:
        raise AttributeError(f"module 'isic_ray' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

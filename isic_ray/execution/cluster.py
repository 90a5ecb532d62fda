"""Joining or starting Ray, with its own noise held back."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from isic_ray.config import ExecutionConfig
from isic_ray.errors import UserError


@contextmanager
def connected(config: ExecutionConfig, verbose: bool = False) -> Iterator[None]:
    """Ray, connected for the length of the block; a Ray that was connected before is used and left alone."""
    os.environ.setdefault("RAY_AUTH_MODE", "disabled" if config.address == "local" else "token")
    # "0 GPUs" must not hide the GPUs of workers that share a node with a zero-GPU task.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Data's and Train's workers start at a lower priority than the driver for no use of ours.
    os.environ.setdefault("RAY_worker_niceness", "0")
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    if not verbose:
        _hush()
    import ray

    if ray.is_initialized():
        yield
        return
    _start(config, verbose)
    try:
        yield
    finally:
        ray.shutdown()


def _start(config: ExecutionConfig, verbose: bool) -> None:
    import ray

    address = None if config.address == "local" else config.address
    if address == "auto" and not os.environ.get("RAY_ADDRESS"):
        address = None  # no cluster was named: a local one is started
    local = address is None
    try:
        with contextlib.nullcontext() if verbose else _silent_stderr():
            ray.init(
                address=address,
                include_dashboard=False if local else None,
                log_to_driver=verbose,
                logging_level=logging.INFO if verbose else logging.ERROR,
            )
    except ConnectionError as error:
        raise UserError(f"no Ray cluster answers at {config.address}; start one or set execution.address") from error
    if threading.current_thread() is threading.main_thread():
        # Ray exits at once and silently on SIGTERM; `ray job stop` and Kubernetes mean what Ctrl-C means.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    if not verbose:
        _hush_data()


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Drop what C++ code writes to file descriptor 2: Ray's core announces its log level there."""
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)


def _hush() -> None:
    warnings.filterwarnings("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    for name in ("ray", "ray.data", "ray.train", "DeepSpeed"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _hush_data() -> None:
    import ray.data
    import ray.train

    for name in ("ray", "ray.data", "ray.train"):  # importing them set their levels anew
        logging.getLogger(name).setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.enable_auto_log_stats = False

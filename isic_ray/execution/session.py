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

from isic_ray.config.run import ExecutionConfig
from isic_ray.errors import UserError

# Where the store is. Workers need these too; they are no secrets, so they may travel in a runtime
# environment. Credentials never do: each machine has its own, from its environment, profile or
# instance role.
LOCATION = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION")


@contextmanager
def ray_session(config: ExecutionConfig, verbose: bool = False) -> Iterator[None]:
    """Ray, connected for the length of the block; a Ray that was connected before is used and
    left alone.
    """
    os.environ.setdefault("RAY_AUTH_MODE", "disabled" if config.address == "local" else "token")
    # "0 GPUs" must not hide the GPUs of workers that share a node with a zero-GPU task.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Data's and Train's workers start at a lower priority than the driver for no use of ours.
    os.environ.setdefault("RAY_worker_niceness", "0")
    # A Ray that is started here ends a process after a second without work, and the next stage
    # waits for a new one.
    os.environ.setdefault("RAY_idle_worker_killing_time_threshold_ms", "600000")
    # Ray warns of four times as many processes as may start at once; a training group and its
    # helpers are more.
    os.environ.setdefault(
        "RAY_worker_maximum_startup_concurrency", str(max(8, os.cpu_count() or 1))
    )
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    if _own_ray(
        config
    ):  # nobody takes this machine away; watching for it costs a process a training group
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    raise_start_timeout(config)
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


def raise_start_timeout(config: ExecutionConfig) -> None:
    """Training workers may have to wait for machines too; Ray Train's own limit is a minute."""
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(config.patience_s))


def _start(config: ExecutionConfig, verbose: bool) -> None:
    import ray

    address: str | None = config.address
    if address == "local" and not _own_ray(config):
        address = "auto"
    if address == "auto" and not os.environ.get("RAY_ADDRESS"):
        address = (
            None  # no cluster was named: Ray joins one that runs on this machine, else starts one
        )
    local = address in (None, "local")
    settings = {} if local else _location_settings()
    try:
        with contextlib.nullcontext() if verbose else _silent_stderr():
            ray.init(
                address=address,
                include_dashboard=False if local else None,
                runtime_env={"env_vars": settings} if settings else None,
                log_to_driver=verbose,
                logging_level=logging.INFO if verbose else logging.ERROR,
            )
    except ConnectionError as error:
        raise UserError(
            f"no Ray cluster answers at {config.address}; start one or set execution.address"
        ) from error
    if threading.current_thread() is threading.main_thread():
        # Ray exits at once and silently on SIGTERM; `ray job stop` and Kubernetes mean what Ctrl-C
        # means.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    if not verbose:
        _hush_data()


def _location_settings() -> dict[str, str]:
    """What tells workers of a cluster where the store is; nothing inside a Ray job, whose own
    settings they have.
    """
    if _in_job():
        return {}
    return {name: os.environ[name] for name in LOCATION if "@" not in os.environ.get(name, "@")}


def _own_ray(config: ExecutionConfig) -> bool:
    """Whether a Ray is started for this run alone. Within a job never: it would lack the job's
    files.
    """
    return config.address == "local" and not _in_job()


def _in_job() -> bool:
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def check_nodes(uri: str) -> None:
    """UserError, naming the machine, unless every machine of a cluster can read the run at ``uri``.

    Nothing is asked of a Ray on this machine alone: its workers have the driver's environment and
    files.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = [node for node in ray.nodes() if node["Alive"]]
    if len(nodes) == 1:
        return
    check = ray.remote(num_cpus=0, max_retries=0)(_reading_fails)
    asked = {
        node["NodeManagerAddress"]: check.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote(uri)
        for node in nodes
    }
    for address, answer in asked.items():
        if failure := ray.get(answer):
            raise UserError(f"the machine {address} of the cluster cannot read the run: {failure}")


def _reading_fails(uri: str) -> str:
    from isic_ray.runs.run import Run

    try:
        Run.open(uri)
    except UserError as error:
        return str(error)
    return ""


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

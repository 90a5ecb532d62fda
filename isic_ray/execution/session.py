"""Connecting to Ray or starting it, with what it says held back."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from isic_ray.config.run import ExecutionConfig
from isic_ray.errors import UserError

# Where the store is. Workers need these too; they are no secrets, so they may travel in a runtime
# environment. Credentials never do: each machine has its own, from its environment, profile or
# instance role.
LOCATION = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION")


@contextmanager
def ray_session(config: ExecutionConfig, verbose: bool = False) -> Iterator[None]:
    """Connect to Ray for the length of the block, and leave the process as it was before.

    A Ray that was connected before is used and left alone. Environment variables, warning filters,
    levels of loggers and the handler of SIGTERM are put back at the end. Raises UserError when no
    cluster answers.
    """
    with ExitStack() as restored:
        restored.enter_context(_environment(_settings(config, verbose)))
        if not verbose:
            restored.enter_context(_quiet())
        import ray

        if ray.is_initialized():
            yield
            return
        restored.enter_context(_sigterm_as_ctrl_c())
        _start(config, verbose)
        restored.callback(ray.shutdown)
        if not verbose:
            restored.enter_context(_quiet_data())
        yield


def raise_start_timeout(config: ExecutionConfig) -> None:
    """Let training workers of this process wait for machines too.

    Ray Train's own limit is a minute.
    """
    os.environ.update(_start_timeout(config))


def _settings(config: ExecutionConfig, verbose: bool) -> dict[str, str]:
    """Environment variables that Ray and the libraries read; a user's own values win."""
    settings = {
        "RAY_AUTH_MODE": "disabled" if config.address == "local" else "token",
        # "0 GPUs" must not hide the GPUs of workers that share a node with a zero-GPU task.
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        # Data's and Train's workers would start at a lower priority than the driver for no use.
        "RAY_worker_niceness": "0",
        # A Ray that is started here ends a process after a second without work, and the next stage
        # would wait for a new one.
        "RAY_idle_worker_killing_time_threshold_ms": "600000",
        # Ray warns of four times as many processes as may start at once; a training group and its
        # helpers are more.
        "RAY_worker_maximum_startup_concurrency": str(max(8, os.cpu_count() or 1)),
        "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
        "RAY_AIR_NEW_OUTPUT": "0",  # Tune's new output cannot be silenced
        **_start_timeout(config),
    }
    if _own_ray(config):
        # Nobody takes this machine away; watching for it costs a process per training group.
        settings["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"
    if not verbose:
        settings["TRANSFORMERS_VERBOSITY"] = "error"
        settings["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
        settings["RAY_BACKEND_LOG_LEVEL"] = "fatal"
    return {name: value for name, value in settings.items() if name not in os.environ}


def _start_timeout(config: ExecutionConfig) -> dict[str, str]:
    name = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"
    return {name: os.environ.get(name, str(config.patience_s))}


def _start(config: ExecutionConfig, verbose: bool) -> None:
    import ray

    address: str | None = config.address
    if address == "local" and not _own_ray(config):
        address = "auto"
    if address == "auto" and not os.environ.get("RAY_ADDRESS"):
        # No cluster was named: Ray joins one that runs on this machine, else starts one.
        address = None
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


@contextmanager
def _environment(settings: dict[str, str]) -> Iterator[None]:
    """Set variables for the length of the block."""
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _sigterm_as_ctrl_c() -> Iterator[None]:
    """Let SIGTERM mean what Ctrl-C means, as `ray job stop` and Kubernetes do.

    Ray by itself exits at once and silently. Only a main thread may handle signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        if before is not None:  # None: a handler that Python did not install, and cannot put back
            signal.signal(signal.SIGTERM, before)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hold back what Ray, DeepSpeed and torch warn and log, for the length of the block."""
    with warnings.catch_warnings(), _error_level("ray", "ray.data", "ray.train", "DeepSpeed"):
        warnings.filterwarnings("ignore")
        yield


@contextmanager
def _quiet_data() -> Iterator[None]:
    """Hold back what Ray Data and Train show; importing them has set their levels."""
    import ray.data
    import ray.train

    context = ray.data.DataContext.get_current()
    names = ("enable_progress_bars", "print_on_execution_start", "enable_auto_log_stats")
    before = {name: getattr(context, name) for name in names}
    with _error_level("ray", "ray.data", "ray.train"):
        for name in names:
            setattr(context, name, False)
        try:
            yield
        finally:
            for name, value in before.items():
                setattr(context, name, value)


@contextmanager
def _error_level(*names: str) -> Iterator[None]:
    """Let loggers say errors only, for the length of the block."""
    loggers = [logging.getLogger(name) for name in names]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)

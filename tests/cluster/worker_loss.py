"""A training worker of this process's Ray, killed as a spot machine goes."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import ray


@contextlib.contextmanager
def one_worker_killed(ready: Callable[[], bool]) -> Iterator[None]:
    """Within the block, SIGKILL to one worker once it is ``ready``; fails if none was killed."""
    killer = threading.Thread(target=_kill, args=(ready,), daemon=True)
    killer.start()
    yield
    killer.join(timeout=1)
    assert not killer.is_alive(), "no worker was killed"


def _kill(ready: Callable[[], bool]) -> None:
    while not (ray.is_initialized() and ready()):
        time.sleep(0.05)
    session = ray._private.worker._global_node.get_session_dir_path()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (process / "cmdline").read_text().startswith("ray::RayTrainWorker"):
                parent = (process / "stat").read_text().rpartition(")")[2].split()[1]
                if session in Path(f"/proc/{parent}/cmdline").read_text():
                    os.kill(int(process.name), signal.SIGKILL)
                    return

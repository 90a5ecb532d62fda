"""Submit a job and wait for it, for CI: the submission id names one piece of work, however often
this is called.

    RAY_ADDRESS=http://head:8265 python jobs/submit.py --id nightly -- \\
        jobs/run.py --config demo --out s3://bucket/nightly

A job of that id that runs is followed, one that succeeded is not run again, one that was stopped or
failed is submitted again and goes on where it was. The same id with another command is refused.
Exits as the job did; 130 when it was stopped (`ray job submit` exits 0 then). Ctrl-C leaves the job
running.
"""

from __future__ import annotations

import argparse
import asyncio
import shlex
import sys
import time
from pathlib import Path

import requests
from ray.job_submission import JobStatus, JobSubmissionClient

WORKING_DIR = Path(__file__).parents[1]
STOPPED, REFUSED = 130, 2
TRIES, PAUSE_S = 6, 5.0
# Time for the driver to say what is kept, before Ray kills it (its default is 3 s).
ENVIRONMENT = {"RAY_JOB_STOP_WAIT_TIME_S": "20"}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--id", required=True, help="submission id, the key of this piece of work")
    parser.add_argument("job", nargs="+", help="jobs/NAME.py and its arguments, behind --")
    options = parser.parse_args()
    entrypoint = f"python {shlex.join(options.job)}"
    for attempt in range(TRIES):
        try:
            client = JobSubmissionClient()
            other = submit(client, options.id, entrypoint)
            break
        except (
            ConnectionError,
            requests.ConnectionError,
        ) as error:  # if only the reply was lost, the id is found next
            if attempt == TRIES - 1:
                print(f"submit: the job server does not answer: {error}", file=sys.stderr)
                return REFUSED
            time.sleep(PAUSE_S)
    if other:
        print(f"submit: {options.id} is another job ({other}); give another --id", file=sys.stderr)
        return REFUSED
    return follow(client, options.id)


def submit(client: JobSubmissionClient, submission_id: str, entrypoint: str) -> str:
    """Sees to it that the job runs or has succeeded; returns the entry point of another job of
    that id, or "".
    """
    found = next((job for job in client.list_jobs() if job.submission_id == submission_id), None)
    if found and found.entrypoint != entrypoint:
        return str(found.entrypoint)
    if found and found.status in (JobStatus.STOPPED, JobStatus.FAILED):
        client.delete_job(submission_id)
        found = None
    if not found:
        environment = {"working_dir": str(WORKING_DIR), "env_vars": ENVIRONMENT}
        client.submit_job(
            entrypoint=entrypoint, submission_id=submission_id, runtime_env=environment
        )
    return ""


def follow(client: JobSubmissionClient, submission_id: str) -> int:
    """Print the job's output until it ends; returns its exit code."""

    async def show() -> None:
        async for lines in client.tail_job_logs(submission_id):
            print(lines, end="", flush=True)

    asyncio.run(show())
    while not (job := client.get_job_info(submission_id)).status.is_terminal():
        time.sleep(0.5)
    if job.status == JobStatus.STOPPED:
        print(
            f"submit: {submission_id} was stopped; the same command goes on with it",
            file=sys.stderr,
        )
        return STOPPED
    if job.status == JobStatus.FAILED:
        print(
            f"submit: {submission_id} failed: {(job.message or '').splitlines()[0]}",
            file=sys.stderr,
        )
        return job.driver_exit_code or 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

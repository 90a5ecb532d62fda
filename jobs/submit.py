"""Submit a job and wait for it, for CI: the submission id names one piece of work, however often this is called.

    RAY_ADDRESS=http://head:8265 python jobs/submit.py --id nightly -- jobs/run.py --config demo --out s3://bucket/nightly

A job of that id that runs is followed, one that succeeded is not run again, one that was stopped or failed is submitted
anew and goes on where it was. The same id with another command is refused. Exits as the job did; 130 when it was
stopped (`ray job submit` exits 0 then). Ctrl-C leaves the job running.
"""

from __future__ import annotations

import argparse
import asyncio
import shlex
import sys
import time
from pathlib import Path

from ray.job_submission import JobStatus, JobSubmissionClient

WORKING_DIR = Path(__file__).parents[1]
STOPPED, REFUSED = 130, 2
# Time for the driver to say what is kept, before Ray kills it (its default is 3 s).
ENVIRONMENT = {"RAY_JOB_STOP_WAIT_TIME_S": "20"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--id", required=True, help="submission id, the key of this piece of work")
    parser.add_argument("job", nargs="+", help="jobs/NAME.py and its arguments, behind --")
    options = parser.parse_args()
    client = JobSubmissionClient()
    entrypoint = f"python {shlex.join(options.job)}"
    found = next((job for job in client.list_jobs() if job.submission_id == options.id), None)
    if found and found.entrypoint != entrypoint:
        print(f"submit: {options.id} is another job ({found.entrypoint}); give another --id", file=sys.stderr)
        return REFUSED
    if found and found.status in (JobStatus.STOPPED, JobStatus.FAILED):
        client.delete_job(options.id)
        found = None
    if not found:
        environment = {"working_dir": str(WORKING_DIR), "env_vars": ENVIRONMENT}
        client.submit_job(entrypoint=entrypoint, submission_id=options.id, runtime_env=environment)
    return follow(client, options.id)


def follow(client: JobSubmissionClient, submission_id: str) -> int:
    """Print the job's output until it ends; returns its exit code."""

    async def show() -> None:
        async for lines in client.tail_job_logs(submission_id):
            print(lines, end="", flush=True)

    asyncio.run(show())
    while not (job := client.get_job_info(submission_id)).status.is_terminal():
        time.sleep(0.5)
    if job.status == JobStatus.STOPPED:
        print(f"submit: {submission_id} was stopped; the same command goes on with it", file=sys.stderr)
        return STOPPED
    if job.status == JobStatus.FAILED:
        print(f"submit: {submission_id} failed: {(job.message or '').splitlines()[0]}", file=sys.stderr)
        return job.driver_exit_code or 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

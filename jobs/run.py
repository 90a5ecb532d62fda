"""`isic run` as a Ray job: run the method, or go on with a run that was stopped.

    ray job submit --submission-id my-run --working-dir . -- \\
        python jobs/run.py --config janus-pro-1b --out s3://bucket/my-run \\
        --set prompts.unsafe=s3://bucket/unsafe.csv prompts.benign=s3://bucket/benign.csv

The entry point needs no GPU. It can be submitted again at any time: finished shards are read back
from --out. For CI, `python jobs/submit.py` waits, reuses the submission id, and exits as the job
did.
"""

import sys

from isic_ray.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["run", *sys.argv[1:]]))

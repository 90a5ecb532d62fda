"""`isic report` as a Ray job: write the report of a run again, beside its data.

ray job submit --working-dir . -- python jobs/report.py s3://bucket/my-run
"""

import sys

from isic_ray.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["report", *sys.argv[1:]]))

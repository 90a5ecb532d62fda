"""`isic evaluate` as a Ray job: measure a finished run with more arms, prompts and attacks.

    ray job submit --working-dir . -- \\
        python jobs/evaluate.py --run s3://bucket/my-run --prompts s3://bucket/fresh.csv
"""

import sys

from isic_ray.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))

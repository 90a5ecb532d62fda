"""`isic sweep` as a Ray job: search the method's settings with Ray Tune, all trials on the same
tokens.

    ray job submit --submission-id my-sweep --working-dir . -- \\
        python jobs/sweep.py --config demo --out s3://bucket/sweep
"""

import sys

from isic_ray.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["sweep", *sys.argv[1:]]))

"""`isic generate` as a Ray job: draw every prompt, let the model judge its own pictures, and build
the pairs.

    ray job submit --submission-id my-draws --working-dir . -- \\
        python jobs/generate.py --config janus-pro-1b --out s3://bucket/my-run

That is round 0 of a run; `jobs/run.py` with the same --config and --out goes on from it.
"""

import sys

from isic_ray.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["generate", *sys.argv[1:]]))

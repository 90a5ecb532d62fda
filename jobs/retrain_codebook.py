"""`isic retrain` as a Ray job: retrain a codebook in the harmless space on pictures in a bucket.

    ray job submit --submission-id my-codebook --working-dir . -- \\
        python jobs/retrain_codebook.py --run s3://bucket/my-run \\
        --pictures s3://bucket/pictures --out s3://bucket/codebook
"""

import sys

from isic_ray.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["retrain", *sys.argv[1:]]))

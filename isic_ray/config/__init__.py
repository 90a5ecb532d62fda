"""Settings of a run, a sweep, a retraining; recipes."""

"""The run directory: stores, commits, records, rows, shards, quarantine, garbage, status."""

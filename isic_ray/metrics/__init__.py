"""From verdicts to numbers: rates, intervals, tests, fidelity; a run read back."""

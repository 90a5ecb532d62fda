"""What happens in which order: the loop, evaluate, sweep, retrain, export. Imports no Ray."""

"""Parse a command line, call one function below, print."""

"""One adapter per model family, and what adapters share."""

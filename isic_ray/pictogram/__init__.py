"""The embedded world: scenes, drawing, prompts, auditor, weights, and how they were trained."""

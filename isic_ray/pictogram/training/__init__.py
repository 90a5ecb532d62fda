"""How the embedded model and its auditor were trained."""

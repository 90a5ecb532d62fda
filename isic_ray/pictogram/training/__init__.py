"""How the embedded model was trained: its architecture, and one stage per part."""

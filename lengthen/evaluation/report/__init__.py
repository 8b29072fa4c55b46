"""The HTML report of a run (page.py), and the figure of an evaluation (figures.py)."""

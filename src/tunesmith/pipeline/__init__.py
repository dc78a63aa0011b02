"""The stages of a run, one file each; `run.py` calls them in order."""

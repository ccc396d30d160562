"""Other simulators, each as a program of its own in an environment of its own, driven line by line (session.py)."""

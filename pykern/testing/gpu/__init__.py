"""What `make gpu` runs: everything that needs a GPU, in one go of at most ten minutes.

`run.py` plans, starts each part in processes of its own, keeps the results and prints the summary; `child.py` is what
those processes do; `parts.py` and `tools.py` say what each part consists of.
"""

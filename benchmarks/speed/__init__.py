"""Speed and memory: how much the method costs, against the plain model and against how others do it.

`python -m benchmarks.speed` writes benchmarks/results/speed.json and the tables of docs/speed.md.
"""

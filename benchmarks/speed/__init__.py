"""Speed and memory of the method, next to the plain model and next to how others do the same."""

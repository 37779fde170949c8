"""The method: the paper, one equation per function. Knows no host and no hook."""

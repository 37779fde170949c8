"""Tools of this repository that the pack does not need to run."""

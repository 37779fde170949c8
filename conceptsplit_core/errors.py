"""The one exception type that users are meant to read."""


class ConceptSplitError(ValueError):
    """Bad input, told in one sentence: what is wrong, where, and what to do about it."""

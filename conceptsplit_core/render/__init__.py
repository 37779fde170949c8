"""Drawing a table of pictures: reading it, handing its rows to workers, keeping what was drawn. Imports no torch."""

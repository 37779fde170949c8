"""One file per family of networks: how its modules are named, and which of them reads what."""

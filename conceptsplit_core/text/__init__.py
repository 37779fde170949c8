"""Which rows of an encoded prompt a concept owns."""

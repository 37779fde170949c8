"""The demo model: a small text-to-image model of patterned shapes, its pictures and how it was made."""

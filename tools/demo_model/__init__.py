"""How the demo model of `conceptsplit_core.demo` was trained. Not part of what the registry ships."""

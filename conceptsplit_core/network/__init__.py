"""Where in a network the method acts: sites, grids, hooks."""

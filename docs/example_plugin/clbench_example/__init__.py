"""An example of what a plugin package can add to clbench."""

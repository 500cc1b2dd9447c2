"""An example of what a plugin package can bring to clbench."""

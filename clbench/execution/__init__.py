"""Work as data: units (what is to be done, after what) and executors, which do it."""

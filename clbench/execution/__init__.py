"""Work as data: units (what to do, and after what) and executors, which do it."""

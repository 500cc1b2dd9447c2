"""Data sets in formats of published systems, written anew in LeRobot's: RLDS (rlds.py) and LIBERO's HDF5 files.

    recording.py     what a reader of a format offers: features by name, and episodes with their values
    rlds.py          RLDS as TFDS lays it out; below it tfrecord.py (records), crc32c.py (their checksums), example.py
                     (the message in a record)
    libero_hdf5.py   LIBERO's own demonstrations
    layout.py        which feature becomes which: defaults, and `--map`
    conventions.py   rotations, grippers, images: converted to those of LIBERO's simulator
    survey.py        everything is read once before anything is written
    write.py         the import as a whole
    card.py          what an imported set says of where it came from; needs none of the above
"""

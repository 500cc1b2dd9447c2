"""Conversion of data sets in the formats of published systems (RLDS, LIBERO's HDF5 files) into LeRobot's.

    recording.py     what a reader of a format offers: features by name, and episodes with their values
    rlds.py          RLDS as TFDS lays it out; below it tfrecord.py (records), crc32c.py (their checksums), example.py
                     (the message in a record)
    libero_hdf5.py   LIBERO's own demonstrations
    layout.py        which feature becomes which: defaults, and `--map`
    conventions.py   rotations, grippers, images: converted to those of LIBERO's simulator
    survey.py        reads everything before anything is written; what the numbers mean
    write.py         the import as a whole
    card.py          the record of where an imported set came from; needs none of the above
"""

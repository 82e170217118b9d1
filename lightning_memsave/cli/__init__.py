"""The ``memsave`` command line: one file per verb."""

"""The verbs: each module turns a command line into one call of the library."""

"""The command line. ``main`` is its entry; each command's work lies in a module of its own, imported when it runs."""

"""Scripts of the competitors, run by file path: a rival must not import this package, whose settings would bind it."""

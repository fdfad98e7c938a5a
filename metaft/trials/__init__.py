"""Trials of a command's settings: what is tried (`space`), in which order (`methods`), by what it is judged (`over`),
how trials are run (`processes`), and what came of them (`journal`, `searching`, `report`)."""

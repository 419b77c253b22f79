"""How others store 4-bit weights: one reader a format, called by the classmethods of `Weight4bit`."""

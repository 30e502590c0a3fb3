"""Reading back: which series are meant, what they hold, how it is written down. One engine for all faces."""

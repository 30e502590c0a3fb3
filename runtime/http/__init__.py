"""HTTP on a socket, alike for every face: bounded connections, answers in one piece, no request lost at its end."""

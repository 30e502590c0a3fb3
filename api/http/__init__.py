"""How operations over HTTP are declared, decoded, answered and described. Left out: which operations there are."""

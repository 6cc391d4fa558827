"""`oner-fast explore`: one page in which a run's model searches its pictures, without a server."""

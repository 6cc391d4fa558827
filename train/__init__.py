"""Training scripts, their recipes and the engine they share; imported as ``oner_fast.train``."""

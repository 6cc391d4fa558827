"""`oner-fast gpu`: the first run on a GPU, part by part, each in a process of its own with its own time limit."""

"""One line in other people's code: each module serves one project, and imports that project alone."""

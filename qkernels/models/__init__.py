"""Models from folders, what to judge them by, and the text that is shipped for it."""

"""One file a verb of the command line, and what several of them share."""

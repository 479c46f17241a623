"""The command line: words, options and tables. What a command does is in `run` and `launch`."""

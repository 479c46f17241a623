"""The stages of a run as functions of a recipe, which the command line and Python programs call."""

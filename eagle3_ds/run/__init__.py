"""The stages of a run as plain functions of a recipe; none of them needs a console."""

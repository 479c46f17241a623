"""Ways to damage a file, and what it means to read it rightly."""

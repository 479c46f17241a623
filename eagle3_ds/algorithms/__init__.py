"""The draft algorithms, a folder each."""

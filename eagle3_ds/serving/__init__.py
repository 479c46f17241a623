"""A target that a server runs: what runs inside the server (`connector`), and asking it for hidden states."""

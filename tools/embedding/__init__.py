"""What is behind tools/embed.py: what is embedded, how it is cut, and what runs it here or on more machines."""

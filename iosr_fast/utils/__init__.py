"""Small things without a domain: text, numbers, optional packages, threads, progress."""

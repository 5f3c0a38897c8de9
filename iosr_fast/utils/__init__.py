"""Small things without a domain: files and folders, optional packages, order, progress."""

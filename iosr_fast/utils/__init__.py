"""Small things without a domain: files and folders, command lines, optional packages, threads, progress."""

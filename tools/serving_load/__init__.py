"""Loads for the HTTP server: hostile ones, and heavy ones."""

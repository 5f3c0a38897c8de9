"""Serve a classifier to many callers: batching/ (threads and event loops), http/, and what is kept of uploads."""

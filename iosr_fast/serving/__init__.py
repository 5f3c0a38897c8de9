"""Serve a classifier to many callers: batching/ (threads and event loops), http/, ray/ and triton/."""

"""Many callers: batching/ for threads, http/, ray/ and triton/."""

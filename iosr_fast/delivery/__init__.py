"""A head together with its encoder: the fit on pictures, the questions that callers ask (`answering.Answering`), the
choice of an engine, one file and one plan for both."""

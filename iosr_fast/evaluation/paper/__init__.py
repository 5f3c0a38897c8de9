"""The paper's experiments on the data sets of the field: one JSON file a cell, so that a run resumes."""

"""How heads follow one another: changes, the log of changes, and bundles.

`store.Store` holds the newest fit; `updates` encode what a change needs, `changes.Change` makes the next head,
`change_log` writes it down first. `bundle` is a classifier as a folder.
"""

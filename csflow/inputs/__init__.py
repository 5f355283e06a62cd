"""From the locations a job is given to images: listing, reading and loading of every input kind.

`folders`, `manifests`, `archives` and `rows` know one kind each, `objects` the stores below them. `listing`
finds what there is; `reading` returns the bytes of one listed image; `loading` reads and decodes many.
"""

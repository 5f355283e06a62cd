"""Lists, reads and loads the images at the locations that a job is given."""

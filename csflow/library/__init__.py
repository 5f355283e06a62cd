"""What `import csflow` offers: models that score single images, and the jobs as functions."""

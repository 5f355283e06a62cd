"""Takes over CS-Flow models that other code bases trained."""

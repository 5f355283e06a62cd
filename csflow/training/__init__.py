"""Training of the flow on features of a frozen backbone."""

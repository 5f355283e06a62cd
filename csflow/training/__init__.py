"""Trains the flow on features of a frozen backbone."""

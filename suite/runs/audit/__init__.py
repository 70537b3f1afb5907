"""Checks of run folders: whether they are whole, what differs between two, cells measured again."""

"""Imported before any test and before torch: threads then wait as they do for a user."""

import suite  # noqa: F401

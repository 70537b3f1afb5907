"""The host side: layers that bind weights, plans tuned by measurement, compilation and launches."""
